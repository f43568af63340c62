"""Writes the figures of docs/tuning.md and docs/warmup.md from the shipped table and the results.

python benchmarks/report_tuning.py            write the picture and the marked blocks of both pages
python benchmarks/report_tuning.py --check    exit 1 where one of them says something else
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import first_call

from mla_triton.configs import shipped
from mla_triton.configs.table import Row, Table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECORDED = ROOT / "benchmarks" / "results" / "tuning"
PICTURE = DOCS / "tuning-gain.svg"
BEGIN, END = "<!-- figures of {} -->\n", "<!-- end of figures -->\n"
CELL, GAP, LEFT, TOP = 13, 34, 92, 74
"""Pixels: a point, between panels, and what labels need."""
HIGHEST = 2.0
"""The gain from which on a point is as dark as it gets."""
WIDTHS = ((512, 64), (256, 32), (256, 64), (448, 64))
PAGES = (64, 16, 1)


def key(row: Row) -> dict[str, Any]:
    return dict(row.point.key)


def gain(row: Row) -> float:
    assert row.us is not None
    assert row.heuristic_us is not None
    return row.heuristic_us / row.us


def mean(rows: Iterable[Row]) -> float:
    return math.exp(statistics.fmean(math.log(gain(row)) for row in rows))


# -- the table of docs/tuning.md


def gains(table: Table) -> str:
    """What tuning gains, by what one can tell a shape by."""
    rows = [row for row in table.rows if row.source == "tuned"]
    changed = [row for row in rows if gain(row) > 1]
    best, worst = max(rows, key=gain), min(rows, key=gain)
    head = table.header
    lines = [
        f"{head.gpu}, torch {head.torch}, Triton {head.triton}, {head.date}: {len(rows)} rows, of "
        f"which {len(changed)} have another config than the heuristic's. Time with the heuristic's "
        f"config over time with the row's: geometric mean {mean(rows):.3f}, least "
        f"{gain(worst):.3f}, most {gain(best):.2f} ({said(best)}: {best.heuristic_us:.1f} us to "
        f"{best.us:.1f}).",
        "",
        "| rows of | points | mean gain | most |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, values in (
        ("page size", PAGES),
        ("width", [f"{latent}+{rope}" for latent, rope in WIDTHS]),
        ("batch", sorted({row.point.batch for row in rows})),
        ("s_q", (1, 2, 4)),
        ("row tile", (16, 32, 64)),
    ):
        for value in values:
            group = [row for row in rows if traits(row)[name] == value]
            most = max(map(gain, group))
            lines.append(f"| {name} {value} | {len(group)} | {mean(group):.3f} | {most:.2f} |")
    return "\n".join(lines) + "\n"


def traits(row: Row) -> dict[str, Any]:
    """What rows are grouped by."""
    parts = key(row)
    return {
        "page size": parts["page_size"],
        "width": f"{parts['latent']}+{parts['rope']}",
        "batch": row.point.batch,
        "s_q": parts["s_q"],
        "row tile": parts["row_tile"],
    }


def said(row: Row) -> str:
    parts = key(row)
    return (
        f"{parts['latent']}+{parts['rope']}, {parts['dtype']}, {parts['heads']} heads, "
        f"s_q {parts['s_q']}, page {parts['page_size']}, batch {row.point.batch}, "
        f"length {row.point.length}"
    )


def tune_run(run: dict[str, Any]) -> str:
    """How long the command took."""
    return (
        f"`{run['command']}` took {run['seconds']:.0f} s: {len(run['rows'])} points, "
        f"{run['kernels']} kernels compiled in {run['compile_seconds']:.0f} s on {run['cores']} "
        f"cores, from an empty cache.\n"
    )


# -- the picture


def picture(table: Table) -> str:
    """The gain of every point in bfloat16 as an SVG: panels by widths and page size."""
    rows = [row for row in table.rows if key(row)["dtype"] == "bfloat16"]
    shapes = []
    y = TOP
    right = 0
    for widths in WIDTHS:
        mine = [row for row in rows if (key(row)["latent"], key(row)["rope"]) == widths]
        ups = sorted({(key(row)["heads"], key(row)["s_q"]) for row in mine})
        sizes = sorted({(row.point.batch, row.point.length) for row in mine})
        x = LEFT
        lengths = ", ".join(map(short, sorted({length for _, length in sizes})))
        title = f"latent {widths[0]} + rope {widths[1]}; in each batch, lengths {lengths}"
        shapes.append(text(8, y - 36, title, "b"))
        for page in PAGES:
            at = {
                (key(row)["heads"], key(row)["s_q"], row.point.batch, row.point.length): row
                for row in mine
                if key(row)["page_size"] == page
            }
            shapes += panel(x, y, f"page {page}", ups, sizes, at, labelled=page == PAGES[0])
            x += len(sizes) * CELL + GAP
        right = max(right, x)
        y += len(ups) * CELL + GAP + 34
    width, height = right + 10, y + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">\n'
        "<style>.b{font-weight:bold}.r{text-anchor:end}.m{text-anchor:middle}.c{stroke:#ddd}</style>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        + text(8, 18, "Time with the heuristic's config over time with the tuned one", "b")
        + legend(width - 330, 10)
        + "".join(shapes)
        + "</svg>\n"
    )


def panel(
    x: int,
    y: int,
    title: str,
    ups: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    at: dict[tuple[int, int, int, int], Row],
    labelled: bool,
) -> list[str]:
    shapes = [text(x + len(sizes) * CELL // 2, y - 18, title, "m")]
    for batch in sorted({batch for batch, _ in sizes}):
        columns = [number for number, size in enumerate(sizes) if size[0] == batch]
        middle = x + (columns[0] + columns[-1] + 1) * CELL // 2
        shapes.append(text(middle, y - 5, f"b{batch}", "m"))
    for up, (heads, s_q) in enumerate(ups):
        if labelled:
            shapes.append(text(x - 5, y + up * CELL + 10, f"h{heads} s_q {s_q}", "r"))
        for across, (batch, length) in enumerate(sizes):
            row = at.get((heads, s_q, batch, length))
            if row is not None:
                title = f"h{heads} s_q {s_q} b{batch} {length}"
                shapes.append(square(x + across * CELL, y + up * CELL, gain(row), title))
    return shapes


def legend(x: int, y: int) -> str:
    steps = [1 + (HIGHEST - 1) * step / 10 for step in range(11)]
    return "".join(
        square(x + number * 22, y, value, "")
        + (text(x + number * 22 + 6, y + 24, f"{value:.1f}", "m") if number % 2 == 0 else "")
        for number, value in enumerate(steps)
    )


def square(x: int, y: int, value: float, title: str) -> str:
    """One point: white at a gain of 1, dark blue from `HIGHEST` on."""
    share = min(1.0, max(0.0, (value - 1) / (HIGHEST - 1))) ** 0.6
    red, green, blue = (round(255 + (dark - 255) * share) for dark in (8, 48, 107))
    inside = f"<title>{title}: {value:.2f}</title>" if title else ""
    colour = f"#{red:02x}{green:02x}{blue:02x}"
    size = f'width="{CELL - 1}" height="{CELL - 1}"'
    return f'<rect x="{x}" y="{y}" {size} class="c" fill="{colour}">{inside}</rect>\n'


def text(x: int, y: int, words: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>\n'


def short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


# -- the pages


def with_figures(page: str, name: str, figures: str) -> str:
    """A page with what stands between its marks replaced; ValueError where there are no marks."""
    begin = BEGIN.format(name)
    if begin not in page or END not in page:
        raise ValueError(f"page must have the marks {begin.strip()} and {END.strip()}")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{figures}\n{END}{after}"


def warmup_run(figures: dict[str, Any]) -> str:
    """What first_call.py measured."""
    head = figures["header"]
    lines = [
        f"{head['gpu']}, torch {head['torch']}, Triton {head['triton']}, {head['date']}, by "
        f"`{head['command']}`:",
        "",
        *(f"* {line}" for line in first_call.lines(figures)),
    ]
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / name).read_text(encoding="utf-8"))
    return found


def made() -> dict[Path, str]:
    """Every file that this writes, as it has to be."""
    table = shipped.load((9, 0))
    tuning, warmup = DOCS / "tuning.md", DOCS / "warmup.md"
    figures = gains(table) + "\n" + tune_run(read("tune_h200.json"))
    return {
        PICTURE: picture(table),
        tuning: with_figures(tuning.read_text(encoding="utf-8"), "tuning", figures),
        warmup: with_figures(
            warmup.read_text(encoding="utf-8"), "warmup", warmup_run(read("first_call_h200.json"))
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report_tuning.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args(argv)
    stale = [
        path
        for path, wanted in made().items()
        if not path.exists() or path.read_text(encoding="utf-8") != wanted
    ]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run this again", file=sys.stderr)
        return 1 if stale else 0
    for path, wanted in made().items():
        path.write_text(wanted, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
