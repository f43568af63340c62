"""Compiling side by side: whatever becomes of a process, each job has its answer.

The processes are real, and compile real kernels of a few lines.
"""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import deadly_kernels
import odd_kernels
import pytest

from mla_triton import device as devices
from mla_triton.kernels.common.launch import Variant, _variant_of
from mla_triton.kernels.portable import decode as portable
from mla_triton.testing import compilation
from mla_triton.tuning import workers
from mla_triton.tuning.workers import Compiled, Job

CARD = devices.from_label("8.0")
OTHER = devices.from_label("9.0")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels beside this file, for the processes, which one of the modules ends."""
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.setenv("DEADLY_KERNELS", "1")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no process outlives a run."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert children() == []


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is shared: what is compiled once need not be again."""
    return tmp_path_factory.mktemp("triton")


def children() -> list[int]:
    """Processes that compile for this one and have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            # Behind the name, which may hold anything: state, parent.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            is_running_child = int(parent) == os.getpid() and state != "Z"
            if is_running_child and b"tuning.worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def variant(count: int, function: object = odd_kernels.fill) -> Variant:
    return Variant(
        function,
        (("target", "*i32"), ("number", "i32")),
        (("COUNT", count),),
        frozenset({"target"}),
    )


def broken(count: int) -> Variant:
    return variant(count, odd_kernels.does_not_compile)


def deadly(count: int) -> Variant:
    return variant(count, deadly_kernels.fill)


def answers(
    variants: Sequence[Variant], cache: Path, processes: int = 2, **options: bool
) -> list[Compiled]:
    """In the order of the variants; each once."""
    jobs = [Job(each, CARD, **options) for each in variants]
    came = list(workers.run(jobs, processes, cache))
    assert sorted(number for number, _ in came) == list(range(len(jobs)))
    return [answer for _, answer in sorted(came, key=lambda pair: pair[0])]


def test_each_job_has_its_own_answer(filled):
    """Whichever process was faster: a program's bytes tell the variants apart."""
    counts = [64, 4096, 128, 2048, 256]
    first = answers([variant(count) for count in counts], filled)
    assert [answer.error for answer in first] == [None] * 5
    assert not any(answer.cached for answer in first)
    assert all(answer.size > 1000 and answer.seconds > 0 for answer in first)
    again = answers([variant(count) for count in reversed(counts)], filled, processes=1)
    assert all(answer.cached for answer in again)
    assert [answer.size for answer in again] == [answer.size for answer in reversed(first)]
    assert len({answer.size for answer in again}) > 1


def test_the_compilers_words_are_the_answer(filled):
    right, wrong, later = answers([variant(64), broken(64), variant(128)], filled, processes=1)
    assert right.error is None
    assert later.error is None
    assert "there_is_no_such_name" in wrong.error or "CompilationError" in wrong.error
    assert "\n" not in wrong.error
    assert (wrong.cached, wrong.size) == (False, 0)


def test_a_process_that_is_killed_is_the_answer_for_its_job(filled):
    """The others go on, in a process of their own where there was but one."""
    wanted = [variant(64), deadly(64), deadly(128), variant(128)]
    got = answers(wanted, filled, processes=1)
    killed = "the compiler's process ended with -9"
    assert [answer.error for answer in got] == [None, killed, killed, None]
    assert [answer.size > 0 for answer in got] == [True, False, False, True]


@pytest.mark.parametrize("kept", [False, True])
def test_leaving_early_ends_the_processes(tmp_path, kept):
    """By `break`, where the generator is let go, or by an error outside while it is kept."""
    jobs = [Job(variant(1 << n), CARD) for n in range(4, 14)]
    running = workers.run(jobs, 2, tmp_path)
    next(running)
    assert children()
    if kept:
        with pytest.raises(KeyboardInterrupt):
            running.throw(KeyboardInterrupt)
    else:
        running.close()
    assert children() == []


