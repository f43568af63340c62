"""`mla-triton check --deep`: many more cases, and a report to send with a bug."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mla_triton import device as devices
from mla_triton.cli.options import natural


def add_options(command: argparse.ArgumentParser) -> None:
    """What `check` takes besides `--json`."""
    add = command.add_argument
    add("--deep", action="store_true", help="many more cases, repeated, as a report")
    add("--html", metavar="FILE", help="with --deep: write the report as one page of HTML, too")
    add("--seed", type=natural, default=0, metavar="N", help="with --deep: of all values")
    add(
        "--repeats", type=natural, metavar="N",
        help="with --deep: further calls of each case, which must give the same bits "
        "(default 5 on a GPU, 1 in the interpreter)",
    )  # fmt: skip
    add("--only", metavar="TEXT", help="with --deep: cases with this in them, such as 'ragged'")


def words(arguments: argparse.Namespace) -> list[str]:
    """The options as they were given, for a child."""
    given = ["--deep"] * arguments.deep
    given += [] if arguments.json is None else ["--json", arguments.json]
    for name in ("html", "seed", "repeats", "only"):
        value = getattr(arguments, name)
        given += [] if value is None else [f"--{name}", str(value)]
    return given


def check(arguments: argparse.Namespace) -> int:
    """Computes, judges and reports; 0 where all is right, else 1."""
    from mla_triton.report import environment, page, text
    from mla_triton.report.cases import cases
    from mla_triton.report.examine import Row, examine

    on_gpu = not devices.interpreting()
    device = torch.device("cuda" if on_gpu else "cpu")
    wanted = arguments.only or ""
    todo = [case for case in cases(on_gpu, arguments.seed) if wanted in case.label]
    if not todo:
        arguments.parser.error(f"only must be in the name of a case, got {wanted!r}")
    repeats = arguments.repeats
    if repeats is None:
        repeats = 5 if on_gpu else 1
    found = environment.facts()
    rows: list[Row] = []

    def kept() -> Iterable[Row]:
        for row in examine(todo, device, repeats):
            rows.append(row)
            yield row

    speaks = arguments.json != "-"
    if speaks:
        print("\n".join(text.heading(found, arguments.seed, repeats)))
    for line in text.lines(kept()):
        if speaks:
            print(line, flush=True)
    if arguments.json is not None:
        write_json(text.facts(found, arguments.seed, repeats, rows, device.type), arguments.json)
    if arguments.html is not None:
        made = page.page(found, arguments.seed, repeats, rows)
        Path(arguments.html).write_text(made, encoding="utf-8")
    if speaks:
        print(text.verdict(rows))
    return 0 if all(row.ok for row in rows) else 1


def write_json(facts: Any, target: str) -> None:
    """To a file, or to the output for "-"."""
    made = json.dumps(facts, indent=2, allow_nan=False)
    if target == "-":
        print(made)
    else:
        Path(target).write_text(made + "\n", encoding="utf-8")
