"""The command line.

mla-triton info       devices, versions, caches
mla-triton explain    which implementation decodes a shape on a card, how, and why not the others
mla-triton check      decode the shapes of real models and compare with the float64 reference
mla-triton tune       time the configs of a deployment's shapes and keep the best of each
mla-triton warmup     compile every kernel that a deployment can meet, before it serves
mla-triton configs    list, show, compare, export and validate tables of tuned configs
"""

from __future__ import annotations

from collections.abc import Sequence

import mla_triton
from mla_triton.cli import configs, inspect, tune, warmup
from mla_triton.cli.options import Parser

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, or raises SystemExit(2) on bad arguments."""
    arguments = parser().parse_args(argv)
    exit_code: int = arguments.run(arguments)
    return exit_code


def parser() -> Parser:
    """All commands and their options."""
    top = Parser("mla-triton", description="Multi-head Latent Attention for Triton.")
    top.add_argument("--version", action="version", version=f"mla-triton {mla_triton.__version__}")
    commands = top.add_subparsers(metavar="command", required=True)
    for group in (inspect, tune, warmup, configs):
        group.add_commands(commands)
    return top
