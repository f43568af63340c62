"""The tuner on a card that is not there: compiler, judge and clock are made up, the rest is real.

The fakes say of each config whether it compiles, whether it is right and how fast it is. What the
tuner makes of that is found in the user's cache, as a call finds it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tables
import torch
from tables import CARD

from mla_triton import cli, configs, timing
from mla_triton.configs import shipped, store
from mla_triton.configs.table import items, loads
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.portable import decode as portable
from mla_triton.problem import DecodeProblem
from mla_triton.tuning import tuner
from mla_triton.tuning.deployment import describe, resized
from mla_triton.tuning.tuner import Outcome, Tuned, is_faster, tune
from mla_triton.tuning.workers import Compiled, Job

Config = portable.Config
FAST = Config(32, 8, 4)
"""In the search space of `SMALL`, and not the heuristic's choice."""
SMALL: dict[str, Any] = {"heads": 16, "max_batch": 4, "max_len": 2048, "quiet": True}
POINTS = 4
"""Batches 1 and 4, lengths 512 and 2048."""
TOTAL_MEMORY = 1 << 40
KEEPS = {"seconds": 0.0, "size": 1, "shared_memory": 1}


@dataclass
class Card:
    """What the made-up GPU says of a config, and what was asked of it."""

    microseconds: Callable[[Config, DecodeProblem], float]
    compiler: dict[Config, Compiled] = field(default_factory=dict)
    """Answers that are not plain success."""
    wrong: set[Config] = field(default_factory=set)
    noise: Callable[[], float] = lambda: 1.0
    """Factor of the next timing."""
    compiled: list[Variant] = field(default_factory=list)
    checked: list[tuple[Config, int, int]] = field(default_factory=list)
    timed: list[Config] = field(default_factory=list)

    def run(
        self, jobs: Sequence[Job], processes: int | None = None, cache: Path | None = None
    ) -> Iterator[tuple[int, Compiled]]:
        """As `workers.run`, the last job first."""
        for number, job in reversed(list(enumerate(jobs))):
            assert job.with_spills
            self.compiled.append(job.variant)
            constants = dict(job.variant.constants)
            config = Config(constants["BLOCK_N"], job.variant.num_warps, job.variant.num_stages)
            yield number, self.compiler.get(config, Compiled(cached=False, **KEEPS))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    """Without a shipped table. All configs but `FAST` take twice its time, whatever the problem."""
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "nearest", lambda device: None)
    configs.forget()
    made = Card(lambda config, problem: 10.0 if config == FAST else 20.0)

    class Trial:
        def __init__(
            self, implementation: Any, problem: DecodeProblem, device: Device, memory: Any
        ) -> None:
            assert device is CARD
            self.problem = problem

        def calls(self, config: Config) -> list[Any]:
            return [(config, self.problem)] * 3

        def check(self, config: Config) -> Any:
            made.checked.append((config, self.problem.batch, self.problem.max_kv_len))
            return SimpleNamespace(ok=config not in made.wrong, message="off by a mile")

    def microseconds(call: tuple[Config, DecodeProblem]) -> float:
        config, problem = call
        assert config not in made.wrong, "what is wrong is never timed"
        made.timed.append(config)
        return made.microseconds(config, problem) * made.noise()

    monkeypatch.setattr(tuner.workers, "run", made.run)
    monkeypatch.setattr(tuner.decode, "Trial", Trial)
    monkeypatch.setattr(tuner, "Memory", lambda device: None)
    monkeypatch.setattr(timing, "glance_microseconds", lambda calls: microseconds(calls[0]))
    monkeypatch.setattr(timing, "graph_of", lambda calls, each: ((calls[0], 7), 7))
    monkeypatch.setattr(
        timing, "replay_microseconds", lambda graph, burst: microseconds(graph[0]) * graph[1]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    properties = SimpleNamespace(total_memory=TOTAL_MEMORY)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    yield made
    configs.forget()


def run(**changes: Any) -> Tuned:
    return tune(device=CARD, **SMALL | changes)


def rows() -> list[Any]:
    """What is stored, sorted."""
    file = store.path(CARD)
    return sorted(loads(file.read_text()).rows, key=lambda row: row.order) if file.exists() else []


def description(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name != "quiet"} | changes


def problem(batch: int, length: int) -> DecodeProblem:
    """A call of `SMALL`."""
    form = next(describe(**description(queries="split")).forms(batch))
    return resized(form, batch, length)


def heuristic(batch: int) -> Config:
    return portable.heuristic(problem(batch, 2048), CARD)


# -- the fastest right config


def test_the_fastest_config_is_stored_and_found(card):
    tuned = run()
    assert len(tuned.outcomes) == len(rows()) == POINTS
    assert tuned.failed == []
    assert not tuned.interrupted
    assert tuned.path == str(store.path(CARD))
    for row in rows():
        assert row.config == items(vars(FAST))
        assert (row.us, row.heuristic_us, row.source) == (10.0, 20.0, "tuned")
    assert {(row.point.batch, row.point.length) for row in rows()} == {
        (1, 512), (1, 2048), (4, 512), (4, 2048),
    }  # fmt: skip
    # This process looks them up, too: what it had read before is forgotten.
    choice = configs.choose(portable, problem(4, 2048), CARD)
    assert (choice.config, choice.source) == (FAST, "user")
    assert choice.row in rows()
    assert str(store.path(CARD)) in choice.reason


def test_each_point_has_its_own_fastest(card):
    other = Config(16, 4, 4)
    card.microseconds = lambda config, problem: (
        10.0 if config == (FAST if problem.batch == 1 else other) else 20.0
    )
    run()
    assert {row.point.batch: row.config for row in rows()} == {
        1: items(vars(FAST)),
        4: items(vars(other)),
    }


def test_the_header_says_where_rows_are_from(card):
    run()
    header = loads(store.path(CARD).read_text()).header
    assert store.why_not(header, CARD) is None
    assert (header.gpu, header.sm_count, header.torch) == (CARD.name, 132, torch.__version__)
    assert header.protocol == tuner.PROTOCOL
    assert header.date[:2] == "20"


def test_what_a_run_says(card):
    card.microseconds = lambda config, problem: (
        (10.0 if problem.batch == 1 else 5.0) if config == FAST else 20.0
    )
    came: list[Outcome] = []
    tuned = run(on_outcome=came.append)
    assert came == tuned.outcomes
    assert sorted(tuned.gains) == [2.0, 2.0, 4.0, 4.0]
    assert tuned.mean_gain == pytest.approx(8**0.5)
    assert all(outcome.is_changed for outcome in came)
    assert tuned.compiled == len(card.compiled) == len(set(card.compiled))
    first, second, third = tuner.lines(tuned)
    assert first.startswith("4 rows in ")
    assert first.endswith(f"compile {tuned.compiled} kernels")
    assert second == (
        "4 differ from the heuristic; its time over the rows', geometric mean 2.828, least 2.000, "
        "most 4.000"
    )
    assert third == f"stored in {store.path(CARD)}"


def test_progress_is_said_unless_it_is_quiet(card, capsys):
    run(batches=[1], lengths=[512])
    assert capsys.readouterr() == ("", "")
    run(batches=[1], lengths=[512], quiet=False, again=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "compiled: " in err
    assert "timed: 1 of 1, " in err


def test_nothing_is_better_than_the_heuristic(card):
    card.microseconds = lambda config, problem: 10.0
    tuned = run()
    assert {row.config for row in rows()} == {items(vars(heuristic(b))) for b in (1, 4)}
    assert tuned.mean_gain == 1.0
    assert not any(outcome.is_changed for outcome in tuned.outcomes)


# -- what is refused


def test_a_wrong_config_is_never_chosen(card):
    card.wrong = {FAST}
    tuned = run()
    assert FAST not in card.timed
    assert all(row.config != items(vars(FAST)) for row in rows())
    assert [outcome.refused for outcome in tuned.outcomes] == [
        ((FAST, "wrong: off by a mile"),)
    ] * POINTS
    assert {config for config, *_ in card.checked} >= {FAST, heuristic(1)}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            Compiled(cached=False, seconds=0.0, error="CompilationError: no"),
            "does not compile: CompilationError: no",
        ),
        (
            Compiled(cached=False, seconds=0.0, size=1, shared_memory=300_000),
            f"takes 300000 bytes of shared memory, 9.0 has {CARD.shared_memory}",
        ),
        (
            Compiled(cached=False, seconds=0.0, size=1, shared_memory=1, spilled=8),
            "spills 8 bytes a thread",
        ),
    ],
    ids=["error", "shared memory", "spills"],
)
def test_what_the_compiler_says_against_a_config(card, answer, reason):
    card.compiler = {FAST: answer}
    tuned = run()
    assert FAST not in {config for config, *_ in card.checked}
    assert [outcome.refused for outcome in tuned.outcomes] == [((FAST, reason),)] * POINTS
    assert all(row.config != items(vars(FAST)) for row in rows())


