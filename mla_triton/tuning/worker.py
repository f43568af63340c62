"""One process that compiles: reads jobs from its input, answers each on its output.

Started by `mla_triton.tuning.workers`, which says what goes over the pipe.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from mla_triton.tuning.workers import Compiled, Job


def main() -> int:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a compiler prints must not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, answers)
    return 0


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        pickle.dump(compile_one(job), answers)
        answers.flush()


def compile_one(job: Job) -> Compiled:
    """Compiles a job's variant. Whatever the compiler says against it is part of the answer."""
    began = time.perf_counter()
    try:
        cached = job.variant.is_compiled(job.device)
        if job.only_ask:
            return Compiled(cached=cached, seconds=time.perf_counter() - began)
        kernel = job.variant.compile(job.device)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        return Compiled(cached=False, seconds=time.perf_counter() - began, error=text[0])
    return Compiled(
        cached=cached,
        seconds=time.perf_counter() - began,
        size=_size(kernel),
        shared_memory=kernel.metadata.shared,
        spilled=_spilled(kernel) if job.with_spills else 0,
    )


def _size(kernel: Any) -> int:
    """Bytes of a kernel in Triton's cache."""
    return sum(Path(path).stat().st_size for path in kernel.metadata_group.values())


def _spilled(kernel: Any) -> int:
    from mla_triton.testing import resources

    return resources.spilled(kernel)


if __name__ == "__main__":
    sys.exit(main())
