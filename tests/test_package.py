"""The package as a whole: what it imports and when, which way imports run, what a wheel contains.

The rules are read off the syntax tree, so that an import inside a function counts too. Each rule is
first shown to catch a planted breach.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

import mla_triton

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mla_triton"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_LINES = 600

# (module, what it must not import), both by the start of a dotted name. The first that fits counts.
UPPER = (
    "ops", "select", "validate", "validate_merge", "cli", "check", "explain", "compat", "tuning",
    "testing", "validate_stored", "validate_append", "validate_gather", "validate_copy",
)  # fmt: skip
ARROWS: list[tuple[str, tuple[str, ...]]] = [
    ("mla_triton.reference", ("triton", "mla_triton.kernels", *(f"mla_triton.{m}" for m in UPPER))),
    (
        "mla_triton.kernels",
        ("mla_triton.reference", "mla_triton.configs", *(f"mla_triton.{m}" for m in UPPER)),
    ),
    ("mla_triton.plan", ("torch", "triton", "numpy", "mla_triton")),
    ("mla_triton.problem", ("triton", "mla_triton")),
    ("mla_triton.device", ("triton", "mla_triton")),
    ("mla_triton.state", ("triton", "mla_triton")),
    ("mla_triton.memory", ("triton", "mla_triton")),
    ("mla_triton.cache", ("triton", "mla_triton.kernels", *(f"mla_triton.{m}" for m in UPPER))),
    (
        "mla_triton.validate",
        ("triton", "mla_triton.kernels", "mla_triton.ops", "mla_triton.select"),
    ),
    (
        "mla_triton.validate_merge",
        ("triton", "mla_triton.kernels", "mla_triton.ops", "mla_triton.select"),
    ),
    *(
        (
            f"mla_triton.{name}",
            ("triton", *(f"mla_triton.{m}" for m in ("kernels", "ops", "select"))),
        )
        for name in ("validate_stored", "validate_append", "validate_gather", "validate_copy")
    ),
    ("mla_triton.problem_cache", ("triton", "mla_triton")),
    ("mla_triton.select", ("mla_triton.ops", "mla_triton.cli", "mla_triton.testing")),
    (
        "mla_triton.configs",
        ("mla_triton.ops", "mla_triton.cli", "mla_triton.tuning", "mla_triton.testing"),
    ),
    (
        "mla_triton.ops",
        ("mla_triton.cli", "mla_triton.tuning", "mla_triton.compat", "mla_triton.testing"),
    ),
    (
        "mla_triton.compat",
        (
            "triton",
            "mla_triton.kernels",
            "mla_triton.reference",
            "mla_triton.cli",
            "mla_triton.tuning",
            "mla_triton.testing",
        ),
    ),
]
ENVIRONMENT = {
    "mla_triton": {"MLA_TRITON_CACHE_DIR", "MLA_TRITON_DEBUG"},
    "mla_triton.configs": {"MLA_TRITON_CACHE_DIR", "XDG_CACHE_HOME"},
    "mla_triton.device": {"TRITON_INTERPRET"},
    "mla_triton.cli": {"TRITON_INTERPRET"},
    "mla_triton.testing": {"TRITON_INTERPRET"},
}
"""Environment variables that a module may read, by the start of its name."""


# -- the rules, as functions of a source text


def imported(source: str) -> list[str]:
    """Dotted names of everything that a module imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def begins(name: str, start: str) -> bool:
    return name == start or name.startswith(start + ".")


def forbidden_imports(module: str, source: str) -> list[str]:
    banned = next((list(bans) for name, bans in ARROWS if begins(module, name)), [])
    parts = module.split(".")
    if begins(module, "mla_triton.kernels") and len(parts) > 2:
        architectures = {name.split(".")[2] for name in MODULES if name.count(".") > 1}
        architectures -= {parts[2], "common"}
        banned += [f"mla_triton.kernels.{name}" for name in sorted(architectures)]
    return [
        name
        for name in imported(source)
        if any(begins(name, ban) for ban in banned) and not begins(name, module)
    ]


def environment_reads(source: str) -> list[str]:
    """Names of the environment variables that a module touches; "?" for one that is computed.

    Handing the whole environment on to a subprocess (`dict(os.environ, ...)`) touches none.
    """
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []

    def literal(node: ast.expr) -> str:
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found += ["?" for alias in node.names if alias.name in ("environ", "getenv", "putenv")]
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if (node.value.id, node.attr) not in (("os", "environ"), ("os", "getenv")):
            continue
        user = parents[node]
        if isinstance(user, ast.Attribute) and isinstance(parents[user], ast.Call):
            user = parents[user]
            found.append(literal(user.args[0]) if user.args else "")
        elif isinstance(user, ast.Subscript):
            found.append(literal(user.slice))
        elif isinstance(user, ast.Compare):
            found.append(literal(user.left))
        elif isinstance(user, ast.Call) and user.func is node:
            found.append(literal(user.args[0]))
        elif not isinstance(user, ast.Dict | ast.BinOp | ast.Call):
            found.append("?")
    return [name for name in found if name]


def allowed_environment(module: str) -> set[str]:
    return {name for start, names in ENVIRONMENT.items() if begins(module, start) for name in names}


def undocumented(module: ModuleType) -> list[str]:
    """Names in a module's `__all__` that have no docstring of their own."""
    public = {name: getattr(module, name) for name in getattr(module, "__all__", [])}
    return [
        name
        for name, value in public.items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and not value.__doc__
    ]


# -- each rule can fail