def test_the_heuristic_may_spill(card):
    """It is what a call gets without a row, so it is timed whatever it is like."""
    card.microseconds = lambda config, problem: 10.0
    spills = Compiled(cached=False, seconds=0.0, size=1, shared_memory=1, spilled=8)
    card.compiler = {heuristic(1): spills, heuristic(4): spills}
    assert run().failed == []
    assert {row.config for row in rows()} == {items(vars(heuristic(b))) for b in (1, 4)}


def test_without_a_right_heuristic_there_is_no_row(card, capsys):
    """Something is broken then that a faster config must not hide."""
    card.wrong = {heuristic(1)}
    tuned = run(batches=[1])
    assert rows() == []
    assert [outcome.message for outcome in tuned.failed] == ["wrong: off by a mile"] * 2
    assert tuned.mean_gain is None
    *_, one, other = tuner.lines(tuned)
    assert one.startswith("no row for decode portable 512+64 bfloat16 heads 16 ")
    assert other.endswith(": wrong: off by a mile")


def test_a_heuristic_that_does_not_compile(card):
    card.compiler = {heuristic(1): Compiled(cached=False, seconds=0.0, error="no")}
    tuned = run(batches=[1], lengths=[512])
    assert [outcome.message for outcome in tuned.failed] == ["does not compile: no"]
    assert rows() == []


