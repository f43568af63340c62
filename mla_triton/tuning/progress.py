"""How far a long job is: a bar where tqdm is installed and someone watches, else a line now and
then."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts to `total`; call it with what is done. Writes to stderr: results stay alone."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self._what = what
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if self._stream.isatty() and importlib.util.find_spec("tqdm") is not None:
            tqdm = importlib.import_module("tqdm").tqdm
            self._bar = tqdm(total=total, desc=what, file=self._stream)

    def __call__(self, done: int, total: int | None = None) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES and done < self._total:
            return
        self._said = now
        spent = now - self._began
        left = spent / done * (self._total - done) if done else float("nan")
        text = f"{self._what}: {done} of {self._total}, {spent:.0f} s"
        text += f", about {left:.0f} s left" if done < self._total else ""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
