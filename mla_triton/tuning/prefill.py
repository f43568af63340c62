"""How a prefill is tried out: inputs on the GPU, one call with a given config, and its judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mla_triton import select, timing
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Launcher, Variant
from mla_triton.kernels.common.tensors import PrefillTensors
from mla_triton.problem import PrefillProblem
from mla_triton.state import AttentionState
from mla_triton.tuning.memory import Memory

if TYPE_CHECKING:
    from mla_triton.testing import PrefillInputs, Report

SAMPLE = 64
"""Query tokens from either end of a sequence that are held against the reference: its first tile,
and its last with every key. The oracle of all would take the time of all."""


def implementation_of(problem: PrefillProblem, device: Device) -> ModuleType:
    """The kernel that a prefill runs by."""
    return select.choose_prefill(problem, device).module


def describe(key: Mapping[str, Any]) -> str:
    """The key of a row, for a reader."""
    mask = "causal" if key["causal"] else "full"
    return (
        f"{key['qk']} ({key['rope']} shared), {key['value_dim']} {key['dtype']} {mask} "
        f"heads {key['heads']} s_q {key['s_q']}"
    )


def variant(
    implementation: ModuleType, problem: PrefillProblem, config: Any, device: Device
) -> Variant:
    made: Variant = implementation.variant(problem, config, device)
    return made


def bytes_of(problem: PrefillProblem) -> int:
    """Bytes of the keys and values of a call."""
    rope = problem.qk_dim - problem.k_nope
    columns = problem.kv_heads * (problem.k_nope + problem.value_dim) + rope
    return problem.keys * columns * problem.dtype.itemsize


class Trial:
    """A problem with inputs where the memory is, to be run by one config after another.

    Its sequences are all alike; keys and values are slices that the L2 cannot hold together.
    """

    def __init__(
        self, implementation: ModuleType, problem: PrefillProblem, device: Device, memory: Memory
    ) -> None:
        self._implementation = implementation
        self._problem = problem
        self._device = device
        where = memory.device
        generator = torch.Generator(where).manual_seed(1)
        rope, tokens = problem.qk_dim - problem.k_nope, problem.queries

        def normal(*shape: int) -> torch.Tensor:
            values = torch.empty(shape, dtype=problem.dtype, device=where)
            return values.normal_(generator=generator)

        self._q = normal(tokens, problem.heads, problem.q_nope)
        q_rope = problem.qk_dim - problem.q_nope
        self._q_rope = normal(tokens, problem.heads, q_rope) if q_rope else None
        size = bytes_of(problem)
        copies = timing.cold_copies(size)
        values = memory.take(problem.dtype, copies * size // problem.dtype.itemsize)
        sizes = [problem.kv_heads * problem.k_nope, problem.kv_heads * problem.value_dim, rope]
        self._keys = [
            [part.view(problem.keys, -1) for part in copy.split([problem.keys * n for n in sizes])]
            for copy in values.chunk(copies)
        ]
        self._offsets = [
            torch.arange(problem.batch + 1, dtype=torch.int32, device=where) * (n // problem.batch)
            for n in (problem.queries, problem.keys)
        ]
        self._scale = problem.qk_dim**-0.5
        self._out = torch.empty(
            tokens, problem.heads, problem.value_dim, dtype=problem.dtype, device=where
        )
        self._lse = torch.empty(tokens, problem.heads, dtype=torch.float32, device=where)
        self._judge: Callable[[], Report] | None = None

    def _tensors(self, copy: int) -> PrefillTensors:
        problem = self._problem
        k, v, k_rope = self._keys[copy]
        return PrefillTensors(
            self._q,
            self._q_rope,
            k.unflatten(1, (problem.kv_heads, -1)),
            k_rope if k_rope.shape[1] else None,
            v.unflatten(1, (problem.kv_heads, -1)),
            self._offsets[0],
            self._offsets[1],
            self._out,
            self._lse,
            self._scale,
        )

    def calls(self, config: Any) -> list[Callable[[], None]]:
        """The prefill with a config, once for each copy of keys and values."""
        implementation, problem = self._implementation, self._problem
        made = variant(implementation, problem, config, self._device)
        kernel = Launcher(made, self._device, self._out.device.index)

        def call_on(tensors: PrefillTensors) -> Callable[[], None]:
            return lambda: implementation.launch(kernel, problem, config, tensors)

        return [call_on(self._tensors(copy)) for copy in range(len(self._keys))]

    def check(self, config: Any) -> Report:
        """Whether a config's result, on the first copy, is within the budget of the reference."""
        self._out.fill_(float("nan"))
        self._lse.fill_(float("nan"))
        self.calls(config)[0]()
        if self._judge is None:
            self._judge = judge_of(self._tensors(0), self._problem.causal)
        return self._judge()


def judge_of(tensors: PrefillTensors, causal: bool) -> Callable[[], Report]:
    """Holds both ends of the first and of the last sequence against the reference, in the first and
    the last KV head; whatever the result is when it is called.
    """
    # Only here, so that an ordinary import does not load what tests need.
    from mla_triton.testing import compare, prefill_budget

    inputs, rows, heads = sample_of(tensors, causal)
    budget = prefill_budget(inputs)

    def judge() -> Report:
        state = (tensors.out[rows][:, heads], tensors.lse[rows][:, heads])
        return compare(AttentionState(*state), inputs, budget)

    return judge


def sample_of(
    tensors: PrefillTensors, causal: bool
) -> tuple[PrefillInputs, torch.Tensor, torch.Tensor]:
    """(a prefill of some of the queries, which rows of q, which heads they are).

    The first queries of a sequence, over the keys up to where the last of them sees, are a sequence
    of their own under the same bottom-right mask; so are the last, over all of its keys.
    """
    from mla_triton.testing import PrefillInputs

    q, k, v = tensors.q, tensors.k, tensors.v
    bounds = [offsets.tolist() for offsets in (tensors.cu_seqlens_q, tensors.cu_seqlens_k)]
    parts = []
    for sequence in sorted({0, len(bounds[0]) - 2}):
        (q_begin, q_end), (k_begin, k_end) = (bound[sequence : sequence + 2] for bound in bounds)
        some = min(SAMPLE, q_end - q_begin)
        seen = k_end - (q_end - q_begin - some if causal else 0)
        parts.append((range(q_begin, q_begin + some), range(k_begin, max(k_begin, seen))))
        parts.append((range(q_end - some, q_end), range(k_begin, k_end)))
    group = q.shape[1] // k.shape[1]
    kv_heads = sorted({0, k.shape[1] - 1})
    heads = [head * group + place for head in kv_heads for place in range(group)]

    def places(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=q.device)

    def offsets(side: int) -> torch.Tensor:
        sizes = torch.tensor([0, *(len(part[side]) for part in parts)], device=q.device)
        return sizes.cumsum(0).to(torch.int32)

    rows, keys = (places([n for part in parts for n in part[side]]) for side in (0, 1))
    q_heads, kv = places(heads), places(kv_heads)
    inputs = PrefillInputs(
        q=q[rows][:, q_heads],
        k=k[keys][:, kv],
        v=v[keys][:, kv],
        cu_seqlens_q=offsets(0),
        cu_seqlens_k=offsets(1),
        softmax_scale=tensors.softmax_scale,
        causal=causal,
        q_rope=None if tensors.q_rope is None else tensors.q_rope[rows][:, q_heads],
        k_rope=None if tensors.k_rope is None else tensors.k_rope[keys],
    )
    return inputs, rows, q_heads
