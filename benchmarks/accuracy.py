"""How far results on this machine's GPU are from float64, beside the rounding that nobody escapes.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --output benchmarks/results/accuracy/h200.json
    TRITON_INTERPRET=1 python benchmarks/accuracy.py

The error of a result is the root mean square of its difference to the float64 reference over that
of the reference itself. The floor is the same of the reference rounded to the result's dtype: the
right answer, written down. Where there is no GPU, the last command does it for small shapes in
Triton's interpreter, which rounds where a card does, though it adds in another order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import results as results_file
import torch

import mla_triton
from mla_triton import AttentionState, reference
from mla_triton import device as devices
from mla_triton.testing import DecodeInputs, PrefillInputs, decode_inputs, prefill_inputs

PROTOCOL = (
    "N(0,1) queries and keys; error: root mean square of (result - float64 reference) over that of "
    "the reference; floor: of the reference rounded to the dtype; lse: largest difference"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
IMPLEMENTATIONS = ("sm90", "portable")


@dataclass(frozen=True)
class Cell:
    """A decode over one latent, 512 + 64 columns, or a causal prefill, 192 and 128 columns."""

    operation: str
    length: int
    batch: int
    heads: int

    @property
    def name(self) -> str:
        return f"{self.operation}-s{self.length}-b{self.batch}-h{self.heads}"

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeInputs | PrefillInputs:
        lengths = [self.length] * self.batch
        if self.operation == "decode":
            return decode_inputs(kv_lens=lengths, heads=self.heads, dtype=dtype, device=device)
        return prefill_inputs(
            q_lens=lengths, qk=192, rope=64, v_dim=128, heads=self.heads, dtype=dtype,
            split_k=True, device=device,
        )  # fmt: skip


CELLS = (
    *(Cell("decode", length, 2, heads) for length in (1024, 16384) for heads in (16, 128)),
    *(Cell("prefill", length, 1, 16) for length in (2048, 8192)),
)

INTERPRETED = (Cell("decode", 1024, 1, 16), Cell("prefill", 512, 1, 4))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def compute(
    inputs: DecodeInputs | PrefillInputs, impl: str
) -> tuple[AttentionState, AttentionState]:
    """(result, what it should be)."""
    arguments, options = inputs.call_arguments()
    if isinstance(inputs, DecodeInputs):
        return (
            mla_triton.decode(*arguments, **options, impl=impl),
            reference.decode(*arguments, **options),
        )
    return (
        mla_triton.prefill(*arguments, **options, impl=impl),
        reference.prefill(*arguments, **options),
    )


def rows(cell: Cell, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """One for each dtype and implementation that takes the cell here."""
    here = devices.of(torch.device(device))
    for name, dtype in DTYPES.items():
        inputs = cell.inputs(dtype, device)
        for impl in IMPLEMENTATIONS:
            if impl == "sm90" and here.capability != (9, 0):
                continue
            state, exact = compute(inputs, impl)
            size = rms(exact.out)
            yield {
                "cell": cell.name,
                "dtype": name,
                "impl": impl,
                "error": rms(state.out.double() - exact.out) / size,
                "floor": rms(exact.out.to(dtype).double() - exact.out) / size,
                "lse": float((state.lse.double() - exact.lse).abs().max()),
            }


def measure() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    return measured(CELLS, device)


def measured(cells: Sequence[Cell], device: torch.device | str) -> dict[str, Any]:
    return {"cells": [row for cell in cells for row in rows(cell, device)]}


def lines(figures: dict[str, Any]) -> list[str]:
    table = [["cell", "dtype", "runs", "error", "floor", "error / floor", "lse"]]
    for row in figures["cells"]:
        table.append(
            [
                row["cell"], row["dtype"], row["impl"], f"{row['error']:.2e}",
                f"{row['floor']:.2e}", f"{row['error'] / row['floor']:.2f}", f"{row['lse']:.1e}",
            ]
        )  # fmt: skip
    text = results_file.columns(table).splitlines()
    recorded = json.loads(results_file.PEERS.read_text())["errors"]
    ranges = (f"{name} {low:.2e} to {high:.2e}" for name, (low, high) in recorded.items())
    return [*text, f"recorded of decodes in bfloat16: {', '.join(ranges)}"]


def main(argv: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available() and devices.interpreting():
        print("\n".join(lines(measured(INTERPRETED, "cpu"))))
        return 0
    return results_file.record("accuracy.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