def test_keys_that_do_not_fit_into_memory(card, monkeypatch):
    """In as many copies as the L2 cannot hold."""
    size = tuner.decode.bytes_of(problem(4, 2048))
    needed = size * timing.cold_copies(size)
    properties = SimpleNamespace(total_memory=(needed - 1) / tuner.MEMORY_SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    tuned = run()
    (failed,) = tuned.failed
    assert (failed.work.point.batch, failed.work.point.length) == (4, 2048)
    assert failed.message == f"its keys take {needed} bytes, more than the card has to spare"
    assert len(rows()) == POINTS - 1
    assert (4, 2048) not in {tuple(at) for _, *at in card.checked}


# -- the config there was


def test_a_gain_within_the_noise_changes_nothing(card):
    card.microseconds = lambda config, problem: 19.7 if config == FAST else 20.0
    run()
    assert {row.config for row in rows()} == {items(vars(heuristic(b))) for b in (1, 4)}
    card.microseconds = lambda config, problem: 19.5 if config == FAST else 20.0
    run(again=True)
    assert {row.config for row in rows()} == {items(vars(FAST))}


def test_a_gain_that_comes_and_goes_changes_nothing(card):
    """A tenth of the time, and more than a tenth between one round and another."""
    one = {"batches": [1], "lengths": [512]}
    ((only,), _) = tuner.list_work(device=CARD, **description(**one))
    glances = [1.0] * len(only.candidates)
    card.microseconds = lambda config, problem: 18.0 if config == FAST else 20.0
    # In each round first the heuristic, then what looked fastest.
    for factors, expected in (
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.12], heuristic(1)),
        ([1.0, 1.0, 1.12, 1.12, 1.0, 1.0], FAST),
    ):
        timings = iter(glances + factors)
        card.noise = timings.__next__
        run(**one, again=True)
        assert list(timings) == []
        assert [row.config for row in rows()] == [items(vars(expected))]


def test_a_shipped_row_is_the_config_there_was(card, monkeypatch):
    """Against it, not against the heuristic, a gain has to be surely one."""
    found = problem(1, 512)
    key, _, _ = portable.tuning_point(found, CARD)
    slower = tables.row(1, 512, values=items(vars(FAST)), key=key)
    monkeypatch.setattr(shipped, "nearest", lambda device: (9, 0))
    monkeypatch.setattr(shipped, "load", lambda capability: tables.table(slower))
    configs.forget()
    rival = Config(16, 4, 4)
    card.microseconds = lambda config, problem: {FAST: 10.0, rival: 9.9}.get(config, 20.0)
    tuned = run(batches=[1], lengths=[512])
    assert [outcome.work.incumbent for outcome in tuned.outcomes] == [FAST]
    (row,) = rows()
    assert (row.config, row.us, row.heuristic_us) == (items(vars(FAST)), 10.0, 20.0)


