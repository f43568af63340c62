"""Warm-up: every kernel that a deployment can meet, compiled before it serves.

Which kernels those are follows from the same steps that a call goes: problem, selection, config,
variant. Lengths, batches and split counts change no machine code but through the config that is
looked up for them, so all batches and all length buckets are looked up. Nothing is launched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from mla_triton import configs, select
from mla_triton import device as devices
from mla_triton.device import Device
from mla_triton.kernels.common import combine, schedule
from mla_triton.kernels.common.launch import Launcher, Variant
from mla_triton.kernels.portable import append, copy_pages, gather
from mla_triton.ops.plan import cut
from mla_triton.plan import Geometry
from mla_triton.problem import LARGEST_TILE, DecodeProblem
from mla_triton.tuning import cache_calls, workers
from mla_triton.tuning.deployment import Deployment, describe, resized
from mla_triton.tuning.workers import Compiled, Job

SIZES = (
    "FIRST", "REST", "VALUE", "HALF", "TAIL", "Q_NOPE", "K_NOPE", "PAGE_SIZE", "KV_TILE",
    "ROW_TILE", "BLOCK_M", "BLOCK_N", "BLOCKS", "BLOCK_B", "NOPE_STEP", "ROPE_STEP", "OUT_STEP",
    "PIECES", "LEVELS", "OTHERS", "ROWS", "CHUNKS", "SLOTS", "LATENT", "ROPE", "GROUP", "SIZES",
    "SCALING", "ROTATION", "LATENTS_STEP", "KEYS_STEP",
)  # fmt: skip
SWITCHES = (
    "FUSED",
    "CSR",
    "RAGGED",
    "CAUSAL",
    "GATHER",
    "FULL_TILES",
    "ALONE",
    "MASKED",
    "NORM",
    "STARTS",
    "FIXED",
)
"""Constants that kernels of one deployment differ in."""


LISTING = "__grp__"
"""How the name of Triton's list of a kernel's files begins."""


@dataclass(frozen=True)
class Warmed:
    """What a warm-up found and did."""

    device: str
    """Label of the card that was compiled for."""
    kernels: int
    compiled: int
    """Those that were not in Triton's cache; they are now, unless only asked."""
    seconds: float
    size: int
    """Bytes of all kernels in Triton's cache."""
    directory: str
    """Triton's cache."""
    launchers: int
    """Kernels that were put on the GPU in this machine, so that what Triton builds to launch them
    is built too; 0 where the card is another."""
    missing: tuple[str, ...]
    """What is still not compiled: the kernels asked for, or those that do not compile, and why."""


