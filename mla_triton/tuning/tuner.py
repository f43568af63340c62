"""The tuner: enumerate, prune, compile, check, time, keep.

For every point of a deployment's grid (batch, length; what else decides is in the key) all configs
of the search space are pruned by resources, compiled side by side, held against the oracle and
timed. A config replaces the one there was where it is faster by more than the noise. Rows are
stored as they come: an interrupted run keeps what is done, and the next one goes on from there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import ModuleType
from typing import Any

import torch
import triton

from mla_triton import configs, timing
from mla_triton.configs import store
from mla_triton.configs.table import Header, Point, Row, items
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant
from mla_triton.ops import decode as decoding
from mla_triton.ops import prefill as prefilling
from mla_triton.problem import DecodeProblem, PrefillProblem
from mla_triton.tuning import decode, prefill, workers
from mla_triton.tuning.deployment import Deployment, describe, resized
from mla_triton.tuning.memory import Memory
from mla_triton.tuning.progress import Progress
from mla_triton.tuning.warm import card_of, index_of
from mla_triton.tuning.workers import Compiled, Job

PROTOCOL = (
    "a CUDA graph of calls, each on its own slice of a cache (of keys and values) that the L2 "
    "cannot hold, replayed; decode: attention and merge, the schedule made before, pages scattered "
    "at random; median of event-timed replays; every request as long as the row says, N(0,1) data; "
    "each result within the error budget of the float64 reference first; another config than the "
    "one there was is taken where it was faster by more than the noise in rounds by turns"
)
TRIALS = {"decode": decode, "prefill": prefill}
"""How the problems of an operation are tried out."""
BATCHES = (1, 4, 16, 64, 256, 1024)
SHORTEST = 512
ROUNDS = 3
NOISE = 0.02
"""A gain below this is noise, however often it is seen: timings of one call differ by so much."""
ROUND_MICROSECONDS = 5_000
"""Replays of a graph for each round of a decision."""
STORE_SECONDS = 20.0
MEMORY_SHARE = 0.8
"""Of the card's memory, what the keys of a trial may take."""


@dataclass(frozen=True)
class Work:
    """One point to be tuned."""

    implementation: ModuleType
    problem: DecodeProblem | PrefillProblem
    point: Point
    heuristic: Any
    incumbent: Any
    """The config that a call gets now."""
    candidates: tuple[Any, ...]
    """Heuristic and incumbent among them."""
    pruned: tuple[tuple[Any, str], ...]
    """Configs that need not be compiled, and why."""

    @property
    def trials(self) -> Any:
        """The module that tries it out."""
        return TRIALS[self.point.op]


@dataclass(frozen=True)
class Outcome:
    """What came of a point: its row, or why there is none."""

    work: Work
    row: Row | None
    message: str = ""
    refused: tuple[tuple[Any, str], ...] = ()
    """Configs that do not compile, spill, or are wrong, and why."""

    @property
    def is_changed(self) -> bool:
        """Whether the row's config is another than the heuristic's."""
        return self.row is not None and self.row.config != items(vars(self.work.heuristic))

    @property
    def gain(self) -> float | None:
        """Time with the heuristic's config over time with the row's."""
        if self.row is None or self.row.us is None or self.row.heuristic_us is None:
            return None
        return self.row.heuristic_us / self.row.us


@dataclass
class Tuned:
    """What a run did."""

    device: str
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: int = 0
    """Points that an earlier run has done."""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    compiled: int = 0
    """Kernels, cached ones included."""
    interrupted: bool = False
    path: str = ""
    """The user's cache file, where rows were stored."""

    @property
    def gains(self) -> list[float]:
        return [outcome.gain for outcome in self.outcomes if outcome.gain is not None]

    @property
    def mean_gain(self) -> float | None:
        """Geometric mean over the rows; None without a row."""
        gains = self.gains
        return math.exp(statistics.fmean(map(math.log, gains))) if gains else None

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.row is None]


