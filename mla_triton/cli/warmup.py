"""`mla-triton warmup`: compile every kernel that a deployment can meet, before it serves."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace

from mla_triton import device as devices
from mla_triton.cli.options import (
    Commands,
    add_command,
    add_deployment,
    description,
    positive,
    show,
)
from mla_triton.tuning import warm
from mla_triton.tuning.deployment import APPENDS, LAYOUTS, QUERIES, TABLES
from mla_triton.tuning.progress import Progress
from mla_triton.tuning.warm import Warmed


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands,
        "warmup",
        run,
        "compile every kernel that a deployment can meet into Triton's cache, launching none",
    )
    add_deployment(command)
    add = command.add_argument
    add("--layout", nargs="+", choices=LAYOUTS, default=["fused"], help="of the cache")
    add("--table", nargs="+", choices=TABLES, default=["dense"], help="of the pages")
    add("--queries", nargs="+", choices=QUERIES, default=QUERIES, help="how they lie in memory")
    add("--ragged", action="store_true", help="query tokens by cu_seqlens_q, up to --s-q a request")
    add(
        "--batch-invariant", action="store_true",
        help="calls with batch_invariant=True, which launch other kernels",
    )  # fmt: skip
    add(
        "--append", nargs="+", choices=APPENDS, default=APPENDS[:2],
        help="tokens into the cache: as they are, or with a norm and a rotation of such pairs",
    )  # fmt: skip
    add("--capability", metavar="LABEL", help='another card than the one here: "8.9", "gfx942"')
    add("--gpu", metavar="NAME", help="its name, for which there are tuned rows: 'NVIDIA H200'")
    add("--sm-count", type=positive, metavar="N", help="its multiprocessors, where not the usual")
    add("--cache", metavar="DIR", help="directory of Triton's cache; default: Triton's own")
    add("--installed-at", metavar="DIR", help="where --cache will lie, if it is to be copied")
    add("--check", action="store_true", help="compile nothing; exit with 1 if anything would")
    add("--processes", type=positive, metavar="N", help="that compile; default: one a core")


def run(arguments: argparse.Namespace) -> int:
    """0 where everything is compiled, else 1."""
    progress: Progress | None = None

    def say(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            progress = Progress("asked" if arguments.check else "compiled", total)
        progress(done)

    try:
        warmed = warm.warmup(
            device=_device(arguments),
            check=arguments.check,
            processes=arguments.processes,
            cache=arguments.cache,
            installed_at=arguments.installed_at,
            progress=say,
            **description(arguments),
            layout=arguments.layout,
            table=arguments.table,
            queries=arguments.queries,
            ragged=arguments.ragged,
            batch_invariant=arguments.batch_invariant,
            append=arguments.append,
        )
    except (ValueError, NotImplementedError, OSError) as error:
        arguments.parser.error(str(error))
    finally:
        if progress is not None:
            progress.close()
    show(asdict(warmed), arguments, list(_lines(warmed, arguments.check)))
    return 1 if warmed.missing else 0


def _device(arguments: argparse.Namespace) -> devices.Device:
    card = warm.card_of(arguments.capability)
    if arguments.capability is None and (arguments.gpu or arguments.sm_count):
        raise ValueError("gpu and sm-count describe the card of --capability, got none")
    if arguments.gpu:
        card = replace(card, name=arguments.gpu)
    if arguments.sm_count:
        card = replace(card, sm_count=arguments.sm_count)
    return card


def _lines(warmed: Warmed, check: bool) -> Iterator[str]:
    if check:
        yield f"{warmed.kernels} kernels for {warmed.device}: {len(warmed.missing)} not compiled"
    else:
        found = warmed.kernels - warmed.compiled - len(warmed.missing)
        yield (
            f"{warmed.kernels} kernels for {warmed.device}: {warmed.compiled} compiled, "
            f"{found} found, in {warmed.seconds:.1f} s; "
            f"{warmed.size / 1e6:.1f} MB in {warmed.directory}"
        )
    for each in warmed.missing:
        yield f"missing: {each}"
