"""Plan: the split-KV schedule of a batch, made on the device and shared by the layers of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from mla_triton import device as devices
from mla_triton import select, validate
from mla_triton.device import Device
from mla_triton.kernels.common import schedule as schedules
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops.library import LIBRARY
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem


@dataclass(frozen=True)
class Plan:
    """A schedule and the buffers for partial results, for one stream of calls.

    Every `decode` of the same lengths and head counts may use it, layer after layer. Calls that
    share a plan must be on one stream: they share its buffers.
    """

    problem: DecodeProblem
    """What it was made for; page size, strides and causality are left open."""
    geometry: Geometry | None
    """None where the reference runs, which has no schedule."""
    schedule: torch.Tensor | None
    """int32; layout in `mla_triton.kernels.common.schedule`."""
    partial_out: torch.Tensor | None
    partial_lse: torch.Tensor | None

    @property
    def key(self) -> list[int] | None:
        if self.geometry is None:
            return None
        return plan_key(self.problem, self.geometry)

    def update(self, kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None) -> None:
        """Makes the schedule again for new lengths of the same batch, in place.

        No host synchronisation; inside a CUDA graph every replay reads the lengths of its time.

        Raises ValueError where the batch, or raggedness, is not the plan's.
        """
        check_lengths(kv_lens, cu_seqlens_q)
        if kv_lens.shape[0] != self.problem.batch:
            rule = f"have the plan's batch of {self.problem.batch}"
            validate.fail(ValueError, "kv_lens", rule, f"{kv_lens.shape[0]} entries")
        if (cu_seqlens_q is None) == self.problem.ragged:
            rule = "be given if, and only if, the plan has it"
            validate.fail(ValueError, "cu_seqlens_q", rule, cu_seqlens_q)
        if self.schedule is not None:
            assert self.key is not None
            torch.ops.mla_triton.schedule(kv_lens, cu_seqlens_q, self.schedule, self.key)


def plan(
    kv_lens: torch.Tensor,
    *,
    heads: int,
    latent: int = 512,
    rope: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    s_q: int = 1,
    cu_seqlens_q: torch.Tensor | None = None,
    queries: int | None = None,
    value_dim: int | None = None,
    max_kv_len: int | None = None,
    parts: int | None = None,
    impl: str | None = None,
) -> Plan:
    """Makes the schedule of a batch on its device: no host synchronisation, capturable.

    `decode` makes one for itself where it gets none; a plan saves that for all layers but the
    first.

    Args:
        kv_lens: int32 `[batch]`, keys of each request.
        heads, latent, rope, dtype, value_dim: of the queries that will be decoded.
        s_q: query tokens of each request, where `cu_seqlens_q` is not given.
        cu_seqlens_q: int32 `[batch + 1]` for ragged queries, with `queries`, their total number.
        max_kv_len: upper bound of `kv_lens`; longer ones are cut there.
        parts: parts to cut the batch into; by default what fills the GPU.
        impl: as in `decode`.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.
    """
    check_lengths(kv_lens, cu_seqlens_q)
    sizes = {"heads": heads, "latent": latent, "s_q": s_q}
    sizes |= {name: n for name, n in (("parts", parts),) if n is not None}
    for name, number in sizes.items():
        if number < 1:
            validate.fail(ValueError, name, "be 1 or more", number)
    if rope < 0:
        validate.fail(ValueError, "rope", "be 0 or more", rope)
    if dtype not in validate.DTYPES:
        validate.fail(TypeError, "dtype", "be float16, bfloat16 or float32", dtype)
    if (queries is None) != (cu_seqlens_q is None):
        validate.fail(ValueError, "queries", "be given together with cu_seqlens_q", queries)
    value = latent if value_dim is None else value_dim
    if value not in (latent, latent + rope):
        rule = f"be latent {latent} or, with the rope part inside, {latent + rope}"
        validate.fail(ValueError, "value_dim", rule, value)
    if max_kv_len is not None and max_kv_len < 0:
        validate.fail(ValueError, "max_kv_len", "be 0 or more", max_kv_len)

    batch = kv_lens.shape[0]
    problem = DecodeProblem(
        dtype=dtype,
        batch=batch,
        s_q=s_q if cu_seqlens_q is None else None,
        queries=batch * s_q if queries is None else queries,
        heads=heads,
        latent=latent,
        rope=rope,
        value_dim=value,
        page_size=1,
        csr=False,
        causal=False,
        fused=True,
        ckv_stride_slot=latent + rope,
        kpe_stride_slot=0,
        max_kv_len=validate.INT32_MAX if max_kv_len is None else max_kv_len,
    )
    device = devices.of(kv_lens.device)
    chosen = select.decode(problem, device, impl)
    if chosen.name == "reference":
        return Plan(problem, None, None, None, None)
    geometry = chosen.module.geometry(problem, device, parts)
    made = Plan(problem, geometry, *buffers(problem, geometry, kv_lens.device))
    made.update(kv_lens, cu_seqlens_q)
    return made


def check_lengths(kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> None:
    validate.check_tensor("kv_lens", kv_lens)
    if kv_lens.dtype != torch.int32:
        validate.fail(TypeError, "kv_lens", "be int32", kv_lens.dtype)
    if kv_lens.dim() != 1 or not kv_lens.is_contiguous():
        layout = validate.layout(kv_lens)
        validate.fail(ValueError, "kv_lens", "be contiguous [batch]", layout)
    if cu_seqlens_q is None:
        return
    validate.check_tensor("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_q.dtype != torch.int32:
        validate.fail(TypeError, "cu_seqlens_q", "be int32", cu_seqlens_q.dtype)
    if cu_seqlens_q.shape != (kv_lens.shape[0] + 1,) or not cu_seqlens_q.is_contiguous():
        rule = f"be contiguous [batch + 1] = [{kv_lens.shape[0] + 1}]"
        validate.fail(ValueError, "cu_seqlens_q", rule, validate.layout(cu_seqlens_q))
    if cu_seqlens_q.device != kv_lens.device:
        rule = f"be on kv_lens's device {kv_lens.device}"
        validate.fail(ValueError, "cu_seqlens_q", rule, cu_seqlens_q.device)


def buffers(
    problem: DecodeProblem, geometry: Geometry, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(schedule, partial out, partial lse), not yet written."""
    return (
        torch.empty(schedules.result_size(geometry), dtype=torch.int32, device=device),
        torch.empty(geometry.partial_rows, problem.value_dim, device=device),
        torch.empty(geometry.partial_rows, device=device),
    )


