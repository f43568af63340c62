"""Reads a page of Markdown and finds what in it is not true of this repository.

Every finding is one line, "page:line: what is wrong". What is looked at:

* paths in backticks, and the targets and anchors of links: they exist;
* ```python blocks: they run, one after another in one namespace a page, kernels in the interpreter;
* commands, in ```bash and ```console blocks and in backticks: what they name exists, `mla-triton`
  and `make` accept them, and those named in `RUN` are run;
* dotted names in backticks that begin with `mla_triton.` or `torch.ops.mla_triton.`: they resolve.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

PATH_ENDINGS = (".py", ".md", ".json", ".toml", ".txt", ".sh", ".yml", ".yaml", ".cfg", ".typed")
BARE_FILES = ("Makefile", "LICENSE")
MADE_LATER = (".venv", ".pytest_cache", "benchmarks/results", "build", "dist")
"""Paths that a command makes; a fresh checkout does not have them."""
UNITS = re.compile(r"(GB|TB|TFLOP|MB|KiB|bytes|tokens)/[a-z]+")

RUN = ("info", "explain")
"""`mla-triton` commands that are run wherever a block of a page has them: quick on any machine."""
PARSE_ONLY = ("check", "configs", "tune", "warmup")
"""`mla-triton` commands that are only parsed: they take minutes, or need a GPU."""
OTHER_PROGRAMS = ("cd", "export", "git", "nvidia-smi", "source")
"""Programs that pages may name without more being known about them."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of content."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    path: Path
    prose: str
    """The page with every line of its fenced blocks emptied, so that line numbers stay."""
    blocks: tuple[Block, ...]

    def at(self, line: int) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{line}"

    def line_of(self, position: int) -> int:
        return self.prose.count("\n", 0, position) + 1