def test_a_row_stays_unless_it_is_beaten(card):
    """Also by the heuristic, and though another is as fast."""
    run(batches=[1], lengths=[512])
    rival = Config(16, 4, 4)
    card.microseconds = lambda config, problem: {FAST: 10.0, rival: 9.9}.get(config, 9.95)
    again = run(batches=[1], lengths=[512], again=True)
    (outcome,) = again.outcomes
    assert outcome.work.incumbent == FAST
    (row,) = rows()
    assert (row.config, row.us, row.heuristic_us) == (items(vars(FAST)), 10.0, 9.95)
    card.microseconds = lambda config, problem: {FAST: 10.0, rival: 5.0}.get(config, 9.95)
    run(batches=[1], lengths=[512], again=True)
    (row,) = rows()
    assert (row.config, row.us) == (items(vars(rival)), 5.0)


def test_a_row_that_is_wrong_now_goes(card):
    run(batches=[1], lengths=[512])
    card.wrong = {FAST}
    run(batches=[1], lengths=[512], again=True)
    (row,) = rows()
    assert row.config == items(vars(heuristic(1)))


@pytest.mark.parametrize(
    ("times", "others", "expected"),
    [
        ([10.0, 10.0, 10.0], [11.0, 11.0, 11.0], True),
        ([10.0, 10.0, 10.0], [10.1, 10.1, 10.1], False),
        ([10.0, 10.0, 10.0], [10.19, 10.19, 10.19], False),
        ([10.0, 10.0, 10.0], [10.3, 10.3, 10.3], True),
        ([10.0, 10.0, 10.0], [11.0, 11.0, 12.5], False),
        ([10.0, 10.0, 10.0], [12.0, 12.0, 12.5], True),
        ([10.0, 20.0, 40.0], [11.0, 22.0, 44.0], True),
        ([10.0, 10.0, 10.0], [10.0, 10.0, 10.0], False),
        ([11.0, 11.0, 11.0], [10.0, 10.0, 10.0], False),
        ([10.0], [11.0], True),
    ],
)
def test_faster_is_more_than_the_noise(times, others, expected):
    """Rounds by turns: a clock that drifts slows both."""
    assert is_faster(times, others) is expected


# -- resuming


def test_a_second_run_has_nothing_to_do(card):
    first = run()
    before = store.path(CARD).read_bytes()
    second = run()
    assert (first.skipped, second.skipped) == (0, POINTS)
    assert second.outcomes == []
    assert store.path(CARD).read_bytes() == before
    assert list(tuner.lines(second))[1] == (
        "4 points were tuned before (--again tunes them once more)"
    )
    third = run(again=True)
    assert (third.skipped, len(third.outcomes)) == (0, POINTS)


def test_a_larger_grid_tunes_what_is_new(card):
    run(batches=[4])
    assert run().skipped == 2
    assert len(rows()) == POINTS


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupt_keeps_what_is_done(card, done):
    def interrupted(config: Config, problem: DecodeProblem) -> float:
        if len(came) == done:
            raise KeyboardInterrupt
        return 10.0 if config == FAST else 20.0

    came: list[Outcome] = []
    usual, card.microseconds = card.microseconds, interrupted
    tuned = run(on_outcome=came.append)
    assert tuned.interrupted
    assert len(rows()) == len(tuned.outcomes) == done
    assert list(tuner.lines(tuned))[-1] == (
        "interrupted: what is done is kept, the same command goes on from here"
    )
    if done:
        found = came[0].work.problem
        assert configs.choose(portable, found, CARD).config == FAST
    card.microseconds = usual
    rest = run()
    assert (rest.skipped, len(rest.outcomes), rest.interrupted) == (done, POINTS - done, False)
    assert len(rows()) == POINTS


def test_an_interrupt_of_the_compiler(card, monkeypatch):
    def run_until(jobs: Sequence[Job], *more: Any) -> Iterator[tuple[int, Compiled]]:
        yield from list(card.run(jobs, *more))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner.workers, "run", run_until)
    tuned = run()
    assert tuned.interrupted
    assert tuned.outcomes == rows() == []


