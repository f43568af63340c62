"""What the commands share: how they are added, how arguments are read, how answers are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mla_triton.cache.named import CACHE_FORMATS
from mla_triton.tuning.deployment import DTYPES

Commands = Any
"""What argparse's `add_subparsers` returns, which has no public name."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves the usage to `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    about: str,
    json_file: bool = False,
) -> argparse.ArgumentParser:
    """A command that `run` carries out; what it returns is the exit code.

    With `json_file`, `--json` takes a file where there is one, and is "-" without.
    """
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    if json_file:
        command.add_argument(
            "--json", nargs="?", const="-", metavar="FILE",
            help="machine-readable output, in a file where one is named",
        )  # fmt: skip
    else:
        command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(run=run, parser=command)
    return command


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {lowest}, got {text!r}"
        )
    return int(text)


def add_deployment(command: argparse.ArgumentParser) -> None:
    """The options that describe what an engine will ask of one GPU."""
    add = command.add_argument
    add("--model", metavar="NAME", help="take heads and widths from a model, such as deepseek-v3")
    add("--from-model", metavar="PATH", help="or from a Hugging Face config.json")
    add("--tp", type=positive, default=1, metavar="N", help="ranks that share the model's heads")
    add("--heads", type=positive, metavar="N", help="heads of one rank")
    add("--latent", type=positive, metavar="N")
    add("--rope", type=natural, metavar="N")
    add("--value-dim", type=positive, metavar="N", help="default: latent")
    add("--max-batch", type=positive, default=128, metavar="N", help="requests of a step, at most")
    add("--max-len", type=positive, metavar="N", help="tokens of a request; default: the model's")
    add(
        "--s-q", type=positive, nargs="+", default=[1], metavar="N",
        help="query tokens of a request: 1, and what speculative decoding verifies",
    )  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    add("--page-size", type=positive, nargs="+", default=[64], metavar="N")
    add("--cache-format", nargs="+", choices=CACHE_FORMATS, default=["16bit"])
    add("--no-causal", action="store_true")
    add(
        "--prefill-tokens", type=natural, default=0, metavar="N",
        help="query tokens of a prefill (mla_triton.prefill), at most; default: it is not called",
    )  # fmt: skip


def description(arguments: argparse.Namespace) -> dict[str, Any]:
    """The deployment's options as `mla_triton.tune` and `mla_triton.warmup` take them."""
    names = (
        "model", "from_model", "tp", "heads", "latent", "rope", "value_dim", "max_batch",
        "max_len", "s_q", "dtype", "page_size", "cache_format", "prefill_tokens",
    )  # fmt: skip
    return {name: getattr(arguments, name) for name in names} | {"causal": not arguments.no_causal}


def show(facts: Any, arguments: argparse.Namespace, lines: Sequence[str]) -> None:
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines))