def warmup(
    *,
    device: str | torch.device | Device | None = None,
    check: bool = False,
    processes: int | None = None,
    cache: str | Path | None = None,
    installed_at: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **description: Any,
) -> Warmed:
    """Compiles every kernel that a deployment can meet into Triton's cache, launching none.

    Args:
        device: a GPU of this machine, a capability such as "8.9" for a card that need not be here,
            or None for the current GPU.
        check: only ask what would still have to be compiled.
        processes: how many compile side by side; by default one a core.
        cache: the directory of Triton's cache; by default Triton's own.
        installed_at: where that directory will lie on the machine that serves, if it is to be
            copied: Triton keeps whole paths in it. It is of no use where it is now, then.
        progress: called with (done, all) after each kernel.
        description: the deployment, as `mla-triton warmup --help` lists it: `model` or `from_model`
            with `tp`, or `heads`, `latent`, `rope`, `value_dim`; `max_batch`, `max_len`, `s_q`,
            `dtype`, `page_size`, `layout`, `table`, `queries`, `ragged`, `causal`,
            `prefill_tokens`, `append`, `batch_invariant`. One value or several where several make
            sense.

    Raises:
        ValueError: an argument breaks a rule; the message names it.
        NotImplementedError: no kernel can run the deployment on the card; says why.
    """
    if installed_at is not None and (cache is None or check):
        rule = "be left out without cache, and with check"
        raise ValueError(f"installed_at must {rule}, got {str(installed_at)!r}")
    card = card_of(device)
    wanted = variants(describe(**description), card)
    began = time.perf_counter()
    jobs = [Job(variant, card, only_ask=check) for variant in wanted]
    answers: dict[int, Compiled] = {}
    # Relative ones would be kept in it as they are, and be of use in this directory alone.
    directory = Path(triton.knobs.cache.dir if cache is None else cache).absolute()
    for number, answer in workers.run(jobs, processes, directory):
        answers[number] = answer
        if progress is not None:
            progress(len(answers), len(jobs))
    missing = tuple(
        f"{name_of(wanted[number])}: {answer.error or 'not compiled'}"
        for number, answer in sorted(answers.items())
        if answer.error is not None or (check and not answer.cached)
    )
    # Another directory is not the one that this process would load from.
    here = not card.modelled and card.backend in ("cuda", "hip") and cache is None
    loaded = 0
    if here and not check and not missing:
        with torch.cuda.device(index_of(device)):
            loaded = _load(wanted, card)
    if installed_at is not None:
        relocate(directory, Path(installed_at).absolute())
    return Warmed(
        device=card.label,
        kernels=len(wanted),
        compiled=sum(not (answer.cached or answer.error) for answer in answers.values()),
        seconds=time.perf_counter() - began,
        size=sum(answer.size for answer in answers.values()),
        directory=str(directory),
        launchers=loaded,
        missing=missing,
    )


def relocate(directory: Path, destination: Path) -> None:
    """Makes a directory of Triton's cache one that will be at another place.

    Triton lists a kernel's files by their whole paths, in a file of its own for each kernel.
    """
    for listing in sorted(directory.glob(f"*/{LISTING}*")):
        plain = json.loads(listing.read_text(encoding="utf-8"))
        plain["child_paths"] = {
            name: str(destination / listing.parent.name / name) for name in plain["child_paths"]
        }
        new = listing.with_name(f"{listing.name}.new")
        new.write_text(json.dumps(plain), encoding="utf-8")
        new.replace(listing)


def card_of(device: str | torch.device | Device | None) -> Device:
    """The card that is meant; ValueError for one that compiles nothing."""
    if isinstance(device, Device):
        card = device
    elif isinstance(device, str) and not device.startswith(("cuda", "hip")):
        card = devices.from_label(device)
    else:
        card = devices.current() if device is None else devices.of(torch.device(device))
    if card.backend not in ("cuda", "hip"):
        got = "none here" if device is None else repr(device)
        raise ValueError(
            f"device must be a GPU, or a capability such as '9.0' where there is none, got {got}"
        )
    return card


def index_of(device: str | torch.device | Device | None) -> int | None:
    """The number of the GPU here that is meant; None for the current one."""
    return None if device is None or isinstance(device, Device) else torch.device(device).index


def variants(deployment: Deployment, device: Device) -> list[Variant]:
    """Every kernel that the deployment's calls can launch, each once."""
    found: dict[Variant, None] = {}
    # In a batch of one, rows may lie in a way that those of a larger batch cannot.
    for batch in sorted({1, min(2, deployment.max_batch)}):
        for form in deployment.forms(batch):
            # A single query token may be that of one request among several that have none.
            alone = form.ragged and form.queries == 1
            last = deployment.max_batch if batch > 1 or alone else 1
            sizes = range(batch, last + 1)
            for variant in _variants(form, sizes, deployment.lengths(form), device):
                found[variant] = None
    found |= dict.fromkeys(_prefill_variants(deployment, device))
    for merge in deployment.merges():
        module = select.choose_merge(merge, device).module
        config = configs.choose(module, merge, device).config
        found[module.variant(merge, config, device)] = None
    found |= dict.fromkeys(_cache_variants(deployment, device))
    return list(found)