def tune(
    *,
    device: str | torch.device | Device | None = None,
    batches: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    again: bool = False,
    processes: int | None = None,
    quiet: bool = False,
    on_outcome: Callable[[Outcome], None] | None = None,
    **description: Any,
) -> Tuned:
    """Times the configs of a deployment's shapes on the GPU and keeps the best in the user's cache.

    Takes minutes; afterwards every call of these shapes gets its row. Must not run beside other
    work on the same GPU.

    Args:
        device: the GPU, by default the current one.
        batches, lengths: the grid; by default powers of four up to the deployment's largest.
            A length counts as the next power of two.
        again: also points that the user's cache has; their rows stay unless beaten.
        processes: how many compile side by side; by default one a core.
        quiet: no progress on stderr.
        on_outcome: called with each `Outcome` as it comes.
        description: the deployment, as for `mla_triton.warmup`.

    Raises:
        ValueError: an argument breaks a rule, or there is no GPU; the message names it.
        NotImplementedError: no kernel can run the deployment on the card; says why.
        mla_triton.configs.store.StoreError: the user's cache cannot be written.
    """
    if device is None and not torch.cuda.is_available():
        raise ValueError("device must be a GPU of this machine to be timed, there is none")
    card = card_of(device)
    if card.modelled or not torch.cuda.is_available():
        raise ValueError(f"device must be a GPU of this machine to be timed, got {card.label}")
    store.check_writable(card)
    work, skipped = list_work(
        device=card, batches=batches, lengths=lengths, again=again, **description
    )
    result = Tuned(card.label, skipped=skipped, path=str(store.path(card)))
    began = time.perf_counter()
    with torch.cuda.device(index_of(device)):
        try:
            _run(work, card, result, processes, quiet, on_outcome)
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            result.seconds = time.perf_counter() - began
            # Rows that are there now are for this process, too.
            configs.forget()
            decoding.forget()
            prefilling.forget()
    return result


def list_work(
    *,
    device: str | torch.device | Device | None = None,
    batches: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    again: bool = False,
    **description: Any,
) -> tuple[list[Work], int]:
    """What `tune` would do with these arguments: (the points, how many are done already).

    Needs no GPU where `device` is a capability.
    """
    deployment = describe(**description | {"queries": "split"})
    return plan_work(deployment, card_of(device), batches, lengths, again)


def plan_work(
    deployment: Deployment,
    device: Device,
    batches: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    again: bool = True,
) -> tuple[list[Work], int]:
    """(the points to be tuned, how many the user's cache has already); reads no GPU.

    Largest first within a dtype, so that memory is made once.
    """
    chosen_batches = _grid("batches", batches, deployment.max_batch, BATCHES)
    powers = [1 << n for n in range(SHORTEST.bit_length() - 1, 31, 2)]
    chosen_lengths = _grid("lengths", lengths, deployment.max_len, powers)
    chosen_lengths = sorted({configs.length_bucket(length) for length in chosen_lengths})
    stored = None if again else store.load(device)
    found: dict[Point, Work] = {}
    skipped: set[Point] = set()
    for batch in chosen_batches:
        for length in chosen_lengths:
            for op, problem in _problems(deployment, batch, length):
                work = _work(op, problem, device)
                if stored is not None and stored.at(work.point) is not None:
                    skipped.add(work.point)
                else:
                    found.setdefault(work.point, work)
    ordered = sorted(
        found.values(),
        key=lambda work: (
            work.point.op, str(work.problem.dtype), -work.trials.bytes_of(work.problem), work.point
        ),
    )  # fmt: skip
    return ordered, len(skipped)