def read(path: Path, text: str | None = None) -> Page:
    """Splits a page into prose and fenced blocks; ValueError for a fence that is never closed."""
    prose: list[str] = []
    blocks: list[Block] = []
    fence, language, content, start = "", "", [], 0
    for number, line in enumerate((path.read_text() if text is None else text).split("\n"), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*([\w-]*)", line)
        if not fence and mark:
            fence, language, content, start = mark[1], mark[2], [], number + 1
            prose.append("")
        elif fence and line.strip() == fence:
            blocks.append(Block(language, "\n".join(content), start))
            fence = ""
            prose.append("")
        elif fence:
            content.append(line)
            prose.append("")
        else:
            prose.append(line)
    if fence:
        raise ValueError(f"{path}:{start}: the block is never closed")
    return Page(path, "\n".join(prose), tuple(blocks))


def code_spans(page: Page) -> Iterator[tuple[int, str]]:
    """(line, text) of everything in single backticks."""
    for match in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", page.prose):
        yield page.line_of(match.start()), match[1]


# Paths and links


def looks_like_a_path(text: str) -> bool:
    if not re.fullmatch(r"\.?[\w*][\w.*-]*(/[\w.*-]+)*/?", text) or UNITS.fullmatch(text):
        return False
    named = text.endswith(PATH_ENDINGS) or text in BARE_FILES
    sizes = all(re.fullmatch(r"\d*", part) for part in text.split("/"))
    return (named or "/" in text) and not sizes


def path_exists(text: str, folder: Path) -> bool:
    if any(f"{text}/".startswith(f"{made}/") for made in MADE_LATER):
        return True
    if "*" in text:
        return any(True for base in (ROOT, folder) for _ in base.glob(text.rstrip("/")))
    return any((base / text).exists() for base in (ROOT, folder))


def missing_paths(page: Page) -> list[str]:
    return [
        f"{page.at(line)}: there is no {text}"
        for line, text in code_spans(page)
        if looks_like_a_path(text) and not path_exists(text, page.path.parent)
    ]


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def broken_links(page: Page) -> list[str]:
    found = []
    without_code = re.sub(r"`[^`\n]*`", lambda code: "x" * len(code[0]), page.prose)
    for match in re.finditer(r"\[[^\]]*\]\(([^)\s]+)\)", without_code):
        target = page.prose[match.start(1) : match.end(1)]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.path.parent / name if name else page.path
        where = page.at(page.line_of(match.start()))
        if name and not file.exists():
            found.append(f"{where}: there is no {target}")
        elif anchor:
            prose = page.prose if file == page.path else read(file).prose
            if anchor not in anchors(prose):
                found.append(f"{where}: {name or 'this page'} has no heading for #{anchor}")
    return found


# Names


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute or annotated field reachable from one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            if not hasattr(value, name):
                return name == parts[-1] and name in getattr(value, "__annotations__", {})
            value = getattr(value, name)
        return True
    return False


def unresolved_names(page: Page) -> list[str]:
    importlib.import_module("mla_triton")
    found = []
    for line, text in code_spans(page):
        match = re.match(r"((?:torch\.ops\.)?mla_triton(?:\.\w+)+)(?:\(.*)?$", text)
        if match and not resolves(match[1]):
            found.append(f"{page.at(line)}: {match[1]} does not resolve")
    return found


# Commands


def commands_of(block: Block) -> Iterator[tuple[int, str]]:
    """(line, command line) of a shell block; of a console block only what follows a prompt."""
    pending, begun = "", 0
    for number, raw in enumerate(block.text.split("\n"), block.line):
        line = raw.strip()
        if not pending:
            begun = number
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
        pending += line.removesuffix("\\")
        if not line.endswith("\\"):
            if pending.strip():
                yield begun, pending
            pending = ""


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without assignments, redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    skip = False
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;"):
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        elif set(word) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        else:
            words.append(word)


def wrong_with(words: list[str], run: bool) -> str | None:
    """What is wrong with a command, or None."""
    program = Path(words[0]).name
    checkers: dict[str, Callable[[list[str], bool], str | None]] = {
        "make": wrong_with_make,
        "mla-triton": wrong_with_mla_triton,
        "python": wrong_with_python,
        "python3": wrong_with_python,
        "pytest": wrong_with_pytest,
        "pip": wrong_with_pip,
        "bash": wrong_with_script,
    }
    if program in OTHER_PROGRAMS:
        return None
    if program not in checkers:
        return f"nothing is known of the program {words[0]}"
    return checkers[program](words[1:], run)


def wrong_with_make(words: list[str], run: bool) -> str | None:
    done = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"make {' '.join(words)}: {done.stderr.strip()}" if done.returncode else None


def wrong_with_mla_triton(words: list[str], run: bool) -> str | None:
    """Lets the parser of the command line read the words, and runs what is in `RUN`."""
    from mla_triton import cli

    if not words:
        return None
    shown = " ".join(["mla-triton", *words])
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in RUN + PARSE_ONLY:
        return f"{shown}: is in neither RUN nor PARSE_ONLY of tests/doccheck.py"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            cli.parser().parse_args(words)
    except SystemExit as stop:
        if stop.code:
            return f"{shown}: {complaint.getvalue().strip().splitlines()[-1]}"
        return None
    if run and command in RUN:
        done = run_python("-m", "mla_triton", *words)
        if done.returncode:
            return f"{shown}: exit code {done.returncode}: {done.stderr.strip()}"
    return None


def wrong_with_python(words: list[str], run: bool) -> str | None:
    if words[:1] == ["-c"] and len(words) > 1:
        done = run_python(*words)
        return f"python -c: {done.stderr.strip()}" if done.returncode else None
    if words[:1] == ["-m"] and len(words) > 1:
        module, rest = words[1], words[2:]
        if module == "mla_triton":
            return wrong_with_mla_triton(rest, run)
        if module in ("pytest", "pip"):
            return {"pytest": wrong_with_pytest, "pip": wrong_with_pip}[module](rest, run)
        found = importlib.util.find_spec(module) is not None
        return None if found else f"python -m {module}: there is no such module"
    return wrong_with_script(words, run)


def wrong_with_script(words: list[str], run: bool) -> str | None:
    script = next((word for word in words if not word.startswith("-")), None)
    if script is None or (ROOT / script).is_file():
        return None
    return f"there is no {script}"


def wrong_with_pytest(words: list[str], run: bool) -> str | None:
    for word in words:
        path = word.split("::")[0]
        if not word.startswith("-") and looks_like_a_path(path) and not (ROOT / path).exists():
            return f"there is no {path}"
    return None


def wrong_with_pip(words: list[str], run: bool) -> str | None:
    declared = (ROOT / "pyproject.toml").read_text()
    for word in words:
        match = re.fullmatch(r"(?:\.|mla-triton)\[([\w,-]+)\]", word)
        for extra in match[1].split(",") if match else []:
            if not re.search(rf"^{extra} = \[", declared, re.MULTILINE):
                return f"{word}: pyproject.toml has no extra {extra}"
    return None


def wrong_commands(page: Page) -> list[str]:
    found = []
    named = [
        (line, text, False)
        for line, text in code_spans(page)
        if re.match(r"(make|mla-triton|python3?|pytest|pip) [\w.-]", text) and "..." not in text
    ]
    for block in page.blocks:
        if block.language in ("bash", "console", "sh", "shell"):
            named += [(line, text, True) for line, text in commands_of(block)]
    for line, text, run in named:
        try:
            complaints = [wrong_with(words, run) for words in simple_commands(text)]
        except ValueError as error:
            complaints = [f"{text}: {error}"]
        found += [f"{page.at(line)}: {complaint}" for complaint in complaints if complaint]
    return found


# Python blocks


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python on the CPU, kernels in Triton's interpreter, whatever this machine has."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip


IN_ONE_LINE = """
import sys, traceback
def in_one_line(kind, error, trace):
    traceback.print_exception(kind, error, trace)
    print(f"{kind.__name__}: {error}".splitlines()[0], file=sys.stderr)
sys.excepthook = in_one_line
"""


def failing_blocks(page: Page) -> list[str]:
    """Runs the page's ```python blocks in one process; the first that fails ends the page."""
    blocks = [block for block in page.blocks if block.language in ("python", "py")]
    if not blocks:
        return []
    name = page.at(0).rpartition(":")[0]
    script = [IN_ONE_LINE, "namespace = {'__name__': '__main__'}"]
    for block in blocks:
        # Emptied lines before it give tracebacks the page's own line numbers.
        text = "\n" * (block.line - 1) + block.text
        script.append(f"exec(compile({text!r}, {name!r}, 'exec'), namespace)")
    done = run_python("-c", "\n".join(script))
    if not done.returncode:
        return []
    lines = re.findall(rf'File "{re.escape(name)}", line (\d+)', done.stderr)
    where = page.at(int(lines[-1])) if lines else page.at(blocks[0].line)
    last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return [f"{where}: {last}"]


CHECKS: dict[str, Callable[[Page], list[str]]] = {
    "paths": missing_paths,
    "links": broken_links,
    "names": unresolved_names,
    "commands": wrong_commands,
    "python": failing_blocks,
}