def _cache_variants(deployment: Deployment, device: Device) -> Iterator[Variant]:
    """The kernels of appends, gathers and copies of pages that the card can run."""
    for module, problems in (
        (append, cache_calls.appends(deployment)),
        (gather, cache_calls.gathers(deployment)),
        (copy_pages, cache_calls.copies(deployment)),
    ):
        for problem in problems:
            # What decodes a cache may be called without these.
            if module.why_not(problem, device) is None:
                config = configs.choose(module, problem, device).config
                yield module.variant(problem, config, device)


def _variants(
    form: DecodeProblem, batches: Sequence[int], lengths: Sequence[int], device: Device
) -> Iterator[Variant]:
    seen = set()
    for batch in batches:
        longest = resized(form, batch, lengths[-1])
        for implementation, geometry in _ways(longest, device):
            yield schedule.variant(batch, form.ragged, geometry.kv_tile, device, geometry.fixed)
            for length in lengths:
                problem = resized(form, batch, length)
                row_tile = geometry.row_tile
                config = configs.choose(implementation, problem, device, row_tile).config
                choice = (implementation, config, geometry.kv_tile, row_tile)
                if choice not in seen:
                    seen.add(choice)
                    yield implementation.variant(problem, config, geometry, device)
            yield combine.variant(longest, combine.heuristic(longest, geometry, device), device)


def _prefill_variants(deployment: Deployment, device: Device) -> Iterator[Variant]:
    """The kernels of prefills, however long their sequences are, and of however many."""
    batches = range(1, min(deployment.max_batch, deployment.prefill_tokens) + 1)
    longest = configs.length_bucket(deployment.max_len)
    seen = set()
    for form in deployment.prefills(1, 1, 1):
        for usual in powers_of_two(LARGEST_TILE):
            for batch in batches:
                for length in powers_of_two(longest):
                    problem = replace(
                        form, batch=batch, queries=batch * usual, keys=batch * length,
                        usual_queries=LARGEST_TILE if form.batch_invariant else usual,
                    )  # fmt: skip
                    implementation = select.choose_prefill(problem, device).module
                    config = configs.choose(implementation, problem, device).config
                    if (implementation, form, config) not in seen:
                        seen.add((implementation, form, config))
                        yield implementation.variant(problem, config, device)


def powers_of_two(most: int) -> list[int]:
    """Ascending, up to the power of two `most`."""
    return [1 << n for n in range(most.bit_length())]


def _ways(problem: DecodeProblem, device: Device) -> Iterator[tuple[ModuleType, Geometry]]:
    """(implementation, geometry) of a call that makes its own schedule, and of one with a plan.

    The plan is told the format of the cache. They differ where the cache is one that the plan's
    implementation does not take.
    """
    own = select.choose_decode(problem, device).module
    geometry = own.geometry(problem, device)
    yield own, geometry
    like = cut(problem.as_planned(), device, None, None)
    if like is not None and like != geometry:
        follower = select.choose_decode(problem, device, None, like).module
        yield follower, follower.geometry(problem, device, like=like)


def name_of(variant: Variant) -> str:
    """A variant in a line: the kernel, and what tells it from others of the same deployment."""
    constants = dict(variant.constants)
    said = [f"{name.lower()} {constants[name]}" for name in SIZES if name in constants]
    said += [name.lower() for name in SWITCHES if constants.get(name)]
    if constants.get("ROTATION", "none") != "none":
        said += [f"angles {dict(variant.types)['cos_sin'].removeprefix('*')}"]
    kinds = {kind.removeprefix("*") for _, kind in variant.types}
    said += [next(kind for kind in ("fp16", "bf16", "fp32", "i32") if kind in kinds)]
    said += [f"{variant.num_warps} warps", f"{variant.num_stages} stages"]
    return f"{variant.function.__name__}({', '.join(said)})"


def _load(wanted: Sequence[Variant], device: Device) -> int:
    """Puts one kernel of each signature on the current GPU: Triton then builds its launcher."""
    by_types = {(variant.function, variant.types): variant for variant in wanted}
    for variant in by_types.values():
        Launcher(variant, device, torch.cuda.current_device()).load()
    return len(by_types)