def _problems(deployment: Deployment, batch: int, length: int) -> Iterator[tuple[str, Any]]:
    """(operation, problem) of every call of a batch of requests of a length.

    A prefill has as many query tokens as a step may have, and keys of one longest request at most,
    or of whole prompts: more of them expanded no engine has room for.
    """
    for form in deployment.forms(batch):
        yield "decode", resized(form, batch, length)
    tokens = min(length, deployment.prefill_tokens // batch)
    if tokens and batch * length <= max(deployment.prefill_tokens, deployment.max_len):
        for problem in deployment.prefills(batch, batch * tokens, batch * length):
            yield "prefill", problem


def _work(op: str, problem: Any, device: Device) -> Work:
    implementation = TRIALS[op].implementation_of(problem, device)
    tuning = implementation.tuning_point(problem, device)
    if tuning is None:
        kind = str(problem.dtype).removeprefix("torch.")
        raise ValueError(f"dtype must be float16 or bfloat16: {kind} has one config, got {kind}")
    key, batch, length = tuning
    heuristic = implementation.heuristic(problem, device)
    incumbent = configs.choose(implementation, problem, device).config
    candidates, pruned = [heuristic], []
    if incumbent != heuristic:
        candidates.append(incumbent)
    for config in implementation.search_space(problem, device):
        valid, rule = implementation.is_valid(config, problem, device)
        if not valid:
            pruned.append((config, rule))
        elif config not in candidates:
            candidates.append(config)
    point = Point(implementation.OP, implementation.NAME, key, batch, length)
    return Work(
        implementation, problem, point, heuristic, incumbent, tuple(candidates), tuple(pruned)
    )


def _grid(name: str, given: Sequence[int] | None, most: int, usual: Sequence[int]) -> list[int]:
    """The sizes to tune: those that were given, or the usual ones up to the largest, and it."""
    if given is None:
        return [*(size for size in usual if size < most), most]
    for size in given:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be positive whole numbers, got {size!r}")
    return sorted(set(given))


def _run(
    work: Sequence[Work],
    card: Device,
    result: Tuned,
    processes: int | None,
    quiet: bool,
    on_outcome: Callable[[Outcome], None] | None,
) -> None:
    compiled = _compile(work, card, result, processes, quiet)
    header = header_of(card, PROTOCOL, _commit())
    memory = Memory(torch.device("cuda", torch.cuda.current_device()))
    progress = None if quiet else Progress("timed", len(work))
    unsaved: list[Row] = []
    saved = time.monotonic()
    try:
        for done, each in enumerate(work, 1):
            outcome = _outcome(each, card, compiled, memory)
            result.outcomes.append(outcome)
            if outcome.row is not None:
                unsaved.append(outcome.row)
            if on_outcome is not None:
                on_outcome(outcome)
            if progress is not None:
                progress(done)
            if time.monotonic() - saved > STORE_SECONDS:
                saved = time.monotonic()
                store.save(card, header, unsaved)
                unsaved.clear()
    finally:
        if progress is not None:
            progress.close()
        if unsaved:
            store.save(card, header, unsaved)


def _compile(
    work: Sequence[Work], card: Device, result: Tuned, processes: int | None, quiet: bool
) -> dict[Variant, Compiled]:
    """Every variant of every candidate, once."""
    distinct = {
        each.trials.variant(each.implementation, each.problem, config, card): None
        for each in work
        for config in each.candidates
    }
    wanted = list(distinct)
    progress = None if quiet else Progress("compiled", len(wanted))
    compiled = {}
    began = time.perf_counter()
    jobs = [Job(variant, card, with_spills=True) for variant in wanted]
    try:
        for number, answer in workers.run(jobs, processes):
            compiled[wanted[number]] = answer
            if progress is not None:
                progress(len(compiled))
    finally:
        if progress is not None:
            progress.close()
    result.compile_seconds = time.perf_counter() - began
    result.compiled = len(wanted)
    return compiled


def _outcome(
    work: Work, card: Device, compiled: dict[Variant, Compiled], memory: Memory
) -> Outcome:
    problem, trials = work.problem, work.trials
    needed = trials.bytes_of(problem) * timing.cold_copies(trials.bytes_of(problem))
    available = MEMORY_SHARE * torch.cuda.get_device_properties().total_memory
    if needed > available:
        return Outcome(work, None, f"its keys take {needed} bytes, more than the card has to spare")
    refused = []
    fit = []
    for config in work.candidates:
        answer = compiled[trials.variant(work.implementation, problem, config, card)]
        reason = _why_refused(answer, card, is_given=config in (work.heuristic, work.incumbent))
        if reason is None:
            fit.append(config)
        else:
            refused.append((config, reason))
    trial = trials.Trial(work.implementation, problem, card, memory)
    right = []
    for config in fit:
        report = trial.check(config)
        if report.ok:
            right.append(config)
        else:
            refused.append((config, f"wrong: {report.message}"))
    if work.heuristic not in right:
        return Outcome(work, None, dict(refused)[work.heuristic], tuple(refused))
    row = _fastest(work, trial, right)
    return Outcome(work, row, refused=tuple(refused))


def _why_refused(answer: Compiled, card: Device, is_given: bool) -> str | None:
    if answer.error is not None:
        return f"does not compile: {answer.error}"
    if answer.shared_memory > card.shared_memory:
        needed = f"takes {answer.shared_memory} bytes of shared memory"
        return f"{needed}, {card.label} has {card.shared_memory}"
    if answer.spilled and not is_given:
        return f"spills {answer.spilled} bytes a thread"
    return None


def _fastest(work: Work, trial: Any, right: Sequence[Any]) -> Row:
    """The row of a point: the fastest config, or the one there is where none is surely faster."""
    glances = {config: timing.glance_microseconds(trial.calls(config)) for config in right}
    incumbent = work.incumbent if work.incumbent in right else work.heuristic
    best = min(glances, key=lambda config: glances[config])
    graphs = {
        config: timing.graph_of(trial.calls(config), glances[config])
        for config in (work.heuristic, incumbent, best)
    }
    rounds: dict[Any, list[float]] = {config: [] for config in graphs}
    for _ in range(ROUNDS if len(graphs) > 1 else 1):
        for config, (graph, count) in graphs.items():
            rounds[config].append(timing.replay_microseconds(graph, ROUND_MICROSECONDS) / count)
    us = {config: statistics.median(times) for config, times in rounds.items()}
    chosen = best if is_faster(rounds[best], rounds[incumbent]) else incumbent
    return Row(
        work.point,
        items(vars(chosen)),
        round(us[chosen], 2),
        round(us[work.heuristic], 2),
        "tuned",
    )


def is_faster(times: Sequence[float], others: Sequence[float]) -> bool:
    """Whether times are below others, measured in turns, by more than their noise.

    The noise is how far the ratios of the rounds lie apart, and at least `NOISE`.
    """
    ratios = [other / mine for mine, other in zip(times, others, strict=True)]
    return statistics.median(ratios) - 1 > max(NOISE, max(ratios) - min(ratios))


def header_of(card: Device, protocol: str, commit: str) -> Header:
    """The header of a table that is made now, by the versions that are here."""
    import mla_triton

    return Header(
        capability=card.label,
        gpu=card.name,
        sm_count=card.sm_count,
        mla_triton=mla_triton.__version__,
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        protocol=protocol,
        commit=commit,
    )


def _commit() -> str:
    """The commit of the checkout that this package runs from; "" for an installed one."""
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return said.stdout.strip()


def lines(result: Tuned) -> Iterator[str]:
    """The end of a run, for a reader."""
    rows = [outcome for outcome in result.outcomes if outcome.row is not None]
    changed = [outcome for outcome in rows if outcome.is_changed]
    yield (
        f"{len(rows)} rows in {result.seconds:.0f} s, of which {result.compile_seconds:.0f} s to "
        f"compile {result.compiled} kernels"
    )
    if result.skipped:
        yield f"{result.skipped} points were tuned before (--again tunes them once more)"
    if result.mean_gain is not None:
        yield (
            f"{len(changed)} differ from the heuristic; its time over the rows', geometric mean "
            f"{result.mean_gain:.3f}, least {min(result.gains):.3f}, most {max(result.gains):.3f}"
        )
    for outcome in result.failed:
        yield f"no row for {describe_point(outcome.work.point)}: {outcome.message}"
    if rows:
        yield f"stored in {result.path}"
    if result.interrupted:
        yield "interrupted: what is done is kept, the same command goes on from here"


def describe_point(point: Point) -> str:
    key = TRIALS[point.op].describe(dict(point.key))
    return f"{point.op} {point.impl} {key} batch {point.batch} length {point.length}"
