"""Whether a table's rows can be found and run: each is held against its implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType

import torch

from mla_triton import device as devices
from mla_triton.configs.lookup import usable
from mla_triton.configs.table import Items, Row, Scalar, Table
from mla_triton.device import Device
from mla_triton.kernels.common.tuning_key import MAX_S_Q_BUCKET
from mla_triton.kernels.portable import decode_config as portable_config
from mla_triton.kernels.sm90 import decode_config as sm90_config
from mla_triton.problem import DecodeProblem, RowSteps

IMPLEMENTATIONS: dict[tuple[str, str], ModuleType] = {
    (module.OP, module.NAME): module for module in (sm90_config, portable_config)
}
"""What a row can be of, by what needs no compiler."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DECODE_KEY: dict[str, type] = {
    "dtype": str,
    "format": str,
    "heads": int,
    "latent": int,
    "page_size": int,
    "rope": int,
    "row_tile": int,
    "s_q": int,
    "value_dim": int,
}


def broken_rules(table: Table) -> Iterator[tuple[int | None, str]]:
    """(number of the row, rule) for each row that no call could use; a number of None is the table.

    A card of the header's capability that is in this machine is taken as it is, any other as the
    package knows it.
    """
    label = table.header.capability
    device = devices.current()
    if device.label != label:
        try:
            device = devices.from_label(label)
        except ValueError as error:
            yield None, f"header.{error}"
            return
    if device.backend not in ("cuda", "hip"):
        yield None, f"header.capability must be that of a GPU, got {label!r}"
        return
    for number, row in enumerate(table.rows, 1):
        rule = broken_rule(row, device)
        if rule is not None:
            yield number, rule


def broken_rule(row: Row, device: Device) -> str | None:
    """The first rule that a row breaks, or None."""
    implementation = _implementation(row.point.op, row.point.impl)
    if implementation is None:
        known = " or ".join(f"{op} {impl}" for op, impl in IMPLEMENTATIONS)
        return f"op and impl must be {known}, got {row.point.op} {row.point.impl}"
    if (row.us is None) != (row.source == "modelled"):
        return f"us must be a number if tuned and null if modelled, got {row.us} and {row.source}"
    rule = _broken_key(dict(row.point.key))
    if rule is not None:
        return rule
    problem, rule = _problem(implementation, row, device)
    if problem is None:
        return rule
    config, rule = usable(implementation, row.config, problem, device)
    return None if config is not None else f"config {dict(row.config)} cannot be used: {rule}"


def problem_of(row: Row, device: Device) -> DecodeProblem:
    """A problem whose look-up on a card comes to the row; ValueError where there is none."""
    implementation = _implementation(row.point.op, row.point.impl)
    if implementation is None:
        raise ValueError(f"row must be of a known implementation, got {row.point}")
    problem, rule = _problem(implementation, row, device)
    if problem is None:
        raise ValueError(f"row must be one that a call can find: {rule}")
    return problem


def _implementation(op: str, impl: str) -> ModuleType | None:
    return IMPLEMENTATIONS.get((op, impl))


def _broken_key(key: Mapping[str, Scalar]) -> str | None:
    if set(key) != set(DECODE_KEY):
        return f"key must have {', '.join(DECODE_KEY)}, got {', '.join(key) or 'nothing'}"
    for name, kind in DECODE_KEY.items():
        if type(key[name]) is not kind:
            return f"key.{name} must be {kind.__name__}, got {key[name]!r}"
    if key["dtype"] not in DTYPES:
        return f"key.dtype must be one of {', '.join(DTYPES)}, got {key['dtype']!r}"
    return None


def _problem(
    implementation: ModuleType, row: Row, device: Device
) -> tuple[DecodeProblem | None, str]:
    """A problem whose look-up comes to the row; (None, why there is none)."""
    key = dict(row.point.key)
    row_tiles = set()
    for problem in decode_problems(row.point.key, row.point.batch, row.point.length):
        reason = implementation.why_not(problem, device)
        if reason is not None:
            return None, f"key must be of a problem that {row.point.impl} takes: {reason}"
        if problem.value_dim not in (problem.latent, problem.key_dim):
            rule = f"key.value_dim must be latent or latent + rope, got {problem.value_dim}"
            return None, rule
        found = dict(implementation.tuning_point(problem, device)[0])
        if found == key:
            return problem, ""
        for name in key:
            if name != "row_tile" and found[name] != key[name]:
                return None, f"key.{name} must be {found[name]!r}, got {key[name]!r}"
        row_tiles.add(found["row_tile"])
    possible = " or ".join(map(str, sorted(row_tiles)))
    where = f"at batch {row.point.batch} on {device.label}, or no call finds the row"
    return None, f"key.row_tile must be {possible} {where}, got {key['row_tile']}"


def decode_problems(key: Items, batch: int, length: int) -> Iterator[DecodeProblem]:
    """Problems that the key of a row stands for, over a fused and aligned cache.

    First the one that the key says; then others of its buckets, which hold several head counts and
    query tokens and so may be cut into other row tiles.
    """
    values = dict(key)
    latent, rope, value_dim = (int(values[name]) for name in ("latent", "rope", "value_dim"))
    # Row tiles change at 16 and 32 rows, and at multiples of 64 that are few.
    for s_q in _tokens(int(values["s_q"])):
        for heads in _heads(int(values["heads"])):
            yield DecodeProblem(
                dtype=DTYPES[str(values["dtype"])],
                batch=batch,
                s_q=s_q,
                queries=batch * s_q,
                heads=heads,
                latent=latent,
                rope=rope,
                value_dim=value_dim,
                page_size=int(values["page_size"]),
                csr=False,
                causal=s_q > 1,
                fused=True,
                ckv_stride_slot=latent + rope,
                kpe_stride_slot=0,
                page_slots=int(values["page_size"]),
                row_steps=RowSteps(latent + rope, latent + rope if rope else 0, value_dim, 1),
                max_kv_len=length,
            )


def _tokens(bucket: int) -> tuple[int, ...]:
    """Query tokens of a bucket; the last one holds everything above it, too."""
    if bucket != MAX_S_Q_BUCKET:
        return (bucket,)
    return (bucket, bucket - 1, *(bucket << doubled for doubled in range(1, 7)))


def _heads(bucket: int) -> list[int]:
    """The head counts of a bucket from the largest down; above 64 a sample of them."""
    return [bucket, *range(bucket - 1, bucket // 2, -max(1, bucket // 64))]
