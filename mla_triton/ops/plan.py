"""Plan: the split-KV schedule of a batch, made on the device and shared by the layers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mla_triton import device as devices
from mla_triton import select, validate, validate_plan
from mla_triton.device import Device
from mla_triton.kernels.common import schedule as schedules
from mla_triton.kernels.common.launch import Launcher, Recording, Variant
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
    """What it was made for; page size, strides and causality are left open, and a cache of another
    format may be decoded with it, too."""
    geometry: Geometry | None
    """None where the reference runs, which has no schedule."""
    schedule: torch.Tensor | None
    """int32; layout in `mla_triton.kernels.common.schedule`."""
    partial_out: torch.Tensor | None
    partial_lse: torch.Tensor | None

    @property
    def key(self) -> list[int]:
        """The bound of lengths that it was made under, and what it and its decode must agree on."""
        return [self.problem.max_kv_len, *plan_key(self.problem, self.geometry)]

    def update(self, kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None) -> None:
        """Makes the schedule again for new lengths of the same batch, in place.

        No host synchronisation; inside a CUDA graph every replay reads the lengths of its time.

        Raises ValueError where the batch, or raggedness, is not the plan's.
        """
        validate_plan.plan_lengths(kv_lens, cu_seqlens_q)
        if kv_lens.shape[0] != self.problem.batch:
            rule = f"have the plan's batch of {self.problem.batch}"
            validate.fail(ValueError, "kv_lens", rule, f"{kv_lens.shape[0]} entries")
        if (cu_seqlens_q is not None) != self.problem.ragged:
            rule = "be given if, and only if, the plan was made with it"
            got = "None" if cu_seqlens_q is None else "a tensor"
            validate.fail(ValueError, "cu_seqlens_q", rule, got)
        if self.schedule is not None:
            if kv_lens.device != self.schedule.device:
                rule = f"be on the plan's device {self.schedule.device}"
                validate.fail(ValueError, "kv_lens", rule, kv_lens.device)
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
    batch_invariant: bool = False,
    cache_format: str = "16bit",
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
        batch_invariant: as in `decode`, which then has to be told the same. `max_kv_len` has to be
            given: the buffers have room for all pieces of that many keys of every request.
        cache_format: how the cache that will be decoded holds keys, which decides what fills the
            GPU: "16bit" (in q's dtype, float32 too), "fp8" (e4m3 with one scale for all latents and
            one for all rotary keys), or the name of a `mla_triton.cache.CacheFormat`. A `decode`
            over another format follows the plan, too, where it has a kernel for its tiles.
        impl: whose way of cutting, as in `decode`; by default that of the implementation which such
            a cache with pages of 64 tokens would get. A `decode` without `impl` follows either.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.
    """
    problem = validate_plan.plan(
        kv_lens, cu_seqlens_q, heads=heads, latent=latent, rope=rope, dtype=dtype, s_q=s_q,
        queries=queries, value_dim=value_dim, max_kv_len=max_kv_len, parts=parts,
        batch_invariant=batch_invariant, cache_format=cache_format, impl=impl,
    )  # fmt: skip
    parts = None if parts is None else validate.integer("parts", parts)
    # A compiler looks through what is remembered, and warns of it.
    find = cut if torch.compiler.is_compiling() else known_cut
    geometry = find(problem, devices.of(kv_lens.device), impl, parts)
    if geometry is None:
        return Plan(problem, None, None, None, None)
    made = Plan(problem, geometry, *buffers(problem, geometry, kv_lens.device))
    made.update(kv_lens, cu_seqlens_q)
    return made


def cut(
    problem: DecodeProblem, device: Device, impl: str | None, parts: int | None
) -> Geometry | None:
    """How what runs a problem cuts it; None for the reference, which does not."""
    name, _ = select.name_decode(problem, device, impl)
    if name == "reference":
        return None
    geometry: Geometry = select.CONFIGURED[name].geometry(problem, device, parts)
    return geometry


known_cut = lru_cache(maxsize=4096)(cut)


