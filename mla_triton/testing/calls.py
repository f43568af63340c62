"""A problem given to an operation, ours or somebody else's, and everything that the result must be.

    assert_correct(decode_inputs(kv_lens=[0, 37, 150], heads=16), my_decode)

runs a kernel several times over the same problem and holds it to the budget, to the same bits every
time, and to leaving alone what is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, overload

import torch

import mla_triton
from mla_triton import validate, validate_merge, validate_prefill
from mla_triton.cache import named
from mla_triton.problem import DecodeProblem, MergeProblem, PrefillProblem
from mla_triton.state import AttentionState
from mla_triton.testing import cache_results
from mla_triton.testing.budget import Budget, Inputs
from mla_triton.testing.cache_results import CacheInputs, CacheResult
from mla_triton.testing.comparison import State, assert_same_bits, assert_within_budget
from mla_triton.testing.merges import MergeInputs
from mla_triton.testing.prefill_problems import PrefillInputs
from mla_triton.testing.problems import DecodeInputs, untouched_padding


@overload
def run(inputs: Inputs, *, impl: str | None = None, parts: int | None = None) -> AttentionState: ...


@overload
def run(
    inputs: CacheInputs, *, impl: str | None = None, parts: int | None = None
) -> CacheResult: ...


def run(
    inputs: Inputs | CacheInputs, *, impl: str | None = None, parts: int | None = None
) -> AttentionState | CacheResult:
    """Our operation over a problem, into buffers of NaN; of one on a cache, what it leaves in a
    copy of the cache or of the results.

    `impl` is that of the operation; `parts`, of a decode alone, is how many parts the batch is cut
    into, where the implementation cuts it. Raises what the operation raises, and ValueError where
    `parts` is given for another operation.
    """
    if parts is not None and not isinstance(inputs, DecodeInputs):
        raise ValueError(f"parts must be left out of all but a decode, got {parts}")
    if isinstance(inputs, CacheInputs):
        return cache_results.run(inputs, impl)
    arguments, options = inputs.call_arguments()
    options |= inputs.output_buffers()
    if isinstance(inputs, DecodeInputs):
        if parts is not None:
            options["plan"] = plan_of(inputs, impl, parts)
        return mla_triton.decode(*arguments, **options, impl=impl)
    operation = mla_triton.merge if isinstance(inputs, MergeInputs) else mla_triton.prefill
    return operation(*arguments, **options, impl=impl)


def plan_of(
    inputs: DecodeInputs, impl: str | None = None, parts: int | None = None, **options: Any
) -> mla_triton.Plan:
    """The plan that `mla_triton.plan` makes for a problem, with other options of its.

    Of the cache it is told the format, unless the options say another.
    """
    is_ragged = inputs.cu_seqlens_q is not None
    options = {"cache_format": cache_format_of(inputs)} | options
    return mla_triton.plan(
        inputs.kv_lens,
        heads=inputs.q_nope.shape[-2],
        latent=inputs.q_nope.shape[-1],
        rope=0 if inputs.q_rope is None else inputs.q_rope.shape[-1],
        dtype=inputs.dtype,
        s_q=1 if is_ragged else inputs.q_nope.shape[1],
        cu_seqlens_q=inputs.cu_seqlens_q,
        queries=inputs.q_nope.shape[0] if is_ragged else None,
        value_dim=inputs.value_dim,
        parts=parts,
        impl=impl,
        **options,
    )


def cache_format_of(inputs: DecodeInputs) -> str:
    """What `mla_triton.plan` is told of a problem's cache: the format that has its scales, or
    "16bit" where none with a name has."""
    problem = _decode_problem(inputs)
    if problem.storage is None:
        return "16bit"
    sizes = (problem.dtype, problem.latent, problem.rope, problem.value_dim)
    for name in named.CACHE_FORMATS[1:]:
        if named.why_not(name, *sizes) is None:
            storage = named.over(problem, name).storage
            if storage is not None and storage.name == problem.storage.name:
                return name
    return "16bit"


def problem_of(inputs: Inputs) -> DecodeProblem | PrefillProblem | MergeProblem:
    """What a call with these inputs is to the package: the key of selection and of configs."""
    if isinstance(inputs, DecodeInputs):
        return _decode_problem(inputs)
    return _merge_problem(inputs) if isinstance(inputs, MergeInputs) else _prefill_problem(inputs)


def _decode_problem(inputs: DecodeInputs) -> DecodeProblem:
    buffers = inputs.output_buffers()
    return validate.decode(
        inputs.q_nope, inputs.q_rope, *validate.unpack_cache(inputs.cache),
        *validate.unpack_page_table(inputs.page_table), inputs.kv_lens, inputs.cu_seqlens_q,
        buffers["out"], buffers["lse"], softmax_scale=inputs.softmax_scale, causal=inputs.causal,
        value_dim=inputs.value_dim, max_kv_len=inputs.max_kv_len, allow_tf32=False,
    )  # fmt: skip


def _prefill_problem(inputs: PrefillInputs) -> PrefillProblem:
    buffers = inputs.output_buffers()
    return validate_prefill.prefill(
        inputs.q, inputs.q_rope, inputs.k, inputs.k_rope, inputs.v, inputs.cu_seqlens_q,
        inputs.cu_seqlens_k, buffers["out"], buffers["lse"],
        softmax_scale=inputs.softmax_scale, causal=inputs.causal, max_seqlen_q=None,
    )  # fmt: skip


def _merge_problem(inputs: MergeInputs) -> MergeProblem:
    buffers = inputs.output_buffers()
    outs, lses = validate_merge.unpack(inputs.given)
    return validate_merge.merge(outs, lses, inputs.mask, buffers["out"], buffers["lse"]).problem


def assert_correct(
    inputs: Inputs | CacheInputs,
    compute: Callable[[Any], Any] = run,
    *,
    repeats: int = 2,
    budget: Budget | None = None,
) -> None:
    """Raises AssertionError unless a kernel is right about a problem, and nothing but right.

    `compute(inputs)` gives `(out, lse)`, or `(out, None)` from a kernel that returns no lse; by
    default it is our own operation. It is called `repeats` times. Every result has to have the same
    bits, the first to be within the budget (by default that of the inputs), what was read to be as
    it was, and the columns between rows to be NaN as `output_buffers` gave them, where a result
    lies in such a buffer.

    Of an append or a copy of pages it gives the `CacheMemory` that was written, that of
    `inputs.fresh()`, and of a gather `(out, rope_out)`; they are judged by `compare_cache`.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    before = Snapshot(inputs)
    first = compute(inputs)
    written = before.written()
    if written:
        raise AssertionError(f"{', '.join(written)} must be read only, and changed\n{inputs!r}")
    if isinstance(inputs, CacheInputs):
        report = cache_results.compare_cache(first, inputs)
        if not report.ok:
            raise AssertionError(f"{report.message}\n{inputs!r}")
        if not all(cache_results.same_result(first, compute(inputs)) for _ in range(repeats - 1)):
            raise AssertionError(f"two runs are not the same\n{inputs!r}")
        return
    assert_within_budget(first, inputs, budget)
    spilt = spilt_results(first, inputs)
    if spilt:
        raise AssertionError(f"what lies between rows of {spilt} was written\n{inputs!r}")
    for _ in range(repeats - 1):
        try:
            assert_same_bits(first, compute(inputs))
        except AssertionError as error:
            raise AssertionError(f"two runs are not the same: {error}\n{inputs!r}") from error


