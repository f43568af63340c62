"""Tuning and warming up for the GPU in this machine: rows are found, kernels are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mla_triton
from mla_triton import cli, configs
from mla_triton import device as devices
from mla_triton.configs import store
from mla_triton.configs.table import items
from mla_triton.kernels.portable import decode as portable
from mla_triton.ops import decode as operation
from mla_triton.ops import prefill as prefilling
from mla_triton.testing import assert_within_budget, decode_inputs, prefill_inputs

CHILD = Path(__file__).with_name("warmed.py")
TIME_LIMIT = 300
POINT: dict[str, Any] = {"batches": [1], "lengths": [512]}

pytestmark = pytest.mark.skipif(devices.interpreting(), reason="nothing is compiled or timed")


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "rows"))
    configs.forget()
    operation.forget()
    prefilling.forget()
    yield
    monkeypatch.undo()
    configs.forget()
    operation.forget()
    prefilling.forget()


def decode_and_judge(heads: int) -> None:
    for kv_lens in ([512], [300], [512, 70, 0, 2000]):
        inputs = decode_inputs(kv_lens=kv_lens, heads=heads, device="cuda")
        arguments, options = inputs.call_arguments()
        assert_within_budget(mla_triton.decode(*arguments, **options), inputs)


@pytest.mark.parametrize("cache_format", ["fp8", "fp8_ds_mla"])
def test_a_quantised_cache_is_tuned(own_cache, cache_format):
    """On caches that are made for it; the row is found by a call."""
    tuned = mla_triton.tune(**POINT, heads=16, cache_format=cache_format, quiet=True)
    (outcome,) = tuned.outcomes
    assert outcome.message == ""
    assert outcome.refused == ()
    assert outcome.row.us > 0
    choice = configs.choose(outcome.work.implementation, outcome.work.problem, devices.current())
    assert choice.row == outcome.row
    inputs = decode_inputs(kv_lens=[300], heads=16, stored=cache_format, device="cuda")
    arguments, options = inputs.call_arguments()
    assert_within_budget(mla_triton.decode(*arguments, **options), inputs)


@pytest.mark.parametrize("heads", [16, 128])
def test_a_tuned_row_is_found_and_right(own_cache, capsys, heads):
    """On a Hopper card, where 128 heads have a kernel of their own, its two forms are timed."""
    device = devices.current()
    tuned = mla_triton.tune(**POINT, heads=heads, quiet=True)
    assert tuned.failed == []
    assert not tuned.interrupted
    (outcome,) = tuned.outcomes
    assert outcome.row.us > 0
    assert outcome.gain > 0

    file = store.path(device)
    assert tuned.path == str(file)
    (row,) = store.read(device).rows
    assert row == outcome.row
    own = device.capability == (9, 0) and heads == 128
    assert outcome.work.point.impl == ("sm90" if own else "portable")
    if own:
        assert len(outcome.work.candidates) == 2
    choice = configs.choose(outcome.work.implementation, outcome.work.problem, device)
    assert choice.source == "user"
    assert choice.row == row
    assert items(vars(choice.config)) == row.config
    decode_and_judge(heads)

    shape = ["--heads", str(heads), "--batch", "1", "--kv-len", "512"]
    assert cli.main(["explain", *shape, "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["source"] == "user"
    assert str(file) in config["reason"]

    again = mla_triton.tune(**POINT, heads=heads, quiet=True)
    assert (again.skipped, again.outcomes) == (1, [])


def test_tuned_rows_of_prefill_are_found_and_right(own_cache):
    """Causal and not; a config that is slower, wrong or spills is in none of them."""
    device = devices.current()
    prompts = {"model": "deepseek-v3", "tp": 8, "max_batch": 1, "prefill_tokens": 512, **POINT}
    tuned = mla_triton.tune(quiet=True, **prompts)
    assert tuned.failed == []
    rows = [outcome.row for outcome in tuned.outcomes if outcome.work.point.op == "prefill"]
    assert [dict(row.point.key)["causal"] for row in rows] == [False, True]
    for outcome in tuned.outcomes:
        choice = configs.choose(outcome.work.implementation, outcome.work.problem, device)
        assert (choice.source, choice.row) == ("user", outcome.row)
        assert not any(why.startswith("wrong: ") for _, why in outcome.refused), outcome.refused
    for causal in (True, False):
        for lens in ([512], [100, 0, 700]):
            inputs = prefill_inputs(
                q_lens=lens, heads=16, split_k=True, split_q=True, causal=causal, device="cuda"
            )
            arguments, options = inputs.call_arguments()
            assert_within_budget(mla_triton.prefill(*arguments, **options), inputs)
    again = mla_triton.tune(quiet=True, **prompts)
    assert (again.skipped, again.outcomes) == (3, [])


def test_a_wrong_config_is_refused_on_the_card(own_cache, monkeypatch):
    """The judge of the tuner looks at what the GPU has computed."""
    right = portable.launch

    def launch(launcher, problem, geometry, tensors):
        """As a kernel that is broken with two stages."""
        if launcher.variant.num_stages == 2:
            tensors = tensors._replace(softmax_scale=2 * tensors.softmax_scale)
        right(launcher, problem, geometry, tensors)

    monkeypatch.setattr(portable, "launch", launch)
    tuned = mla_triton.tune(**POINT, heads=16, quiet=True)
    (outcome,) = tuned.outcomes
    wrong = [(config, why) for config, why in outcome.refused if why.startswith("wrong: ")]
    assert wrong
    assert {config.num_stages for config, _ in wrong} == {2}
    if outcome.row is not None:
        assert dict(outcome.row.config)["num_stages"] != 2


def child(how: str, tmp_path: Path) -> dict[str, Any]:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "MLA_TRITON_CACHE_DIR": str(tmp_path / "rows"),
    }
    ran = subprocess.run(
        [sys.executable, str(CHILD), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


def test_a_process_that_serves_after_a_warm_up_compiles_nothing(tmp_path):
    warmed = child("warm", tmp_path)
    assert warmed["missing"] == []
    assert warmed["compiled"] == warmed["kernels"] > 5
    assert warmed["launchers"] > 0
    assert warmed["launched"] == []
    served = child("serve", tmp_path)
    assert served["compiled"] == []
    assert served["built"] == []
    assert len(served["found"]) > 5
    assert served["calls"] == 72
    # So what is counted can be counted.
    assert served["outside"]


def test_two_processes_that_tune_into_one_directory(tmp_path):
    """At once, from nothing: both are right, one row is left, and a third finds all there is."""
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: child("tune", tmp_path), range(2)))
    for told in both:
        assert told["failed"] == 0
        assert len(told["kept"]) == 1
        assert told["row"] in [other["kept"][0] for other in both]
    again = child("tune", tmp_path)
    assert (again["skipped"], again["kept"], again["compiled"]) == (1, [], [])
    assert again["row"] in [told["row"] for told in both]
    files = [path.name for path in (tmp_path / "rows").rglob("*") if path.is_file()]
    (kept,) = [name for name in files if not name.endswith(store.LOCK)]
    assert kept.endswith(".json")
    assert list((tmp_path / "triton").rglob("tmp.*")) == []