def test_a_cache_of_its_own(filled, tmp_path, monkeypatch):
    """What is named is used, and nothing else is written."""
    usual = tmp_path / "usual"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(usual))
    (answer,) = answers([variant(64)], tmp_path / "named")
    assert not answer.cached
    assert any((tmp_path / "named").rglob("*.cubin"))
    assert not usual.exists()
    ((_, answer),) = workers.run([Job(variant(64), CARD)])
    assert not answer.cached
    assert any(usual.rglob("*.cubin"))


def test_only_asking_compiles_nothing(tmp_path):
    asked = [variant(64), broken(64), variant(128)]
    got = answers(asked, tmp_path, only_ask=True)
    assert not any(answer.cached for answer in got)
    assert [answer.error for answer in got] == [None] * 3
    assert list(tmp_path.rglob("*.cubin")) == []
    answers([variant(128)], tmp_path)
    jobs = [Job(each, CARD, only_ask=True) for each in asked]
    jobs.append(Job(variant(128), OTHER, only_ask=True))
    known = dict(workers.run(jobs, 1, tmp_path))
    assert [known[number].cached for number in range(4)] == [False, False, True, False]


def test_spills_are_read_where_they_are_asked_for(filled):
    (answer,) = answers([variant(64)], filled, with_spills=True)
    assert answer.error is None
    assert answer.spilled == 0


def test_what_cannot_be_sent_is_an_answer(filled):
    """No thread dies of it, for its answers are waited for."""
    odd = replace(variant(64), constants=(("COUNT", lambda: None),))
    wrong, right = answers([odd, variant(64)], filled, processes=1)
    assert "pickle" in wrong.error
    assert right.error is None


def test_a_process_that_cannot_be_started_is_an_answer(monkeypatch, tmp_path):
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(subprocess, "Popen", refused)
    got = answers([variant(64), variant(128)], tmp_path)
    assert [answer.error for answer in got] == ["OSError: [Errno 12] Cannot allocate memory"] * 2


def test_nothing_to_do():
    assert list(workers.run([])) == []


@pytest.mark.parametrize("processes", [0, -1])
def test_too_few_processes(processes):
    expected = f"^processes must be a whole number of at least 1, got {processes}$"
    with pytest.raises(ValueError, match=expected):
        next(workers.run([Job(variant(64), CARD)], processes))


def test_no_more_processes_than_jobs(monkeypatch):
    workers_made = []

    class Idle(workers._Worker):
        def __init__(self, *arguments: object) -> None:
            workers_made.append(self)
            super().__init__(*arguments)

        def _answer(self, job: Job) -> Compiled:
            return Compiled(cached=True, seconds=0.0)

    monkeypatch.setattr(workers, "_Worker", Idle)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    for jobs, processes, expected in ((2, 8, 2), (9, 2, 2), (9, None, 3), (1, None, 1)):
        workers_made.clear()
        assert len(list(workers.run([Job(variant(64), CARD)] * jobs, processes))) == jobs
        assert len(workers_made) == expected


def test_a_variant_of_another_process_is_the_same():
    """By name: the function here is interpreted, there it is compiled."""
    problem = compilation.problem()
    geometry = portable.geometry(problem, CARD)
    made = portable.variant(problem, portable.heuristic(problem, CARD), geometry, CARD)
    for each in (made, replace(made, num_warps=8, programmatic=True, max_registers=80)):
        again = pickle.loads(pickle.dumps(each))
        assert again == each
        assert hash(again) == hash(each)
        assert again.function is portable.decode_kernel
    assert _variant_of(*made.__reduce__()[1]) == made


def test_what_is_printed_does_not_come_between_the_answers(filled, monkeypatch, capfd):
    """A compiler may print as it likes: answers go over a pipe of their own."""
    monkeypatch.setenv("ODD_KERNELS_PRINT", "1")
    (answer,) = answers([variant(64)], filled)
    assert answer.error is None
    assert "words past Python" in capfd.readouterr().err


def test_a_process_goes_when_its_parent_has():
    """It reads the end of its input, and so outlives nobody."""
    command = [sys.executable, "-m", "mla_triton.tuning.worker"]
    with open(os.devnull, "rb") as nothing:
        ran = subprocess.run(command, stdin=nothing, capture_output=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout) == (0, b"")