def test_rows_are_stored_as_they_come(card, monkeypatch):
    """A process that is killed loses the last seconds, not all."""
    monkeypatch.setattr(tuner, "STORE_SECONDS", -1.0)
    stored = []
    run(on_outcome=lambda outcome: stored.append(len(rows())))
    assert stored == [0, 1, 2, 3]
    assert len(rows()) == POINTS


# -- what cannot be stored


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_done(
    card, monkeypatch, tmp_path
):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "a file"))
    with pytest.raises(store.StoreError, match="cannot be written: Not a directory"):
        run()
    assert card.compiled == []


def test_a_disk_that_is_full_later(card, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(store.StoreError, match="cannot be written: No space left on device"):
        run(on_outcome=lambda outcome: monkeypatch.setattr(os, "fsync", full))
    assert rows() == []


# -- what is not tuned


def test_float32_has_nothing_to_tune(card):
    expected = "^dtype must be float16 or bfloat16: float32 has one config, got float32$"
    with pytest.raises(ValueError, match=expected):
        run(dtype="float32")
    assert card.compiled == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "9.0"}, ValueError, "device must be a GPU of this machine to be timed, got 9"),
        ({"device": "cpu"}, ValueError, "device must be a GPU, or a capability "),
        ({"device": CARD, "latent": 500}, NotImplementedError, "no implementation of decode can "),
        ({"device": CARD, "heads": 129}, ValueError, "heads must be in "),
    ],
    ids=str,
)
def test_what_is_not_tuned(card, arguments, error, message):
    with pytest.raises(error) as caught:
        tune(**SMALL | arguments)
    assert str(caught.value).startswith(message)
    assert card.compiled == []


def test_a_card_that_is_there_by_its_index(card, monkeypatch):
    """Inputs are made on the GPU that was asked for."""
    visited = []

    def guard(index: int | None) -> Any:
        visited.append(index)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr("mla_triton.device.of", lambda device: CARD)
    tune(device="cuda:1", **SMALL | {"max_batch": 1, "max_len": 512})
    tune(device=torch.device("cuda"), **SMALL | {"max_batch": 1, "max_len": 512})
    assert visited == [1, None]


# -- by the command line


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["tune", "--heads", "16", "--max-batch", "1", "--max-len", "512", *arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up card is that of this machine."""
    monkeypatch.setattr("mla_triton.device.current", lambda: CARD)


def test_the_command_says_what_it_found(card, at_hand, capsys):
    code, out = command(capsys)
    assert code == 0
    first, *_, last = out.splitlines()
    assert first == (
        "decode portable 512+64 bfloat16 heads 16 s_q 1 page 64 rows 16 batch 1 length 512: "
        "block_n 32, num_stages 4, num_warps 8; 10.00 us, 2.000 x the heuristic's speed"
    )
    assert last == f"stored in {store.path(CARD)}"


def test_the_command_as_json(card, at_hand, capsys):
    rival = Config(16, 4, 4)
    card.wrong = {rival}
    code, out = command(capsys, "--json")
    facts = json.loads(out)
    assert code == 0
    (row,) = facts["rows"]
    assert row["config"] == vars(FAST)
    assert row["gain"] == 2.0
    (refused,) = facts["refused"]
    assert refused["config"] == vars(rival)
    assert refused["why"] == "wrong: off by a mile"
    assert (facts["failed"], facts["skipped"], facts["interrupted"]) == ([], 0, False)
    assert (facts["mean_gain"], facts["path"]) == (2.0, str(store.path(CARD)))


def test_the_command_fails_where_a_point_has_no_row(card, at_hand, capsys):
    card.wrong = {heuristic(1)}
    code, out = command(capsys)
    assert code == 1
    assert out.startswith("FAILED decode portable 512+64 ")
    assert "wrong: off by a mile" in out


def test_the_command_is_interrupted(card, at_hand, capsys):
    def interrupted(config: Config, problem: DecodeProblem) -> float:
        raise KeyboardInterrupt

    card.microseconds = interrupted
    code, out = command(capsys)
    assert code == 130
    assert out.endswith("the same command goes on from here\n")


def test_the_command_cannot_store(card, at_hand, capsys, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "a file"))
    with pytest.raises(SystemExit) as stopped:
        command(capsys)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written: Not a directory" in err


def test_bytes_of_a_problem_are_those_of_whole_pages():
    found = replace(problem(4, 2048), max_kv_len=65)
    assert tuner.decode.bytes_of(found) == 4 * 128 * 576 * 2
