"""What one eager decode call costs on the host, and where that goes. Needs no GPU.

    python benchmarks/host.py
    python benchmarks/host.py --capability 8.9

CPU tensors take the way of a GPU's up to the driver, which is replaced by one that does nothing:
the driver's own part of a launch is not in these figures. They compare versions of this package on
one machine; `benchmarks/decode.py` measures the whole on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import results as results_file
import torch
import triton

import mla_triton
from mla_triton import configs, select, validate
from mla_triton import device as devices
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops import decode
from mla_triton.testing import DecodeInputs, decode_inputs

CALLS, ROUNDS = 200, 15

# What an operator costs that takes what ours takes and does nothing.
EMPTY = torch.library.Library("mla_triton_benchmarks", "DEF")
EMPTY.define(str(torch.ops.mla_triton.decode.default._schema).removeprefix("mla_triton::"))
EMPTY.impl("decode", lambda *_: None, "CPU")


@contextmanager
def idle_card(card: devices.Device) -> Iterator[None]:
    """Inside, CPU tensors are computed on `card`, whose launches do nothing."""
    make = Launcher.__init__

    def make_idle(launcher: Any, variant: Any, device: Any, index: Any) -> None:
        make(launcher, variant, device, 0)
        launcher._run = lambda *_: None

    with ExitStack() as stack:
        stack.enter_context(patch.object(devices, "of", lambda _: card))
        stack.enter_context(patch.object(Launcher, "__init__", make_idle))
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: 0))
        driver = SimpleNamespace(get_current_stream=lambda _: 0)
        stack.enter_context(patch.object(triton.runtime.driver, "_active", driver))
        yield


def microseconds(call: Callable[[], object]) -> float:
    """Mean time of a call on the thread's own clock, in the best of some rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time_ns() - start) / CALLS / 1e3)
    return min(times)


def measure(inputs: DecodeInputs, card: devices.Device) -> dict[str, float]:
    """Microseconds of a call and of its parts, by name; nothing is launched."""
    arguments, options = inputs.call_arguments()
    buffers: dict[str, Any] = inputs.output_buffers()
    checks = {name: value for name, value in options.items() if name != "cu_seqlens_q"}
    checks["allow_tf32"] = False
    with idle_card(card):
        plan = mla_triton.plan(inputs.kv_lens, heads=inputs.q_nope.shape[-2])
        checked: tuple[Any, ...] = (
            inputs.q_nope,
            inputs.q_rope,
            *validate.unpack_cache(inputs.cache),
            *validate.unpack_page_table(inputs.page_table),
            inputs.kv_lens,
            inputs.cu_seqlens_q,
            *buffers.values(),
        )
        problem = validate.decode(*checked, **checks)
        operands = [
            *checked[:-2],
            plan.schedule,
            plan.partial_out,
            plan.partial_lse,
            *buffers.values(),
            *checks.values(),
            plan.key,
            None,
        ]
        like = plan.geometry
        module = select.decode(problem, card, None, like).module
        length = configs.length_bucket(problem.max_kv_len)
        empty = torch.ops.mla_triton_benchmarks.decode
        launches = _recorded(lambda: mla_triton.decode(*arguments, **options, plan=plan))
        calls: dict[str, Callable[[], object]] = {
            "call: plan, out and lse given": lambda: mla_triton.decode(
                *arguments, **options, plan=plan, out=buffers["out"], lse=buffers["lse"]
            ),
            "call: plan given": lambda: mla_triton.decode(*arguments, **options, plan=plan),
            "call: nothing given": lambda: mla_triton.decode(*arguments, **options),
            "  checks (validate.decode)": lambda: validate.decode(*checked, **checks),
            "  selection (select.decode)": lambda: select.decode(problem, card, None, like),
            "  hash of a problem": lambda: hash(problem),
            "  length of the look-up": lambda: configs.length_bucket(problem.max_kv_len),
            "  launchers of a problem, its config looked up before": lambda: decode.prepare(
                module, problem, card, 0, like, length
            ),
            "  config looked up anew": lambda: configs.choose(module, problem, card, like.row_tile),
            "  launches, without the driver": lambda: [again() for again in launches],
            "  plan.key": lambda: plan.key,
            "  an empty operator of as many operands": lambda: empty(*operands),
            "  allocation of out and lse": lambda: (
                torch.empty_like(buffers["out"]),
                torch.empty_like(buffers["lse"]),
            ),
        }
        return {name: microseconds(call) for name, call in calls.items()}


def _recorded(call: Callable[[], object]) -> list[Callable[[], None]]:
    from protocol import launches

    return list(launches(call).values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="host.py", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", default="9.0", help="the card whose way is taken")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    arguments = parser.parse_args(argv)
    try:
        card = devices.from_label(arguments.capability)
    except ValueError as error:
        parser.error(str(error))
    if devices.interpreting():
        parser.error("TRITON_INTERPRET must be off: it changes what a launch is")
    inputs = decode_inputs(kv_lens=[100] * arguments.batch, heads=arguments.heads)
    rows = [["host time, nothing launched", "us"]]
    with torch.no_grad():
        found = measure(inputs, card)
    rows += [[name, results_file.number(us)] for name, us in found.items()]
    print(results_file.columns(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
