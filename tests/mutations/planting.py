"""Plants a bug in a real module: its own text, with an edit, takes the place of what was there.

Of the edited module, and of every loaded module of the kernels that imports it, the text is run
anew in the module that there is. So whoever holds the module has the bug, and functions that
another one took from it by name have it, too. What operations keep (configs, launchers, recorded
calls) is forgotten on the way in and on the way out, and the modules are then to the last name what
they were. Compiled code goes to a cache that is thrown away. Not thread-safe.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import triton
from triton.runtime.interpreter import InterpretedFunction

from mla_triton.ops.recall import Memory

PACKAGE = "mla_triton"
EDITABLE = f"{PACKAGE}.kernels."
"""Modules that may be edited: nothing outside them takes a function of them by name."""


class DoesNotApply(AssertionError):
    """The text that a bug is planted at is not there, or not there alone."""


class Edit(NamedTuple):
    """Text of a module that becomes other text. It is in the module exactly once."""

    module: str
    """Without the package: "kernels.portable.decode"."""
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{PACKAGE}.{self.module}"

    def apply(self, text: str) -> str:
        if not self.name.startswith(EDITABLE):
            raise ValueError(f"module must be one of {EDITABLE}*, got {self.name}")
        found = text.count(self.old)
        if found != 1:
            raise DoesNotApply(
                f"the bug no longer applies: {self.name} has {self.old!r} {found} times, not once"
            )
        if self.old == self.new:
            raise ValueError("new must differ from old")
        return text.replace(self.old, self.new)


@contextmanager
def planted(edits: Sequence[Edit]) -> Iterator[None]:
    """Inside, operations run with the edits; each is of its module as it is on disk."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.name) or source_of(module_of(edit.name))
        texts[edit.name] = edit.apply(text)
    again = [sys.modules[name] for name in in_order(dependents(set(texts)))]
    before = [dict(vars(module)) for module in again]
    known = set(InterpretedFunction.rewritten_fn)
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = compiled_code().name
        forget()
        try:
            for module in again:
                file = Path(module.__file__ or "")
                if module.__name__ in texts:
                    # On disk, because Triton asks for the text of a function.
                    file = Path(folder) / f"{module.__name__}.py"
                    file.write_text(texts[module.__name__])
                code = compile(source_at(file), file, "exec", dont_inherit=True)
                exec(code, vars(module))
            yield
        finally:
            for module, names in zip(again, before, strict=True):
                vars(module).clear()
                vars(module).update(names)
            for function in set(InterpretedFunction.rewritten_fn) - known:
                del InterpretedFunction.rewritten_fn[function]
            for file in [name for name in linecache.cache if name.startswith(folder)]:
                del linecache.cache[file]
            forget()


@functools.cache
def compiled_code() -> tempfile.TemporaryDirectory[str]:
    """Where Triton keeps what it compiles inside, for as long as this process lives."""
    return tempfile.TemporaryDirectory()


def module_of(name: str) -> ModuleType:
    """ValueError where nothing has loaded it: then it is in no operation's way."""
    if name not in sys.modules:
        raise ValueError(f"module must be one that is loaded, got {name}")
    return sys.modules[name]


def source_at(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def source_of(module: ModuleType) -> str:
    return source_at(Path(module.__file__ or ""))


@functools.cache
def imports_of(name: str) -> frozenset[str]:
    """What a module's text imports, or may import names from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source_of(sys.modules[name]))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def dependents(edited: set[str]) -> dict[str, set[str]]:
    """The edited modules and those that need them, each with what of these it needs itself."""
    kernels = [name for name in sys.modules if name.startswith(EDITABLE)]
    imports = {name: imports_of(name) for name in kernels}
    reached, more = set(edited), set(edited)
    while more:
        more = {name for name in kernels if imports[name] & reached} - reached
        reached |= more
    return {name: set(imports[name] & reached) for name in reached}


def in_order(needed: dict[str, set[str]]) -> list[str]:
    """Every module behind those that it needs."""
    done: list[str] = []
    while len(done) < len(needed):
        done += sorted(n for n in needed if n not in done and needed[n] <= set(done))
    return done


def forget() -> None:
    """Empties what the package keeps of earlier calls."""
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        for value in list(vars(sys.modules[name]).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
            elif isinstance(value, Memory):
                value.clear()
