"""Tables for cards that nobody timed: the heuristic's choice of every key, marked as modelled.

    python -m mla_triton.tuning.modelled            writes the package's tables again
    python -m mla_triton.tuning.modelled --check    exits with 1 if a table says something else

A modelled row does nothing that the heuristic would not; it puts the choice where it can be read,
compared and replaced by a timed one. Configs are held against the card's resources, and
`tests/test_compile.py` compiles them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mla_triton import configs, models, select
from mla_triton import device as devices
from mla_triton.configs import shipped
from mla_triton.configs.table import Point, Row, Table, items, loads
from mla_triton.device import Device
from mla_triton.kernels.common.tuning_key import SHORT_SEQUENCE
from mla_triton.problem import LARGEST_TILE, DecodeProblem, PrefillProblem
from mla_triton.tuning.deployment import describe, resized
from mla_triton.tuning.tuner import header_of

LABELS = ("8.0", "8.6", "8.9", "10.0", "12.0")
MAIN, OTHERS = "DeepSeek-V3", ("MiniCPM3-4B", "Mistral-Small-4", "DeepSeek-V4-Flash")
"""The widths that most models have, with all page sizes and dtypes, and the others."""
PREFILLED = (MAIN, "GLM-4.7-Flash", "MiniCPM3-4B", "Mistral-Small-4")
"""Models of each of the widths that prefill is made for."""
RANKS = (1, 2, 4, 8, 16)
MAX_BATCH, LENGTH = 128, 131072
PROTOCOL = "nothing was timed: the heuristic's choice, held against the card's resources"


def rows(device: Device) -> list[Row]:
    """Rows of the real models' heads; of batches, the last before the choice changes."""
    found: dict[Point, Row] = {}
    for form in _forms():
        for batch in _last_of_each_choice(form, device):
            problem = resized(form, batch, LENGTH)
            row = _row(select.choose_decode(problem, device).module, problem, device)
            found[row.point] = row
    for prefill in _prefills():
        row = _row(select.choose_prefill(prefill, device).module, prefill, device)
        found[row.point] = row
    return list(found.values())


def _row(implementation: ModuleType, problem: Any, device: Device) -> Row:
    key, batch, length = implementation.tuning_point(problem, device)
    point = Point(implementation.OP, implementation.NAME, key, batch, configs.length_bucket(length))
    config = implementation.heuristic(problem, device)
    return Row(point, items(vars(config)), None, None, "modelled")


def table(device: Device) -> Table:
    """The whole table of a card, made now."""
    return Table(header_of(device, PROTOCOL, commit=""), tuple(rows(device)))


def _forms() -> Iterator[DecodeProblem]:
    for name in (MAIN, *OTHERS):
        is_main = name == MAIN
        for count in _heads(name):
            deployment = describe(
                model=name,
                heads=count,
                s_q=(1, 2, 4),
                dtype=("bfloat16", "float16") if is_main else "bfloat16",
                page_size=(64, 16, 1) if is_main else 64,
                max_len=LENGTH,
                queries="split",
            )
            yield from deployment.forms(1)


def _prefills() -> Iterator[PrefillProblem]:
    """Of batches none makes a difference: the largest stands for all."""
    for name in PREFILLED:
        for count in _heads(name):
            deployment = describe(
                model=name,
                heads=count,
                dtype=("bfloat16", "float16") if name == MAIN else "bfloat16",
                queries="joined",
                prefill_tokens=1,
            )
            for tokens in (SHORT_SEQUENCE, LARGEST_TILE):
                yield from deployment.prefills(MAX_BATCH, MAX_BATCH * tokens, MAX_BATCH * LENGTH)


def _heads(name: str) -> list[int]:
    """Heads of a rank of a model, on 1 to 16 GPUs."""
    heads = {models.named(name).heads // ranks for ranks in RANKS}
    # Other models of the main widths have fewer heads to share.
    return sorted(heads | {4} if name == MAIN else heads)


def _last_of_each_choice(form: DecodeProblem, device: Device) -> Iterator[int]:
    """The batches at which key or config are the last of their kind."""

    def choice(batch: int) -> object:
        problem = resized(form, batch, LENGTH)
        implementation = select.choose_decode(problem, device).module
        key, _, _ = implementation.tuning_point(problem, device)
        return key, implementation.heuristic(problem, device)

    choices = [choice(batch) for batch in range(1, MAX_BATCH + 1)]
    for batch in range(1, MAX_BATCH + 1):
        if batch == MAX_BATCH or choices[batch] != choices[batch - 1]:
            yield batch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    stale = []
    for label in LABELS:
        device = devices.from_label(label)
        made = table(device)
        path = Path(configs.__file__).parent / f"{shipped.stem(device)}.json"
        if options.check:
            if set(loads(path.read_text(encoding="utf-8")).rows) != set(made.rows):
                stale.append(path)
        else:
            path.write_text(made.dumps(), encoding="utf-8")
            print(f"wrote {path.name}: {len(made.rows)} rows")
    for path in stale:
        print(f"{path} is stale: run python -m mla_triton.tuning.modelled", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
