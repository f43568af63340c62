"""Variants compiled side by side, in processes that only compile, into Triton's cache.

A process of its own for each core, not a fork and not `multiprocessing`: a fork of a process that
uses a GPU breaks, and `multiprocessing` runs the user's own script again in every child. They do
not interpret, even where this process does. One that a compiler crashes is replaced, and the crash
is the answer for its variant. Over the pipes go pickles between a parent and its own children.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant


@dataclass(frozen=True)
class Job:
    variant: Variant
    device: Device
    only_ask: bool = False
    """Whether to say only if it is compiled already."""
    with_spills: bool = False


@dataclass(frozen=True)
class Compiled:
    """What came of a job."""

    cached: bool
    """Whether Triton's cache had it before."""
    seconds: float
    size: int = 0
    """Bytes in Triton's cache."""
    shared_memory: int = 0
    """Bytes a program."""
    spilled: int = 0
    """Bytes of stack a thread, where they were asked for."""
    error: str | None = None
    """The compiler's words where there is no machine code."""


def run(
    jobs: Sequence[Job], processes: int | None = None, cache: Path | None = None
) -> Iterator[tuple[int, Compiled]]:
    """(number of the job, what came of it), in the order in which they are done.

    `processes` is one a core by default. `cache` is the directory of Triton's cache, by default the
    one that is configured. Leaving the iteration early ends the processes. Raises ValueError for
    less than one process.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be a whole number of at least 1, got {processes}")
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    done: queue.SimpleQueue[tuple[int, Compiled]] = queue.SimpleQueue()
    count = min(len(jobs), processes or len(os.sched_getaffinity(0)))
    workers = [_Worker(jobs, waiting, done, cache) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        for _ in jobs:
            yield done.get()
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()


class _Worker(threading.Thread):
    """Feeds one process, and starts another where it dies."""

    def __init__(
        self,
        jobs: Sequence[Job],
        waiting: queue.SimpleQueue[int],
        done: queue.SimpleQueue[tuple[int, Compiled]],
        cache: Path | None,
    ) -> None:
        super().__init__(daemon=True)
        self._jobs = jobs
        self._waiting = waiting
        self._done = done
        self._cache = cache
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self._stopped:
            try:
                number = self._waiting.get_nowait()
            except queue.Empty:
                break
            try:
                answer = self._answer(self._jobs[number])
            except Exception as error:
                # Whatever it is, the thread goes on: its answers are waited for.
                self._end()
                text = f"{type(error).__name__}: {error}"
                answer = Compiled(cached=False, seconds=0.0, error=text)
            self._done.put((number, answer))
        self.stop()

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        with self._lock:
            self._stopped = True
        self._end()

    def _end(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _answer(self, job: Job) -> Compiled:
        given = pickle.dumps(job)
        process = self._running()
        if process is None:
            return Compiled(cached=False, seconds=0.0, error="stopped")
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(given)
            process.stdin.flush()
            answer: Compiled = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            process.kill()
            code = process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            return Compiled(
                cached=False, seconds=0.0, error=f"the compiler's process ended with {code}"
            )
        return answer

    def _running(self) -> subprocess.Popen[bytes] | None:
        """The process, started if there is none; None once this worker is stopped."""
        with self._lock:
            if self._stopped:
                return None
            if self._process is None or self._process.poll() is not None:
                environment = os.environ | {"TRITON_INTERPRET": "0"}
                if self._cache is not None:
                    environment["TRITON_CACHE_DIR"] = str(self._cache)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "mla_triton.tuning.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    # An interrupt from the keyboard is the parent's to handle.
                    start_new_session=True,
                )
            return self._process
