"""Every path, link, command, name and Python block in the documentation works.

`doccheck` does the reading; the first half of this file shows that it finds what is wrong.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import doccheck
import pytest
from doccheck import ROOT, Page

import mla_triton

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def page(text: str) -> Page:
    return doccheck.read(ROOT / "docs" / "planted.md", dedent(text))


# What is wrong is found


@pytest.mark.parametrize(
    ("check", "text", "finding"),
    [
        (
            "paths",
            "See `mla_triton/no_such.py`.",
            "docs/planted.md:1: there is no mla_triton/no_such",
        ),
        ("paths", "\n\nIn `kernels/nowhere/`.", "docs/planted.md:3: there is no kernels/nowhere/"),
        ("paths", "`nowhere.md`", "there is no nowhere.md"),
        ("paths", "`tests/**/*.rs`", "there is no tests/**/*.rs"),
        ("links", "[a](missing.md)", "there is no missing.md"),
        ("links", "[a](../README.md#no-such-heading)", "has no heading for #no-such-heading"),
        ("links", "# One\n[a](#two)", "docs/planted.md:2: this page has no heading for #two"),
        ("names", "`mla_triton.no_such_name`", "mla_triton.no_such_name does not resolve"),
        ("names", "`mla_triton.decode.nothing`", "mla_triton.decode.nothing does not resolve"),
        ("names", "`mla_triton.AttentionState.nothing`", "does not resolve"),
        ("names", "`mla_triton.no_such(q)`", "mla_triton.no_such does not resolve"),
        ("commands", "Type `make nothing`.", "No rule to make target 'nothing'"),
        ("commands", "```bash\nmake demo\nmake nothing\n```", "docs/planted.md:3: make nothing"),
        ("commands", "```bash\ncd x && make nothing\n```", "No rule to make target"),
        ("commands", "```bash\nA=1 make nothing # comment\n```", "No rule to make target"),
        ("commands", "```console\n$ make nothing\noutput\n```", "No rule to make target"),
        ("commands", "`mla-triton frobnicate`", "is in neither RUN nor PARSE_ONLY"),
        ("commands", "```sh\nmla-triton info --no-such-option\n```", "--no-such-option"),
        ("commands", "```sh\nmla-triton explain --capability 1.0\n```", "exit code"),
        (
            "commands",
            "```sh\npython benchmarks/nothing.py\n```",
            "there is no benchmarks/nothing.py",
        ),
        ("commands", "```sh\npython -m no_such_module\n```", "there is no such module"),
        ("commands", "```sh\npython -c 'import no_such_module'\n```", "No module named"),
        (
            "commands",
            "```sh\npython -m pytest tests/test_no.py\n```",
            "there is no tests/test_no.py",
        ),
        ("commands", "```sh\npip install 'mla-triton[nothing]'\n```", "has no extra nothing"),
        ("commands", "```sh\nfrobnicate --now\n```", "nothing is known of the program frobnicate"),
        ("commands", "```sh\necho 'unclosed\n```", "No closing quotation"),
        ("python", "```python\nx = 1\nassert x == 2\n```", "docs/planted.md:3: AssertionError"),
        ("python", "```python\nx = = 1\n```", "SyntaxError"),
        ("python", "```python\nx = 1\n```\n```python\nx / 0\n```", "docs/planted.md:5: ZeroDiv"),
    ],
)
def test_wrong_is_found(check: str, text: str, finding: str) -> None:
    findings = doccheck.CHECKS[check](page(text))
    assert len(findings) == 1
    assert finding in findings[0]


@pytest.mark.parametrize(
    ("check", "text"),
    [
        ("paths", "`mla_triton/plan.py`, `tests/`, `tests/*.py`, `Makefile`, `.ci/run`, `docs/`"),
        (
            "paths",
            "`512/64`, `[pages, page_size]`, `~/.cache/x`, `GB/s`, `.venv/bin/python`, `x.y`",
        ),
        ("links", "# A b: `c`\n[x](#a-b-c) [y](../pyproject.toml) [z](https://nowhere.invalid/)"),
        ("links", "`[not](a-link)`"),
        (
            "names",
            "`mla_triton.decode`, `mla_triton.decode(q, ...)`, `mla_triton.AttentionState.lse`",
        ),
        ("names", "`mla_triton.problem.DecodeProblem.heads`, `mla_triton.plan`"),
        ("commands", "`make test`, `mla-triton info`, `mla-triton explain --heads ...`"),
        ("commands", "```bash\nmake demo PYTHON=python3.12\nbash .ci/run > log\n```"),
        (
            "commands",
            "```console\n$ mla-triton explain \\\n    --help\nthis is output, not a command\n```",
        ),
        ("commands", "```text\nfrobnicate\n```"),
        ("python", "```python\nx = 1\n```\nand\n```python\nassert x == 1\n```"),
        ("python", "```python\nimport os\nassert os.environ['TRITON_INTERPRET'] == '1'\n```"),
        ("python", "```text\nnot python\n```"),
    ],
)
def test_right_is_left_alone(check: str, text: str) -> None:
    assert doccheck.CHECKS[check](page(text)) == []


def test_a_block_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="never closed"):
        page("```python\nx = 1\n")


def test_line_numbers_survive_blocks() -> None:
    assert doccheck.missing_paths(page("```text\na\nb\n```\n`no/file`"))[0].startswith(
        "docs/planted.md:5:"
    )


# The documentation


@pytest.mark.parametrize("check", doccheck.CHECKS)
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path: Path, check: str) -> None:
    assert doccheck.CHECKS[check](doccheck.read(path)) == []


def test_readme_begins_with_the_demo_and_the_tests() -> None:
    readme = doccheck.read(ROOT / "README.md")
    shell = [block for block in readme.blocks if block.language == "bash"]
    commands = [line for block in shell for _, line in doccheck.commands_of(block)]
    assert [command.split("#")[0].strip() for command in commands[:2]] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_architecture_says_what_every_file_is_for() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mla_triton").rglob("*.py")}
    assert modules == set(re.findall(r"^\| `(mla_triton/[\w/.]+\.py)` \|", table, re.MULTILINE))


def test_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert mla_triton.__version__ in versions