def test_forbidden_imports_are_found() -> None:
    lazy = "def f():\n    from mla_triton.kernels import portable\n"
    assert forbidden_imports("mla_triton.reference.decode", lazy)
    assert forbidden_imports("mla_triton.reference.decode", "import triton.language as tl")
    assert not forbidden_imports("mla_triton.reference.decode", "from mla_triton.state import A")
    assert forbidden_imports("mla_triton.kernels.sm90.decode", "import mla_triton.kernels.portable")
    assert forbidden_imports(
        "mla_triton.kernels.common.x", "from mla_triton.kernels import portable"
    )
    assert forbidden_imports("mla_triton.kernels.portable.x", "from mla_triton import reference")
    assert not forbidden_imports(
        "mla_triton.kernels.portable.x", "from mla_triton.kernels.common import y"
    )
    assert forbidden_imports("mla_triton.plan", "import torch")
    assert forbidden_imports("mla_triton.problem", "from mla_triton import select")
    # A name that only begins alike is another name.
    assert not forbidden_imports("mla_triton.problem", "import mla_triton_tools, tritonclient")


def test_environment_reads_are_found() -> None:
    source = dedent("""
        import os
        a = os.environ["A"]
        b = os.environ.get("B", "")
        c = os.getenv("C")
        d = "D" in os.environ
        e = os.environ[name]
        f = os.environ.setdefault("F", "1")
        whole = os.environ
        handed_on = dict(os.environ, G="1") | {**os.environ}
        copied = os.environ.copy()
    """)
    assert sorted(environment_reads(source)) == ["?", "?", "A", "B", "C", "D", "F"]
    assert environment_reads("from os import environ") == ["?"]


def test_missing_docstrings_are_found() -> None:
    module = ModuleType("planted")
    code = '__all__ = ["a", "b", "C"]\ndef a(): ...\ndef b(): "Doc."\nclass C: ...\n'
    exec(code, vars(module))
    assert undocumented(module) == ["a", "C"]


# -- the package keeps them


def test_there_are_modules_to_check() -> None:
    assert {"mla_triton", "mla_triton.plan", "mla_triton.device"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module: str) -> None:
    source = MODULES[module].read_text()
    assert not forbidden_imports(module, source)
    assert not set(environment_reads(source)) - allowed_environment(module)
    assert len(source.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is(module: str) -> None:
    if MODULES[module].stat().st_size:
        assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_module_imports_and_its_public_names_are_documented(module: str) -> None:
    assert not undocumented(importlib.import_module(module))


def test_the_plan_needs_the_standard_library_alone() -> None:
    source = MODULES["mla_triton.plan"].read_text()
    roots = {name.split(".")[0] for name in imported(source)}
    assert roots <= sys.stdlib_module_names


def test_public_names() -> None:
    assert len(mla_triton.__all__) == len(set(mla_triton.__all__))
    assert {"decode", "plan", "prefill", "LatentCache", "CSRPageTable", "AttentionState"} <= set(
        mla_triton.__all__
    )
    for name in mla_triton.__all__:
        assert getattr(mla_triton, name) is not None
    functions = [o for n in mla_triton.__all__ if inspect.isfunction(o := getattr(mla_triton, n))]
    assert functions
    for function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (function, parameter)


def test_options_of_operations_are_keyword_only() -> None:
    positional = {
        name: [
            p.name
            for p in inspect.signature(getattr(mla_triton, name)).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        for name in ("append", "copy_pages", "decode", "gather", "merge", "plan", "prefill")
    }
    assert positional == {
        "append": ["cache", "latent", "rope", "slot_mapping"],
        "copy_pages": ["cache_from", "cache_to", "source_pages", "target_pages"],
        "gather": ["cache", "page_table", "cu_seqlens_k"],
        "decode": ["q_nope", "q_rope", "cache", "page_table", "kv_lens"],
        "merge": ["states"],
        "plan": ["kv_lens"],
        "prefill": ["q", "k", "v"],
    }


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_import_touches_neither_gluon_nor_the_gpu() -> None:
    done = run("""
        import sys
        import torch

        def refuse(*_args, **_options):
            raise AssertionError("importing the package touched the GPU")

        for name in ("is_available", "device_count", "current_device", "get_device_properties",
                     "get_device_capability", "init", "_lazy_init"):
            setattr(torch.cuda, name, refuse)

        import mla_triton

        assert mla_triton.__version__
        assert not torch.cuda.is_initialized()
        gluon = [name for name in sys.modules if "gluon" in name and name.startswith("mla_triton")]
        assert not gluon, gluon
        assert "triton.experimental.gluon" not in sys.modules
        heavy = {"transformers", "hypothesis", "pytest", "mla_triton.testing", "mla_triton.cli"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """)
    assert done.returncode == 0, done.stderr


def test_wheel_has_what_a_user_needs_and_no_more(tmp_path: Path) -> None:
    pytest.importorskip(
        "hatchling", reason="the wheel is built with the environment's own hatchling"
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"mla_triton-{mla_triton.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(n for n in names if n.endswith("dist-info/entry_points.txt"))
        assert "mla-triton = mla_triton.cli:main" in archive.read(entry_points).decode()
    assert {"mla_triton/__init__.py", "mla_triton/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shipped = {name.split("/")[0] for name in names}
    assert shipped == {"mla_triton", f"mla_triton-{mla_triton.__version__}.dist-info"}
    assert {str(path.relative_to(ROOT)) for path in MODULES.values()} <= names
    tables = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.json")}
    assert tables <= names
    assert not any("__pycache__" in name or name.startswith("tests/") for name in names)
