"""A report as lines, each row as it comes, and as values for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from mla_triton.report import environment
from mla_triton.report.examine import Row

COLUMNS = (
    ("operation", 10), ("shape", 28), ("dtype", 8), ("call", 26), ("runs", 9), ("parts", 5),
    ("out", 8), ("rms", 8), ("lse", 8), ("repeats", 7),
)  # fmt: skip
WIDTHS = tuple(width for _, width in COLUMNS)
MEASURED = slice(6, 9)
"""The columns of errors, which are one where none is measured."""
EXACT_WIDTHS = (*WIDTHS[:6], sum(WIDTHS[MEASURED]) + 2, *WIDTHS[9:])
INDENT = " " * 7


def heading(found: dict[str, Any], seed: int, repeats: int) -> Iterator[str]:
    """Where this runs, and what the columns are."""
    yield from environment.lines(found)
    yield f"{'seed':<11} {seed}, {1 + repeats} calls of each case"
    if found["interpreter"]:
        yield "Triton's interpreter runs the kernels as Python: no GPU code is executed. Set"
        yield "TRITON_INTERPRET=1 where a line below is to make a case again."
    yield "out, rms, lse: the largest share of its error budget that a row has used, 1 is allowed;"
    yield "equal bits: what has no budget is, to the bit, what the reference leaves;"
    yield "repeats: of further calls, those with the same bits as the first."
    yield INDENT + _line([name for name, _ in COLUMNS])


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """Three lines a row: its numbers, its worst element or what is wrong, and how to repeat it."""
    for row in rows:
        texts = [row.operation, row.shape, row.dtype, row.call, row.implementation]
        texts.append("-" if row.parts is None else str(row.parts))
        if row.is_exact:
            texts += [equality(row), same(row)]
        else:
            ratios = {measure.name: share(measure.ratio) for measure in row.measures}
            # Numbers in a cache are what an append puts out.
            ratios.setdefault("out", ratios.get("stored", "-"))
            texts += [ratios.get(name, "-") for name in ("out", "out_rms", "lse")]
            texts.append(same(row) if row.measures else "-")
        yield ("ok     " if row.ok else "FAILED ") + _line(texts)
        if not row.ok:
            yield INDENT + row.message
        said = [] if row.worst is None else [row.worst.text]
        said += [each.text for each in row.bits]
        if said:
            yield f"{INDENT}{'; '.join(said)}; config {row.config} ({row.config_source})"
        yield f'{INDENT}python -c "{row.reproduction}"'


def verdict(rows: Sequence[Row]) -> str:
    """The last line."""
    wrong = sum(not row.ok for row in rows)
    if not rows:
        return "no case was asked for"
    if wrong:
        return f"{wrong} of {len(rows)} FAILED"
    exact = sum(row.is_exact for row in rows)
    kinds = [f"{len(rows) - exact} are within their error budgets"] * (exact < len(rows))
    kinds += [f"{exact} are the reference's to the bit"] * (exact > 0)
    return f"all {', '.join(kinds)}, and the same in every repeat"


def facts(
    found: dict[str, Any], seed: int, repeats: int, rows: Sequence[Row], device: str
) -> dict[str, Any]:
    """The whole report as plain values. NaN and infinities, which JSON has not, are strings."""
    report = {
        "environment": found,
        "device": device,
        "gpu_code_executed": device == "cuda",
        "seed": seed,
        "repeats": repeats,
        "rows": [asdict(row) for row in rows],
        "ok": all(row.ok for row in rows),
    }
    made: dict[str, Any] = _plain(report)
    return made


def share(ratio: float) -> str:
    """A ratio in few characters."""
    if ratio == 0:
        return "0"
    return f"{ratio:.3f}" if 0.001 <= ratio < 1000 else f"{ratio:.1e}"


def equality(row: Row) -> str:
    """Of a row without errors to be measured."""
    return f"{row.differing_bytes} bytes differ" if row.differing_bytes else "equal bits"


def same(row: Row) -> str:
    """Of the repeats, those with the bits of the first call: "2/2"."""
    return f"{row.repeats - row.differing}/{row.repeats}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _line(texts: Sequence[str]) -> str:
    widths = WIDTHS if len(texts) == len(WIDTHS) else EXACT_WIDTHS
    pairs = zip(texts, widths, strict=True)
    return " ".join(text.ljust(width) for text, width in pairs).rstrip()