def buffers(
    problem: DecodeProblem, geometry: Geometry, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(schedule, partial out, partial lse), not yet written."""
    rows, float32 = geometry.partial_rows, torch.float32
    return (
        torch.empty(schedules.result_size(geometry), dtype=torch.int32, device=device),
        torch.empty(rows, problem.value_dim, dtype=float32, device=device),
        torch.empty(rows, dtype=float32, device=device),
    )


PROBLEM_KEY = ("batch", "s_q", "queries", "heads", "value_dim")
GEOMETRY_KEY = ("parts", "kv_tile", "row_tile", "lanes", "overhead", "max_groups", "fixed")


def plan_key(problem: DecodeProblem, geometry: Geometry | None) -> list[int]:
    """What a plan and its decode must agree on, by the names of `PROBLEM_KEY` and `GEOMETRY_KEY`.

    The reference has no geometry to agree on.
    """
    s_q = -1 if problem.s_q is None else problem.s_q
    key = [problem.batch, s_q, problem.queries, problem.heads, problem.value_dim]
    if geometry is not None:
        key += [
            geometry.parts,
            geometry.kv_tile,
            geometry.row_tile,
            geometry.lanes,
            geometry.overhead,
            geometry.max_groups,
            int(geometry.fixed),
        ]
    return key


def planned_geometry(planned: list[int]) -> Geometry | None:
    """The geometry of a plan, by its `Plan.key`; None where it was made for the reference."""
    numbers = planned[1 + len(PROBLEM_KEY) :]
    return _geometry(numbers) if numbers else None


def _geometry(numbers: list[int]) -> Geometry:
    parts, kv_tile, row_tile, lanes, overhead, max_groups, fixed = numbers
    return Geometry(kv_tile, row_tile, lanes, parts, overhead, max_groups, bool(fixed))


def check_plan(planned: list[int], needed: list[int], implementation: str) -> None:
    """Raises ValueError unless a plan, by its `Plan.key`, has the `plan_key` that a call needs."""
    made_for = planned[1:]
    if made_for == needed:
        return
    count = len(PROBLEM_KEY)
    _check_same("be made for this call's", PROBLEM_KEY, made_for, needed)
    if len(made_for) == count < len(needed):
        rule = f"be made for {implementation}, which runs this call"
        validate.fail(ValueError, "plan", rule, "one for the reference")
    rule = f"be cut as {implementation} cuts this call, by"
    _check_same(rule, GEOMETRY_KEY, made_for[count:], needed[count:])


def check_plan_device(schedule: torch.Tensor, q_nope: torch.Tensor) -> None:
    if schedule.device != q_nope.device:
        rule = f"be on q_nope's device {q_nope.device}"
        validate.fail(ValueError, "plan", rule, schedule.device)


def _check_same(rule: str, names: Sequence[str], made_for: list[int], needed: list[int]) -> None:
    differing = [
        (name, have, want)
        for name, have, want in zip(names, made_for, needed, strict=False)
        if have != want
    ]
    if differing:
        wanted = ", ".join(_text(name, want) for name, _, want in differing)
        got = ", ".join(_text(name, have) for name, have, _ in differing)
        validate.fail(ValueError, "plan", f"{rule} {wanted}", got)


def _text(name: str, number: int) -> str:
    return "ragged queries" if name == "s_q" and number < 0 else f"{name} {number}"


@lru_cache(maxsize=1024)
def launcher(variant: Variant, device: Device, index: int | None) -> Launcher:
    """Problems that differ in sizes alone share a variant, and so its machine code."""
    return Launcher(variant, device, index)


@lru_cache(maxsize=4096)
def schedule_launcher(
    batch: int,
    ragged: bool,
    kv_tile: int,
    device: Device,
    index: int | None,
    fixed: bool = False,
) -> Launcher:
    return launcher(schedules.variant(batch, ragged, kv_tile, device, fixed), device, index)


LIBRARY.define(
    "schedule(Tensor kv_lens, Tensor? cu_seqlens_q, Tensor(a!) schedule, SymInt[] key) -> ()"
)


def make_schedule(
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    schedule: torch.Tensor,
    key: list[int],
    recording: Recording | None = None,
) -> None:
    """Writes the schedule of the lengths that are on the device now; `key` as `Plan.key`."""
    max_kv_len, batch, s_q, queries, heads, _, *numbers = key
    geometry = _geometry(numbers)
    device = devices.of(kv_lens.device)
    run = schedule_launcher(
        batch, s_q < 0, geometry.kv_tile, device, kv_lens.device.index, geometry.fixed
    )
    schedules.launch(
        run if recording is None else recording.launching(run),
        geometry,
        batch,
        s_q,
        queries,
        heads,
        max_kv_len,
        kv_lens,
        cu_seqlens_q,
        schedule,
    )


def _schedule_fake(
    kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, schedule: torch.Tensor, key: list[int]
) -> None:
    return None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("schedule", make_schedule, _key)
torch.library.register_fake("mla_triton::schedule", _schedule_fake, lib=LIBRARY)