class Snapshot:
    """Every byte of the tensors of a problem as it was, what lies between rows included."""

    def __init__(self, inputs: Inputs | CacheInputs) -> None:
        memories: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
        for name, tensor in tensors_of(inputs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in memories:
                memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                memories[storage.data_ptr()] = (name, memory, memory.clone())
        self.memories = list(memories.values())

    def written(self) -> list[str]:
        """Names of the fields whose memory has changed since."""
        return [name for name, now, then in self.memories if not torch.equal(now, then)]


def tensors_of(inputs: Inputs | CacheInputs) -> Iterator[tuple[str, torch.Tensor]]:
    """(field, tensor) of everything that a problem hands to a kernel."""

    def within(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                yield from within(key, part)
        elif isinstance(value, tuple):
            for part in value:
                yield from within(name, part)
        elif is_dataclass(value):
            for each in fields(value):
                yield from within(name, getattr(value, each.name))

    names = inputs._fields if isinstance(inputs, tuple) else [each.name for each in fields(inputs)]
    for name in names:
        yield from within(name, getattr(inputs, name))


def spilt_results(state: State, inputs: Inputs) -> str:
    """Which of out and lse was written between its rows; "" where neither was.

    Looked at are results that lie as `output_buffers` lays them, with columns of NaN between rows.
    """
    if not inputs.padding:
        return ""
    buffers = inputs.output_buffers()
    spilt = [
        name
        for name, result in zip(buffers, state, strict=True)
        if result is not None
        and _layout(result) == _layout(buffers[name])
        and not untouched_padding(result)
    ]
    return " and ".join(spilt)


def _layout(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.untyped_storage().nbytes())