PLAN_KEY = (
    "max_kv_len",
    "parts",
    "batch",
    "s_q",
    "queries",
    "heads",
    "value_dim",
    "kv_tile",
    "row_tile",
    "lanes",
    "overhead",
    "max_groups",
)


def plan_key(problem: DecodeProblem, geometry: Geometry) -> list[int]:
    """All that a plan and its decode must agree on: the values of `PLAN_KEY`."""
    return [
        problem.max_kv_len,
        geometry.parts,
        problem.batch,
        -1 if problem.s_q is None else problem.s_q,
        problem.queries,
        problem.heads,
        problem.value_dim,
        geometry.kv_tile,
        geometry.row_tile,
        geometry.lanes,
        geometry.overhead,
        geometry.max_groups,
    ]


@lru_cache(maxsize=1024)
def launcher(batch: int, ragged: bool, kv_tile: int, device: Device, index: int | None) -> Launcher:
    return Launcher(schedules.variant(batch, ragged, kv_tile), device, index)


LIBRARY.define(
    "schedule(Tensor kv_lens, Tensor? cu_seqlens_q, Tensor(a!) schedule, int[] key) -> ()"
)


def _schedule(
    kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, schedule: torch.Tensor, key: list[int]
) -> None:
    max_kv_len, parts, batch, s_q, queries, heads, _, kv_tile, row_tile, lanes, overhead, groups = (
        key
    )
    geometry = Geometry(kv_tile, row_tile, lanes, parts, overhead, groups)
    run = launcher(batch, s_q < 0, kv_tile, devices.of(kv_lens.device), kv_lens.device.index)
    schedules.launch(
        run, geometry, batch, s_q, queries, heads, max_kv_len, kv_lens, cu_seqlens_q, schedule
    )


def _schedule_fake(
    kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, schedule: torch.Tensor, key: list[int]
) -> None:
    return None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("schedule", _schedule, _key)
torch.library.register_fake("mla_triton::schedule", _schedule_fake, lib=LIBRARY)
