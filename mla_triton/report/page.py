"""A report as one file of HTML: nothing to load, nothing to execute, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mla_triton.report import environment, histogram
from mla_triton.report.examine import Measure, Row
from mla_triton.report.text import equality, same, share, verdict
from mla_triton.testing.cache_results import Bits

TITLES = {
    "out": "out, largest element", "out_rms": "out, root mean square", "lse": "lse",
    "stored": "stored numbers",
}  # fmt: skip
"""What a measure is called on the page."""

STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --back: #ffffff; --soft: #5d6873;
  --line: #d5dbe1; --panel: #f4f6f8; --good: #1f7a4d; --bad: #b3261e; --bar: #3b74b8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --back: #14181c; --soft: #9aa5b1;
  --line: #363e47; --panel: #1d2329; --good: #5cc08d; --bad: #ff8a80; --bar: #7fb2ec; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); } td.number { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
code, pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: .6rem .8rem; white-space: pre-wrap; margin: .5rem 0; }
.ok { color: var(--good); } .failed { color: var(--bad); font-weight: 600; }
.note { color: var(--soft); max-width: 46rem; }
details { border-bottom: 1px solid var(--line); padding: .25rem 0; }
summary { cursor: pointer; } .figures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { margin: .5rem 0; max-width: 22rem; } figcaption { font-size: 13px; color: var(--soft); }
svg { max-width: 100%; height: auto; display: block; }
svg text { font: 10px ui-monospace, monospace; fill: var(--soft); text-anchor: middle; }
svg .axis, svg .tick { stroke: var(--line); fill: none; }
svg .budget { stroke: var(--text); stroke-dasharray: 3 3; fill: none; }
svg .within { fill: var(--bar); } svg .beyond { fill: var(--bad); }
"""


def page(found: dict[str, Any], seed: int, repeats: int, rows: Sequence[Row]) -> str:
    """The whole page."""
    failed, right = ([row for row in rows if row.ok is kind] for kind in (False, True))
    state = "failed" if failed else "ok"
    environment_rows = [*environment.entries(found), ("seed", str(seed))]
    environment_rows.append(("calls", f"{1 + repeats} of each case"))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>mla-triton check: {escape(verdict(rows))}</title><style>{STYLE}</style></head>",
        "<body><h1>mla-triton check --deep</h1>",
        f'<p class="{state}">{escape(verdict(rows))}</p>',
        '<div class="scroll"><table>',
        *(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in environment_rows),
        "</table></div>",
        *(_overview(rows) if rows else []),
        '<p class="note">A bar is a number of rows, (query, head) pairs, by the share of its error '
        "budget that a row has used: the dashed line is what is allowed. The bar furthest left has "
        "all below a thousandth and what is exact, the one furthest right all beyond a hundred "
        "budgets, and NaN where there must be none. Of stored numbers a row is a token. What has "
        "to be the reference's to the bit has no errors to draw: its bytes are counted.</p>",
        *(["<h2>What failed</h2>", *map(_case, failed)] if failed else []),
        *(["<h2>What is right</h2>", *map(_case, right)] if right else []),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _overview(rows: Sequence[Row]) -> Iterable[str]:
    """All rows of all cases of an operation in one picture for each measure, and a table."""
    yield "<h2>All cases together</h2>"
    for operation in dict.fromkeys(row.operation for row in rows):
        own = [row for row in rows if row.operation == operation]
        right = sum(row.ok for row in own)
        yield f"<h3>{operation}: {right} of {len(own)} right</h3>"
        figures = []
        for name in TITLES:
            measures = [m for row in own for m in row.measures if m.name == name]
            if measures:
                together = [
                    sum(column) for column in zip(*(m.histogram for m in measures), strict=True)
                ]
                worst = max(measure.ratio for measure in measures)
                figures.append(_figure(name, together, f"largest share {share(worst)}"))
        if figures:
            yield f'<div class="figures">{"".join(figures)}</div>'
        compared = sum(each.compared for row in own for each in row.bits)
        if compared:
            differing = sum(row.differing_bytes for row in own)
            said = f"{differing} differ" if differing else "equal bits"
            yield f"<p>{compared} bytes held against the reference's: {said}.</p>"


def _case(row: Row) -> str:
    """One row, folded; those that failed are open."""
    parts = {None: "", 1: " in one part"}.get(row.parts, f" in {row.parts} parts")
    state = '<span class="ok">ok</span>' if row.ok else '<span class="failed">FAILED</span>'
    ratios = ", ".join(f"{m.name.replace('_', ' ')} {share(m.ratio)}" for m in row.measures)
    if row.is_exact:
        ratios = equality(row)
    head = f"{row.operation} {row.shape} {row.dtype}, {row.call}; {row.implementation}{parts}"
    body = [f"<summary>{state} {escape(head)} <code>{escape(ratios)}</code></summary>"]
    if not row.ok:
        body.append(f"<pre>{escape(row.message)}</pre>")
    if row.traceback:
        body.append(f"<pre>{escape(row.traceback)}</pre>")
    if row.measures:
        figures = "".join(_figure(m.name, m.histogram, m.text) for m in row.measures)
        body.append(f'<div class="figures">{figures}</div>')
        body.append(f'<div class="scroll"><table>{"".join(_table(row.measures))}</table></div>')
    if row.bits:
        body.append(f'<div class="scroll"><table>{"".join(_bits(row.bits))}</table></div>')
    if row.measures or row.bits:
        body.append(
            f"<p>Repeats with the bits of the first call: {same(row)}. Config: "
            f"{escape(row.config)} ({escape(row.config_source)}). {row.seconds:.2f} s.</p>"
        )
    body.append(f"<pre>{escape(row.reproduction)}</pre>")
    opened = "" if row.ok else " open"
    return f"<details{opened}>{''.join(body)}</details>"


def _table(measures: Iterable[Measure]) -> Iterable[str]:
    titles = ("measure", "share", "error", "budget", "worst at", "got", "expected", "rows over")
    yield "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    for m in measures:
        cells = (
            TITLES[m.name], share(m.ratio), f"{m.error:.3g}", f"{m.budget:.3g}", m.place,
            f"{m.got:.9g}", f"{m.expected:.9g}", f"{m.over} of {m.rows}",
        )  # fmt: skip
        yield "<tr>" + "".join(f'<td class="number">{escape(c)}</td>' for c in cells) + "</tr>"


def _bits(found: Iterable[Bits]) -> Iterable[str]:
    """A line for each kind of bytes that have to be the reference's."""
    titles = ("to the bit", "bytes compared", "bytes that differ", "first")
    yield "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    for each in found:
        state = "failed" if each.differing else "ok"
        said = str(each.differing) if each.differing else "equal bits"
        yield (
            f"<tr><td>bytes {escape(each.what)}</td>"
            f'<td class="number">{each.compared}</td>'
            f'<td class="number"><span class="{state}">{said}</span></td>'
            f"<td>{escape(each.first or '-')}</td></tr>"
        )


def _figure(name: str, numbers: Sequence[int], caption: str) -> str:
    title = f"{TITLES[name]}: {sum(numbers)} rows by share of their budget"
    image = histogram.svg(numbers, title)
    said = f"<b>{TITLES[name]}</b><br>{escape(caption)}"
    return f"<figure>{image}<figcaption>{said}</figcaption></figure>"
