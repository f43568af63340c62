"""A process that serves a deployment that was warmed up compiles nothing.

Three deployments are warmed up once, for cards that need not be here; then `tests/warm_child.py`
makes calls of theirs in processes of its own and counts what Triton compiles. That every kernel of
every call is known to a warm-up is a property, and needs no compiler.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tables
import torch
import warm_child
from hypothesis import given, settings
from hypothesis import strategies as st

import mla_triton
from mla_triton import cli, configs
from mla_triton import device as devices
from mla_triton.configs import Choice, store
from mla_triton.configs.table import items
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Launcher
from mla_triton.kernels.portable import decode as portable
from mla_triton.models import MODELS
from mla_triton.ops import decode as operation
from mla_triton.ops import merge as merging
from mla_triton.ops import prefill as prefilling
from mla_triton.tuning import warm
from mla_triton.tuning.deployment import LAYOUTS, QUERIES, TABLES, describe
from mla_triton.tuning.warm import Warmed
from mla_triton.tuning.workers import Compiled, Job

CHILD = Path(__file__).with_name("warm_child.py")
SIZES = {"max_batch": 40, "max_len": 4096}
TUNED = {"heads": 16, "queries": "joined", **SIZES}
"""On the card whose table has several configs for it."""
VERIFYING = {"model": "MiniCPM3-4B", "tp": 4, "s_q": [2], "prefill_tokens": 2048, **SIZES}
RAGGED = {
    "heads": 12, "latent": 128, "rope": 32, "s_q": [2], "ragged": True, "dtype": "float16",
    "layout": "pair", "table": "csr", "queries": ["joined", "head_major"], "page_size": [48],
    **SIZES,
}  # fmt: skip


class Ready(NamedTuple):
    """A deployment whose kernels are in a directory."""

    label: str
    description: dict[str, Any]
    directory: Path
    warmed: Warmed


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No rows of this machine."""
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "rows"))
    forget()
    yield
    forget()


def forget() -> None:
    configs.forget()
    operation.forget()
    prefilling.forget()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mla_triton", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def serve(ready: Ready, seed: int = 0, **environment: str) -> dict[str, Any]:
    """What a process finds and compiles that serves the deployment."""
    description = json.dumps(ready.description)
    ran = subprocess.run(
        [sys.executable, str(CHILD), ready.label, str(seed), "300", description],
        env=os.environ
        | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(ready.directory)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def rowless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `own_cache`, for what is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("none")))
        configs.forget()
        yield
        configs.forget()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, rowless: None) -> Ready:
    """Warmed up by a process that interprets, if this one does."""
    directory = tmp_path_factory.mktemp("tuned")
    return Ready("9.0", TUNED, directory, warmed_up("9.0", directory, TUNED))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory, rowless: None) -> Ready:
    directory = tmp_path_factory.mktemp("ragged")
    return Ready("8.0", RAGGED, directory, warmed_up("8.0", directory, RAGGED))


@pytest.fixture(scope="module")
def verifying(tmp_path_factory: pytest.TempPathFactory, rowless: None) -> Ready:
    """By the command line, from a model's own file."""
    directory = tmp_path_factory.mktemp("verifying")
    ran = command("warmup", *options(directory), "--json")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("compiled: ")
    return Ready("8.9", VERIFYING, directory, Warmed(**json.loads(ran.stdout)))


def options(directory: Path) -> list[str]:
    """`VERIFYING` on the command line."""
    file = directory.with_name("minicpm3.json")
    known = MODELS["MiniCPM3-4B"]
    fields = {
        "num_attention_heads": known.heads, "kv_lora_rank": known.latent,
        "qk_nope_head_dim": known.nope, "qk_rope_head_dim": known.rope, "v_head_dim": known.v,
        "max_position_embeddings": known.context,
    }  # fmt: skip
    file.write_text(json.dumps(fields))
    return [
        "--from-model", str(file), "--tp", "4", "--s-q", "2", "--max-batch", "40", "--max-len",
        "4096", "--prefill-tokens", "2048", "--capability", "8.9", "--cache", str(directory),
    ]  # fmt: skip


