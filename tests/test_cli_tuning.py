"""`mla-triton tune` and `mla-triton warmup` where nothing is timed or compiled: lists and errors.

What they do is tested in tests/test_tuner.py, on a made-up card, and in tests/test_warmup.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tables
import torch
from commands import refused

from mla_triton import cli, configs
from mla_triton import device as devices
from mla_triton.configs import store
from mla_triton.kernels.portable import decode as portable
from mla_triton.testing import compilation
from mla_triton.tuning import tuner

HAS_GPU = torch.cuda.is_available()
DRY = ["tune", "--dry-run", "--capability", "9.0"]
SMALL = ["--heads", "16", "--max-batch", "4", "--max-len", "2048"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "rows"))
    configs.forget()
    yield
    configs.forget()


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(said(capsys, *arguments, "--json"))


# -- what would be tuned


def test_a_dry_run_lists_the_points(capsys):
    first, *_, last = lines = said(capsys, *DRY, *SMALL).splitlines()
    assert re.fullmatch(
        r"decode portable 512\+64 bfloat16 heads 16 s_q 1 page 64 rows 16 batch 4 length 2048: "
        r"\d+ configs, \d+ pruned",
        first,
    )
    points = [line for line in lines if line.startswith("decode ")]
    assert len(points) == 4
    trials = sum(int(re.search(r"(\d+) configs", line).group(1)) for line in points)
    assert last == f"4 points, {trials} timings; 0 points were tuned before"


def test_a_dry_run_says_what_is_pruned(capsys):
    """On a card of little shared memory: each config with the rule, and at how many points."""
    arguments = ["tune", "--dry-run", "--capability", "8.9", *SMALL]
    found = facts(capsys, *arguments)
    (pruned, *_), points = found["work"][0]["pruned"], found["work"]
    values = tuple(pruned["config"].values())
    line = f"pruned at 4 of 4 points: decode {values}: {pruned['why']}"
    assert line in said(capsys, *arguments).splitlines()
    assert re.fullmatch(r"needs \d+ bytes of shared memory, 8.9 has 101376", pruned["why"])
    assert all(len(point["pruned"]) == len(points[0]["pruned"]) > 5 for point in points)


def test_a_dry_run_as_json(capsys):
    found = facts(capsys, *DRY, *SMALL, "--dtype", "float16", "bfloat16")
    assert found["skipped"] == 0
    assert len(found["work"]) == 8
    assert {point["point"].split()[3] for point in found["work"]} == {"float16", "bfloat16"}
    for point in found["work"]:
        assert point["candidates"]
        assert all(
            set(config) == {"block_n", "num_warps", "num_stages"} for config in point["candidates"]
        )


def test_caches_of_a_format(capsys):
    """Each has points of its own, named by how keys are stored."""
    formats = ["--cache-format", "16bit", "fp8", "fp8_ds_mla"]
    found = facts(capsys, "tune", "--dry-run", "--capability", "8.9", *SMALL, *formats)["work"]
    assert len(found) == 3 * 4
    points = [point["point"] for point in found]
    for over in (" over fp8 ", " over fp8-128-float32 ", " bfloat16 heads "):
        assert sum(over in point for point in points) == 4
    assert all(len(point["candidates"]) > 1 for point in found)


def test_a_grid_of_ones_own(capsys):
    found = facts(capsys, *DRY, *SMALL, "--batches", "3", "--lengths", "1000", "5000")
    ends = [point["point"].split(" batch ")[1] for point in found["work"]]
    assert ends == ["3 length 8192", "3 length 1024"]


def test_a_model_gives_the_shapes(capsys, tmp_path):
    fields = {
        "num_attention_heads": 40, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 32768,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": fields}))
    by_name = said(capsys, *DRY, "--model", "minicpm3-4b", "--tp", "4", "--max-batch", "1")
    assert by_name.startswith("decode portable 256+32 bfloat16 heads 16 ")
    assert "batch 1 length 32768: " in by_name
    by_file = said(capsys, *DRY, "--from-model", str(file), "--tp", "4", "--max-batch", "1")
    assert by_file == by_name


def test_a_dry_run_knows_what_was_tuned(capsys):
    card = devices.from_label("9.0")
    ((work, *_), _) = tuner.list_work(device="9.0", heads=16, max_batch=4, max_len=2048)
    values = tables.config(*vars(work.heuristic).values())
    row = tables.row(4, 2048, values=values, key=work.point.key)
    store.save(card, tables.header(card), [row])
    configs.forget()
    assert said(capsys, *DRY, *SMALL).endswith("1 points were tuned before\n")
    found = facts(capsys, *DRY, *SMALL)
    assert (len(found["work"]), found["skipped"]) == (3, 1)
    again = facts(capsys, *DRY, *SMALL, "--again")
    assert (len(again["work"]), again["skipped"]) == (4, 0)


@pytest.mark.parametrize("label", ["8.0", "8.6", "10.0", "gfx942"])
def test_every_card_has_something_to_time(capsys, label):
    for point in facts(capsys, "tune", "--dry-run", "--capability", label, *SMALL)["work"]:
        assert len(point["candidates"]) > 1
    count = sum(1 for _ in portable.search_space(compilation.problem(), devices.from_label(label)))
    assert len(point["candidates"]) + len(point["pruned"]) >= count


# -- what is refused


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("value", ["0", "1"])
def test_without_a_gpu_nothing_is_timed(value):
    ran = subprocess.run(
        [sys.executable, "-m", "mla_triton", "tune", *SMALL],
        env=os.environ | {"TRITON_INTERPRET": value},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stdout == ""
    line = "device must be a GPU of this machine to be timed, there is none"
    assert ran.stderr == f"mla-triton tune: error: {line}\n"
    assert not store.root().exists()


SHARED = [
    (["--model", "GPT-2"], "model must be one of DeepSeek-V2-Lite, "),
    (["--model", "GLM-4.7-Flash", "--tp", "8"], "tp must divide the 20 heads of the model, got 8"),
    (["--model", "GLM-5", "--from-model", "x"], "model must be left out where from_model is given"),
    (["--from-model", "no.json"], "from_model must be a config.json, got no.json: No such file"),
    (["--tp", "0"], "argument --tp: must be a whole number of at least 1, got '0'"),
    (["--heads", "129"], "heads must be in [1, 128], got 129"),
    (["--heads", "x"], "argument --heads: must be a whole number of at least 1, got 'x'"),
    (["--rope", "-1"], "argument --rope: must be a whole number of at least 0, got '-1'"),
    (["--value-dim", "100"], "value_dim must be latent or latent + rope, 512 or 576, got 100"),
    (["--latent", "500"], "no implementation of decode can run on 9.0: sm90: it reads aligned "),
    (["--max-batch", "0"], "argument --max-batch: must be a whole number of at least 1, got '0'"),
    (["--s-q", "1", "0"], "argument --s-q: must be a whole number of at least 1, got '0'"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--page-size"], "argument --page-size: expected at least one argument"),
    (["--processes", "0"], "argument --processes: must be a whole number of at least 1, got '0'"),
    (["--capability", "7.5"], "capability must be one of 8.0, "),
    (["--capability", "cpu"], "device must be a GPU, or a capability such as '9.0' where there is"),
    (["--colour"], "unrecognized arguments: --colour"),
]


@pytest.mark.parametrize(("arguments", "line"), SHARED, ids=str)
def test_errors_of_both_are_one_line(capsys, arguments, line):
    if "--capability" not in arguments:
        arguments = [*arguments, "--capability", "9.0"]
    for command in (["tune", "--dry-run"], ["warmup", "--check"]):
        got = refused(capsys, *command, *arguments)
        name = command[0] if "--colour" not in arguments else ""
        assert got.startswith(f"mla-triton {name}".rstrip() + f": error: {line}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--dry-run", "--capability", "9.0", "--dtype", "float32"], "dtype must be float16 or "),
        (["--capability", "9.0"], "capability goes with --dry-run alone, got '9.0'"),
        (["--batches", "0"], "argument --batches: must be a whole number of at least 1, got '0'"),
        (["--lengths", "x"], "argument --lengths: must be a whole number of at least 1, got 'x'"),
    ],
    ids=str,
)
def test_errors_of_tune(capsys, arguments, line):
    assert refused(capsys, "tune", *arguments).startswith(f"mla-triton tune: error: {line}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--layout", "split"], "argument --layout: invalid choice: 'split'"),
        (["--table", "tree"], "argument --table: invalid choice: 'tree'"),
        (["--queries", "odd"], "argument --queries: invalid choice: 'odd'"),
        (["--sm-count", "0"], "argument --sm-count: must be a whole number of at least 1, got '0'"),
        (
            ["--model", "DeepSeek-V4-Flash", "--layout", "pair"],
            "cache must be one tensor where value_dim 512 has the rope part inside",
        ),
    ],
    ids=str,
)
def test_errors_of_warmup(capsys, arguments, line):
    got = refused(capsys, "warmup", "--check", "--capability", "9.0", *arguments)
    assert got.startswith(f"mla-triton warmup: error: {line}")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_warm_up_without_a_gpu_needs_a_card(capsys):
    line = "device must be a GPU, or a capability such as '9.0' where there is none, got "
    assert line in refused(capsys, "warmup", "--check")
    assert line in refused(capsys, "warmup", "--check", "--gpu", "NVIDIA H200")


def test_a_name_without_a_capability(capsys, monkeypatch):
    monkeypatch.setattr(devices, "current", lambda: tables.CARD)
    for more in (["--gpu", "NVIDIA H200"], ["--sm-count", "78"]):
        line = "gpu and sm-count describe the card of --capability, got none"
        assert line in refused(capsys, "warmup", "--check", *more)
