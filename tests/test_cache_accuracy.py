"""The table in docs/cache.md of what formats cost in accuracy is what its script computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def script() -> ModuleType:
    path = DOCS / "generate_cache_accuracy.py"
    spec = importlib.util.spec_from_file_location("generate_cache_accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = script()


def documented() -> dict[str, list[float]]:
    """Percent by the format's name."""
    page = (DOCS / "cache.md").read_text(encoding="utf-8")
    table = page.split(MADE.BEGIN)[1].split(MADE.END)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {name: [float(cell.rstrip(" %")) for cell in cells] for name, *cells in rows[2:]}


def test_the_table_has_every_format():
    assert list(documented()) == [form.text for form in MADE.FORMS]


@pytest.mark.parametrize("form", MADE.FORMS, ids=lambda form: form.text)
def test_the_table_is_what_the_script_computes(form):
    """Within the rounding to two digits, and that twice: float64 sums have another order on another
    machine."""
    for said, error in zip(documented()[form.text], MADE.errors(form), strict=True):
        assert 100 * error == pytest.approx(said, rel=0.1 / 2)


def test_the_script_finds_a_page_that_says_something_else(monkeypatch, tmp_path):
    monkeypatch.setattr(MADE, "errors", lambda form: (0.01, 0.02, 0.03))
    page = tmp_path / "cache.md"
    page.write_text(f"before\n{MADE.BEGIN}\n{MADE.END}after\n", encoding="utf-8")
    monkeypatch.setattr(MADE, "PAGE", page)
    assert MADE.main(["--check"]) == 1
    assert MADE.main([]) == 0
    assert MADE.main(["--check"]) == 0
    made = page.read_text(encoding="utf-8")
    assert "| bfloat16 | 1 % | 2 % | 3 % |" in made
    assert made.startswith("before\n")
    assert made.endswith("after\n")