def warmed_up(label: str, directory: Path, description: dict[str, Any]) -> Warmed:
    """Warms up, and holds what is said before, then and afterwards against each other."""
    asking = {"device": label, "check": True, "processes": 1, **description}
    before = mla_triton.warmup(cache=directory, **asking)
    assert before.kernels == before.compiled == len(before.missing) == len(set(before.missing))
    assert all(line.endswith(": not compiled") for line in before.missing)
    assert before.size == 0
    assert list(directory.rglob("*.cubin")) == []

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "load", lambda *_: pytest.fail("something is put on a GPU"))
        done = mla_triton.warmup(
            device=label, cache=str(directory), progress=lambda *at: seen.append(at), **description
        )
    assert seen == [(n, done.kernels) for n in range(1, done.kernels + 1)]
    assert (done.kernels, done.compiled, done.missing) == (before.kernels, before.kernels, ())
    assert (done.device, done.directory, done.launchers) == (label, str(directory), 0)
    files = [path for path in directory.rglob("*") if path.is_file()]
    groups = [path for path in files if path.name.startswith("__grp__")]
    assert len(groups) == done.kernels
    assert done.size == sum(path.stat().st_size for path in files if path not in groups)
    assert done.seconds > 0

    after = mla_triton.warmup(cache=directory, **asking)
    assert (after.kernels, after.compiled, after.missing) == (done.kernels, 0, ())
    return done


# -- a process that serves


@pytest.mark.parametrize(("name", "least"), [("tuned", 5), ("verifying", 16), ("ragged", 6)])
def test_a_process_that_serves_compiles_nothing(request, name, least):
    """Nor is much compiled that is never asked for."""
    ready = request.getfixturevalue(name)
    told = serve(ready)
    assert told["names"] == []
    assert told["compiled"] == []
    assert len(set(told["found"])) == len(told["found"]) >= least
    assert len(told["found"]) >= 0.75 * ready.warmed.kernels


def test_another_deployment_is_compiled(ragged):
    """So what is counted above can be counted."""
    wider = RAGGED | {"page_size": [48, 16], "queries": "joined", "s_q": 1}
    told = serve(ragged._replace(description=wider))
    assert told["compiled"]
    of_pages = [name for name in told["names"] if not name.startswith("copy_kernel(")]
    assert of_pages
    assert all("page_size 16" in name for name in of_pages)
    assert told["found"]


