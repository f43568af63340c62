"""How a decode is tried out: inputs on the GPU, one call with a given config, and its judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mla_triton import select, timing
from mla_triton.cache import LatentCache, named
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.common.tensors import DecodeTensors
from mla_triton.ops import decode as operation
from mla_triton.ops.plan import buffers, make_schedule, plan_key
from mla_triton.problem import DecodeProblem
from mla_triton.state import AttentionState
from mla_triton.tuning.memory import Memory

if TYPE_CHECKING:
    from mla_triton.testing import Report


def implementation_of(problem: DecodeProblem, device: Device) -> ModuleType:
    """The kernel that a decode runs by."""
    return select.choose_decode(problem, device).module


def describe(key: Mapping[str, Any]) -> str:
    """The key of a row, for a reader."""
    over = "" if key["format"] == "16bit" else f" over {key['format']}"
    return (
        f"{key['latent']}+{key['rope']} {key['dtype']}{over} heads {key['heads']} s_q {key['s_q']} "
        f"page {key['page_size']} rows {key['row_tile']}"
    )


def variant(
    implementation: ModuleType, problem: DecodeProblem, config: Any, device: Device
) -> Variant:
    geometry = implementation.geometry(problem, device)
    made: Variant = implementation.variant(problem, config, geometry, device)
    return made


def bytes_of(problem: DecodeProblem) -> int:
    """Bytes of the keys of a call whose requests are all of the longest length."""
    pages = problem.batch * -(-problem.max_kv_len // problem.page_size)
    if problem.storage is not None:
        return pages * named.page_bytes(named.name_of(problem), problem.page_size, problem.key_dim)
    return pages * problem.page_size * problem.key_dim * problem.dtype.itemsize


def _caches(
    problem: DecodeProblem, copies: int, size: int, memory: Memory, generator: torch.Generator
) -> list[LatentCache]:
    """So many caches of `size` bytes with N(0,1) keys, as the problem's is stored."""
    page_size, columns = problem.page_size, problem.key_dim
    if problem.storage is None:
        values = memory.take(problem.dtype, copies * size // problem.dtype.itemsize)
        return [LatentCache(each) for each in values.view(copies, -1, page_size, columns)]
    name = named.name_of(problem)
    raw = memory.take(torch.uint8, copies * size)
    pages = raw.view(copies, -1, named.page_bytes(name, page_size, columns))
    named.fill(name, pages.flatten(0, 1), page_size, columns, generator)
    return [named.parts(name, each, page_size) for each in pages]


class Trial:
    """A problem with inputs on the current GPU, to be run by one config after another."""

    def __init__(
        self, implementation: ModuleType, problem: DecodeProblem, device: Device, memory: Memory
    ) -> None:
        self._implementation = implementation
        self._problem = problem
        self._device = device
        self._index = torch.cuda.current_device()
        where = torch.device("cuda", self._index)
        generator = torch.Generator(where).manual_seed(1)
        batch, s_q, heads = problem.batch, problem.mean_s_q, problem.heads

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=problem.dtype, device=where).normal_(
                generator=generator
            )

        self._q_nope = normal(batch, s_q, heads, problem.latent)
        self._q_rope = normal(batch, s_q, heads, problem.rope) if problem.rope else None
        size = bytes_of(problem)
        copies = timing.cold_copies(size)
        self._caches = _caches(problem, copies, size, memory, generator)
        pages = self._caches[0].ckv.shape[0]
        order = torch.randperm(pages, generator=generator, device=where, dtype=torch.int32)
        self._page_table = order.view(batch, -1)
        self._kv_lens = torch.full((batch,), problem.max_kv_len, dtype=torch.int32, device=where)
        self._scale = (problem.latent / 4 + problem.rope) ** -0.5
        self._problem = replace(problem, num_pages=pages)
        self._own = self._planned(where)
        self._out = torch.empty(
            batch, s_q, heads, problem.value_dim, dtype=problem.dtype, device=where
        )
        self._lse = torch.empty(batch, s_q, heads, dtype=torch.float32, device=where)
        self._judge: Callable[[], Report] | None = None

    def calls(self, config: Any) -> list[Callable[[], None]]:
        """The decode with a config, once for each slice of the cache."""
        ready = operation.prepare_with(
            config,
            self._implementation,
            self._problem,
            self._device,
            self._index,
            self._implementation.geometry(self._problem, self._device),
        )

        def call_on(cache: LatentCache) -> Callable[[], None]:
            tensors = DecodeTensors(
                self._q_nope, self._q_rope, *cache, self._page_table, None,
                self._kv_lens, None, self._own[0], self._problem.max_kv_len, self._own[1],
                self._own[2], self._out, self._lse, self._scale,
            )  # fmt: skip
            return lambda: operation.launch(
                ready, self._implementation, self._problem, tensors, lambda launcher: launcher
            )

        return [call_on(cache) for cache in self._caches]

    def check(self, config: Any) -> Report:
        """Whether a config's result, on the first slice, is within the budget of the reference."""
        self._out.fill_(float("nan"))
        self._lse.fill_(float("nan"))
        self.calls(config)[0]()
        if self._judge is None:
            self._judge = self._make_judge()
        return self._judge()

    def _planned(self, where: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        geometry = self._implementation.geometry(self._problem, self._device)
        own = buffers(self._problem, geometry, where)
        key = [self._problem.max_kv_len, *plan_key(self._problem, geometry)]
        make_schedule(self._kv_lens, None, own[0], key)
        return own

    def _make_judge(self) -> Callable[[], Report]:
        """Looks at the first and the last request: the oracle of all would take the time of all."""
        # Only here, so that an ordinary import does not load what tests need.
        from mla_triton.testing import DecodeInputs, compare, decode_budget

        first = self._caches[0]
        rows = torch.tensor(sorted({0, self._problem.batch - 1}), device=self._kv_lens.device)
        sample = DecodeInputs(
            q_nope=self._q_nope[rows],
            q_rope=None if self._q_rope is None else self._q_rope[rows],
            cache=first.ckv if first.scales is None else first,
            page_table=self._page_table[rows],
            kv_lens=self._kv_lens[rows],
            softmax_scale=self._scale,
            causal=self._problem.causal,
            value_dim=self._problem.value_dim,
        )
        budget = decode_budget(sample)
        return lambda: compare(AttentionState(self._out[rows], self._lse[rows]), sample, budget)
