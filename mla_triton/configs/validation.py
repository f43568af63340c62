"""Whether a table's rows can be found and run: each is held against its implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import torch

from mla_triton import device as devices
from mla_triton.cache.named import over_storage
from mla_triton.configs.lookup import usable
from mla_triton.configs.table import Items, Row, Scalar, Table
from mla_triton.device import Device
from mla_triton.kernels.common.tuning_key import MAX_S_Q_BUCKET
from mla_triton.kernels.portable import decode_config as portable_config
from mla_triton.kernels.portable import prefill_config as portable_prefill_config
from mla_triton.kernels.sm90 import decode_config as sm90_config
from mla_triton.kernels.sm90 import prefill_config as sm90_prefill_config
from mla_triton.problem import DecodeProblem, PrefillProblem, RowSteps

Problem = DecodeProblem | PrefillProblem

IMPLEMENTATIONS: dict[tuple[str, str], ModuleType] = {
    (module.OP, module.NAME): module
    for module in (
        sm90_config,
        portable_config,
        sm90_prefill_config,
        portable_prefill_config,
    )
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
PREFILL_KEY: dict[str, type] = {
    "causal": bool,
    "dtype": str,
    "heads": int,
    "qk": int,
    "rope": int,
    "s_q": int,
    "value_dim": int,
}


class Kind(NamedTuple):
    """What the rows of an operation are like."""

    key: dict[str, type]
    """Names of a key, and what each value is."""
    problems: Callable[[Items, int, int], Iterator[Problem]]
    """Problems that a key, a batch and a length stand for, first the one that the key says."""


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
    rule = _broken_key(dict(row.point.key), KINDS[row.point.op].key)
    if rule is not None:
        return rule
    problem, rule = _problem(implementation, row, device)
    if problem is None:
        return rule
    config, rule = usable(implementation, row.config, problem, device)
    return None if config is not None else f"config {dict(row.config)} cannot be used: {rule}"


def problem_of(row: Row, device: Device) -> Problem:
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


def _broken_key(key: Mapping[str, Scalar], wanted: Mapping[str, type]) -> str | None:
    if set(key) != set(wanted):
        return f"key must have {', '.join(wanted)}, got {', '.join(key) or 'nothing'}"
    for name, kind in wanted.items():
        if type(key[name]) is not kind:
            return f"key.{name} must be {kind.__name__}, got {key[name]!r}"
    if key["dtype"] not in DTYPES:
        return f"key.dtype must be one of {', '.join(DTYPES)}, got {key['dtype']!r}"
    return None


def _problem(implementation: ModuleType, row: Row, device: Device) -> tuple[Problem | None, str]:
    """A problem whose look-up comes to the row; (None, why there is none)."""
    key = dict(row.point.key)
    row_tiles = set()
    for problem in KINDS[row.point.op].problems(*row.point[2:]):
        reason = implementation.why_not(problem, device)
        if reason is not None:
            return None, f"key must be of a problem that {row.point.impl} takes: {reason}"
        rule = _broken_widths(problem)
        if rule is not None:
            return None, rule
        found = dict(implementation.tuning_point(problem, device)[0])
        if found == key:
            return problem, ""
        for name in key:
            if name != "row_tile" and found[name] != key[name]:
                return None, f"key.{name} must be {found[name]!r}, got {key[name]!r}"
        # The same key but for the tile, which only decode has in its key.
        row_tiles.add(found["row_tile"])
    if not row_tiles:
        known = "16bit, fp8 or fp8-<columns that share a scale>-<float32 or e8m0>"
        return None, f"key.format must be {known}, got {key['format']!r}"
    possible = " or ".join(map(str, sorted(row_tiles)))
    where = f"at batch {row.point.batch} on {device.label}, or no call finds the row"
    return None, f"key.row_tile must be {possible} {where}, got {key['row_tile']}"


def _broken_widths(problem: Problem) -> str | None:
    if isinstance(problem, PrefillProblem):
        rope = problem.qk_dim - problem.k_nope
        if not 0 <= rope < problem.qk_dim:
            return f"key.rope must be in [0, {problem.qk_dim - 1}], got {rope}"
    elif problem.value_dim not in (problem.latent, problem.key_dim):
        return f"key.value_dim must be latent or latent + rope, got {problem.value_dim}"
    return None


def prefill_problems(key: Items, batch: int, length: int) -> Iterator[PrefillProblem]:
    """The problem that the key of a row stands for: whole queries, keys with one rotary part."""
    values = dict(key)
    qk, heads, s_q = (int(values[name]) for name in ("qk", "heads", "s_q"))
    yield PrefillProblem(
        dtype=DTYPES[str(values["dtype"])],
        heads=heads,
        kv_heads=heads,
        qk_dim=qk,
        value_dim=int(values["value_dim"]),
        q_nope=qk,
        k_nope=qk - int(values["rope"]),
        causal=bool(values["causal"]),
        usual_queries=s_q,
        batch=batch,
        queries=batch * s_q,
        keys=batch * length,
    )


def decode_problems(key: Items, batch: int, length: int) -> Iterator[DecodeProblem]:
    """Problems that the key of a row stands for, over a fused and aligned cache, or one whose
    columns have scales and whose rotary keys, if they are no values, lie apart.

    First the one that the key says; then others of its buckets, which hold several head counts and
    query tokens and so may be cut into other row tiles.
    """
    values = dict(key)
    latent, rope, value_dim = (int(values[name]) for name in ("latent", "rope", "value_dim"))
    # Row tiles change at 16 and 32 rows, and at multiples of 64 that are few.
    for s_q in _tokens(int(values["s_q"])):
        for heads in _heads(int(values["heads"])):
            plain = DecodeProblem(
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
            yield from over_storage(plain, str(values["format"]))


def _tokens(bucket: int) -> tuple[int, ...]:
    """Query tokens of a bucket; the last one holds everything above it, too."""
    if bucket != MAX_S_Q_BUCKET:
        return (bucket,)
    return (bucket, bucket - 1, *(bucket << doubled for doubled in range(1, 7)))


def _heads(bucket: int) -> list[int]:
    """The head counts of a bucket from the largest down; above 64 a sample of them."""
    return [bucket, *range(bucket - 1, bucket // 2, -max(1, bucket // 64))]


KINDS = {
    "decode": Kind(DECODE_KEY, decode_problems),
    "prefill": Kind(PREFILL_KEY, prefill_problems),
}