def test_kernels_and_keys_are_the_same_in_every_process(tuned):
    """Sets of names have another order in each; keys that had it found nothing."""
    first, second = (serve(tuned, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert first == second
    assert first["compiled"] == []
    here = [
        warm_child.plain(v) for v in warm.variants(describe(**TUNED), devices.from_label("9.0"))
    ]
    assert json.loads(json.dumps(here)) == first["warmed"]
    assert len(here) == tuned.warmed.kernels


# -- asking


def test_the_command_asks(verifying):
    done = command("warmup", *options(verifying.directory), "--check")
    count = verifying.warmed.kernels
    assert done.returncode == 0
    assert done.stdout == f"{count} kernels for 8.9: 0 not compiled\n"
    assert done.stderr.startswith(f"asked: {count} of {count}, ")


def test_what_is_gone_is_named_and_made_again(verifying, capsys):
    directory, kernels = verifying.directory, verifying.warmed.kernels
    group, *others = directory.rglob("__grp__combine_kernel*")
    shutil.rmtree(group.parent)
    asking = [*options(directory), "--check"]
    assert cli.main(["warmup", *asking]) == 1
    count, missing = capsys.readouterr().out.splitlines()
    assert count == f"{kernels} kernels for 8.9: 1 not compiled"
    assert re.fullmatch(
        r"missing: combine_kernel\(value 256, out_step 256, pieces \d+, levels \d+, (alone, )?"
        r"bf16, 4 warps, 1 stages\): not compiled",
        missing,
    )
    assert len(list(directory.rglob("combine_kernel*.cubin"))) == len(others) > 0

    assert cli.main(["warmup", *options(directory)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{kernels} kernels for 8.9: 1 compiled, {kernels - 1} found, in ")
    assert out.endswith(f" MB in {directory}\n")
    assert cli.main(["warmup", *asking]) == 0


def test_two_processes_warm_up_one_directory(tmp_path, rowless):
    """At once, from nothing: what each compiles the other may be writing."""
    description = {"heads": 16, "queries": "joined", "max_batch": 1, "max_len": 512}
    words = "--heads 16 --queries joined --max-batch 1 --max-len 512 --capability 8.0 --json"
    asked = ["warmup", *words.split(), "--processes", "1", "--cache", str(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: command(*asked), range(2)))
    for ran in both:
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["missing"] == []
    warmed = [Warmed(**json.loads(ran.stdout)) for ran in both]
    assert sum(one.compiled for one in warmed) >= warmed[0].kernels == warmed[1].kernels > 1
    assert list(tmp_path.rglob("tmp.*")) == []
    told = serve(Ready("8.0", description, tmp_path, warmed[0]))
    assert told["compiled"] == []
    assert told["found"]


def test_half_a_kernel_is_missing(ragged):
    """Triton takes it for a whole one, and then does not find the machine code."""
    machine_code = next(ragged.directory.rglob("combine_kernel*.cubin"))
    kept = machine_code.read_bytes()
    machine_code.unlink()
    asked = mla_triton.warmup(device="8.0", check=True, cache=ragged.directory, **RAGGED)
    machine_code.write_bytes(kept)
    (line,) = asked.missing
    assert line.startswith("combine_kernel(value 128, ")
    assert "cubin" in line


def test_what_does_not_compile_is_missing(monkeypatch, capsys):
    def run(jobs: Sequence[Job], *_: object) -> Iterator[tuple[int, Compiled]]:
        for number in reversed(range(len(jobs))):
            error = "CompilationError: no" if number == 1 else None
            yield number, Compiled(cached=number == 0, seconds=1.0, size=10**6, error=error)

    monkeypatch.setattr(warm.workers, "run", run)
    warmed = mla_triton.warmup(device="8.0", **RAGGED)
    (line,) = warmed.missing
    assert line.startswith("decode_kernel(")
    assert line.endswith(": CompilationError: no")
    assert warmed.compiled == warmed.kernels - 2
    assert cli.main(["warmup", "--capability", "8.0", "--heads", "8", "--max-batch", "1"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert " 1 found, in " in first
    assert second == f"missing: {line}".replace(line.split(": ")[0], second.split(": ")[1])


# -- tuned rows


def row_of(card: Device, values: tuple[int, int, int]) -> tuple[str, Any]:
    """Stores a row for calls of `TUNED`, and says how the names of its kernels end."""
    form = next(describe(**TUNED).forms(2))
    key, _, _ = portable.tuning_point(form, card)
    config = portable.Config(*values)
    assert portable.is_valid(config, form, card)[0]
    row = tables.row(1, 1024, values=items(vars(config)), key=key)
    store.save(card, tables.header(card), [row])
    forget()
    return f"bf16, {values[1]} warps, {values[2]} stages)"


def test_the_config_of_a_tuned_row_is_compiled(tuned):
    """The user's rows stand in place of the shipped ones, at all batches and lengths."""
    text = row_of(devices.from_label("9.0"), (16, 4, 4))
    asked = mla_triton.warmup(device="9.0", check=True, cache=tuned.directory, processes=1, **TUNED)
    (line,) = asked.missing
    assert "block_n 16," in line
    assert line.endswith(f"{text}: not compiled")
    warmed = mla_triton.warmup(device="9.0", cache=tuned.directory, **TUNED)
    assert (warmed.compiled, warmed.missing) == (1, ())


def test_rows_of_a_card_that_is_not_here(tuned, capsys):
    """By its name; without it, the rows are not for the card that is meant."""
    text = row_of(replace(devices.from_label("9.0"), name=tables.CARD.name), (16, 4, 3))
    asking = [
        "warmup", "--capability", "9.0", "--cache", str(tuned.directory), "--check", "--heads",
        "16", "--max-batch", "40", "--max-len", "4096", "--queries", "joined", "--processes", "1",
    ]  # fmt: skip
    assert cli.main(asking) == 0
    capsys.readouterr()
    assert cli.main([*asking, "--gpu", tables.CARD.name, "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["missing"]
    assert line.endswith(f"{text}: not compiled")


# -- every kernel of every call


@st.composite
def descriptions(draw: st.DrawFn) -> dict[str, Any]:
    """Deployments of few forms each, so that all their batches are soon looked up."""
    latent, rope = draw(st.sampled_from([(512, 64), (256, 32), (512, 0), (256, 64)]))
    s_q = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    formats = ["16bit"] if dtype == "float32" else ["16bit", "fp8"]
    if (latent, rope, dtype) == (512, 64, "bfloat16"):
        formats.append("fp8_ds_mla")
    return {
        "cache_format": draw(st.sampled_from(formats)),
        "heads": draw(st.sampled_from([1, 2, 5, 16, 17, 40, 128])),
        "latent": latent,
        "rope": rope,
        "max_batch": draw(st.sampled_from([1, 2, 3, 33, 70])),
        "max_len": draw(st.integers(1, 5000)),
        "s_q": s_q if draw(st.booleans()) else [1, s_q],
        "dtype": dtype,
        "page_size": draw(st.sampled_from([1, 16, 48, 64])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "table": draw(st.sampled_from(TABLES)),
        "queries": draw(st.sampled_from([*QUERIES, list(QUERIES)])),
        "ragged": draw(st.booleans()),
        "causal": draw(st.booleans()),
    }


def rows_by(what: str) -> Any:
    """`configs.choose` as if a table had another config for every batch, or every length."""

    def choose(
        implementation: Any, problem: Any, device: Device, row_tile: int | None = None
    ) -> Choice:
        point = implementation.tuning_point(problem, device, row_tile)
        config = implementation.heuristic(problem, device, row_tile)
        if point is not None:
            key, batch, length = point
            usable = [
                config
                for config in implementation.search_space(problem, device)
                if implementation.is_valid(config, problem, device, row_tile)[0]
            ]
            size = batch if what == "batch" else configs.length_bucket(length).bit_length()
            config = usable[(size + len(repr(key))) % len(usable)]
        return Choice(config, "user", "made up", None)

    return choose


@settings(max_examples=40)
@given(
    descriptions(),
    st.sampled_from(["8.0", "8.9", "9.0", "10.0", "gfx942"]),
    st.sampled_from(["batch", "length"]),
    st.integers(0, 99),
)
def test_every_kernel_of_every_call_is_known(description, label, what, seed):
    """Whatever rows a table has: configs follow from key, batch and length alone."""
    device, deployment = devices.from_label(label), describe(**description)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "choose", rows_by(what))
        operation.prepare.cache_clear()
        merging.prepare.cache_clear()
        asked = set(warm_child.asked_for(deployment, device, seed, calls=60))
        known = warm.variants(deployment, device)
        operation.prepare.cache_clear()
        merging.prepare.cache_clear()
    assert len(set(known)) == len(known)
    unknown = asked - set(known)
    assert not unknown, [warm_child.plain(variant) for variant in unknown]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("heads", [1, 12])
def test_no_two_kernels_of_a_deployment_have_one_name(heads, ragged):
    several = describe(
        heads=heads, s_q=[1, 2, 3], page_size=[1, 64], dtype=["float16", "bfloat16"],
        layout=LAYOUTS, table=TABLES, ragged=ragged, max_batch=2, max_len=8,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "choose", rows_by("batch"))
        known = warm.variants(several, devices.from_label("9.0"))
    names = {warm.name_of(variant) for variant in known}
    assert len(names) == len(known)


# -- a directory for another place


def test_a_directory_that_is_to_be_copied_serves_where_it_will_lie(tuned, tmp_path):
    """Copied as it is, it is of no use: Triton keeps whole paths in it."""
    copied, installed = tmp_path / "copied", tmp_path / "image" / "kernels"
    made = tmp_path / "made"
    for directory in (copied, made):
        shutil.copytree(tuned.directory, directory)
    warm.relocate(made, installed)
    installed.parent.mkdir()
    made.rename(installed)
    hidden = tuned.directory.with_name("hidden")
    tuned.directory.rename(hidden)
    try:
        assert serve(tuned._replace(directory=copied))["compiled"]
        assert serve(tuned._replace(directory=installed))["compiled"] == []
    finally:
        hidden.rename(tuned.directory)


def test_a_warm_up_says_where_its_directory_will_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(warm.workers, "run", lambda *_: iter(()))
    kernel = tmp_path / "here" / "KEY"
    kernel.mkdir(parents=True)
    listing = kernel / "__grp__k.json"
    listing.write_text(json.dumps({"child_paths": {"k.cubin": str(kernel / "k.cubin")}}))
    options = {"device": "9.0", "heads": 16, "max_batch": 1, "max_len": 512}
    mla_triton.warmup(cache=tmp_path / "here", installed_at=tmp_path / "there", **options)
    wanted = {"k.cubin": str(tmp_path / "there" / "KEY" / "k.cubin")}
    assert json.loads(listing.read_text()) == {"child_paths": wanted}
    assert [path.name for path in kernel.iterdir()] == ["__grp__k.json"]


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"device": "cpu"},
            ValueError,
            "device must be a GPU, or a capability such as '9.0' where there is none, got 'cpu'",
        ),
        ({"device": "7.5"}, ValueError, "capability must be one of 8.0, "),
        ({"device": "9.0", "heads": 0}, ValueError, "heads must be a whole number of at least 1"),
        (
            {"device": "9.0", "latent": 500},
            NotImplementedError,
            "no implementation of decode can run on 9.0: sm90: it reads aligned float16 or ",
        ),
        (
            {"device": "9.0", "installed_at": "/there"},
            ValueError,
            "installed_at must be left out without cache, and with check, got '/there'",
        ),
        (
            {"device": "9.0", "max_batch": 1, "processes": 0},
            ValueError,
            "processes must be a whole number of at least 1, got 0",
        ),
    ],
    ids=str,
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        mla_triton.warmup(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_card_has_to_be_named():
    with pytest.raises(
        ValueError, match=r"^device must be a GPU, or a capability .*got none here$"
    ):
        mla_triton.warmup(max_batch=1)
