"""`mla-triton tune`: time the configs of a deployment's shapes and keep the best of each."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mla_triton.cli.options import (
    Commands,
    Parser,
    add_command,
    add_deployment,
    description,
    positive,
    show,
)
from mla_triton.tuning import tuner
from mla_triton.tuning.tuner import Outcome, Tuned, Work

INTERRUPTED = 130
"""What a shell expects of a command that the keyboard has ended."""


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands,
        "tune",
        run,
        "time the configs of a deployment's shapes on this GPU and keep the best of each",
    )
    add_deployment(command)
    add = command.add_argument
    add("--batches", type=positive, nargs="+", metavar="N", help="default: powers of 4 up to max")
    add("--lengths", type=positive, nargs="+", metavar="N", help="default: powers of 4 from 512 on")
    add("--again", action="store_true", help="tune also what the cache has already")
    add("--dry-run", action="store_true", help="only list the work; needs no GPU")
    add("--capability", metavar="LABEL", help='with --dry-run: "8.9"; default: what is here')
    add("--processes", type=positive, metavar="N", help="that compile; default: one a core")


def run(arguments: argparse.Namespace) -> int:
    """0 where every point has its row, else 1; 130 where it was interrupted."""
    parser: Parser = arguments.parser
    try:
        return _dry_run(arguments) if arguments.dry_run else _tune(arguments)
    except (ValueError, NotImplementedError, OSError) as error:
        parser.error(str(error))


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.capability is not None:
        raise ValueError(f"capability goes with --dry-run alone, got {arguments.capability!r}")

    def say(outcome: Outcome) -> None:
        if not arguments.json:
            print(line(outcome), flush=True)

    tuned = tuner.tune(
        batches=arguments.batches,
        lengths=arguments.lengths,
        again=arguments.again,
        processes=arguments.processes,
        on_outcome=say,
        **description(arguments),
    )
    show(facts(tuned), arguments, list(tuner.lines(tuned)))
    if tuned.interrupted:
        return INTERRUPTED
    return 1 if tuned.failed else 0


def line(outcome: Outcome) -> str:
    """A point and what came of it."""
    said = tuner.describe_point(outcome.work.point)
    if outcome.row is None or outcome.gain is None:
        return f"FAILED {said}: {outcome.message}"
    config = ", ".join(f"{name} {value}" for name, value in outcome.row.config)
    return f"{said}: {config}; {outcome.row.us:.2f} us, {outcome.gain:.3f} x the heuristic's speed"


def facts(tuned: Tuned) -> dict[str, Any]:
    """The same, ready for JSON."""
    return {
        "device": tuned.device,
        "seconds": tuned.seconds,
        "compile_seconds": tuned.compile_seconds,
        "kernels": tuned.compiled,
        "rows": [o.row.plain() | {"gain": o.gain} for o in tuned.outcomes if o.row is not None],
        "failed": [
            {"point": tuner.describe_point(o.work.point), "why": o.message} for o in tuned.failed
        ],
        "refused": [
            {"point": tuner.describe_point(o.work.point), "config": vars(config), "why": why}
            for o in tuned.outcomes
            for config, why in o.refused
        ],
        "skipped": tuned.skipped,
        "mean_gain": tuned.mean_gain,
        "interrupted": tuned.interrupted,
        "path": tuned.path,
    }


def _dry_run(arguments: argparse.Namespace) -> int:
    work, skipped = tuner.list_work(
        device=arguments.capability,
        batches=arguments.batches,
        lengths=arguments.lengths,
        again=arguments.again,
        **description(arguments),
    )
    plain = [
        {
            "point": tuner.describe_point(each.point),
            "candidates": [vars(config) for config in each.candidates],
            "pruned": [{"config": vars(config), "why": why} for config, why in each.pruned],
        }
        for each in work
    ]
    show({"work": plain, "skipped": skipped}, arguments, list(_listing(work, skipped)))
    return 0


def _listing(work: Sequence[Work], skipped: int) -> Iterator[str]:
    for each in work:
        count = len(each.candidates)
        yield f"{tuner.describe_point(each.point)}: {count} configs, {len(each.pruned)} pruned"
    rules: Counter[str] = Counter()
    for each in work:
        op = each.point.op
        rules.update(f"{op} {tuple(vars(config).values())}: {why}" for config, why in each.pruned)
    for rule, count in sorted(rules.items()):
        yield f"pruned at {count} of {len(work)} points: {rule}"
    trials = sum(len(each.candidates) for each in work)
    yield f"{len(work)} points, {trials} timings; {skipped} points were tuned before"
