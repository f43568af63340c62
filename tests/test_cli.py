"""The command line, in this process and as a command: output, JSON, exit codes, error lines."""

from __future__ import annotations

import json

import pytest
import torch
from commands import answer, refused, run

import mla_triton
from mla_triton import check, check_cache, cli, timing
from mla_triton import device as devices
from mla_triton.configs import cache_directory
from mla_triton.testing import decode_inputs
from mla_triton.testing.caches import FORMS
from mla_triton.testing.decode_changes import copied

HAS_GPU = torch.cuda.is_available()


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mla-triton {mla_triton.__version__}\n"


def test_info(capsys):
    facts = answer(capsys, "info")
    assert facts["versions"]["mla_triton"] == mla_triton.__version__
    assert set(facts["versions"]) == {"mla_triton", "python", "torch", "triton"}
    assert facts["interpreter"] is devices.interpreting()
    assert len(facts["devices"]) == torch.cuda.device_count()
    assert facts["cache_directory"] == str(cache_directory())
    for device in facts["devices"]:
        assert device["sm_count"] > 0
        assert set(device["features"]) == set(devices.CPU.features())

    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch       {torch.__version__}" in out
    assert "no GPU" in out or HAS_GPU


@pytest.mark.parametrize("value", ["0", "1"])
def test_info_as_a_command(value):
    done = run("info", TRITON_INTERPRET=value)
    assert done.returncode == 0, done.stderr
    runs = ["off: CPU tensors run the reference", "on: CPU tensors run the portable kernels"]
    assert f"interpreter {runs[int(value)]}" in done.stdout


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("MLA_TRITON_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "mla_triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "mla_triton"
    assert not cache_directory().exists()


@pytest.mark.parametrize("label", devices.KNOWN)
@pytest.mark.parametrize("heads", ["1", "16", "40", "128"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_explain_every_card(capsys, label, heads, dtype):
    shape = ["--heads", heads, "--dtype", dtype]
    facts = answer(capsys, "explain", "--capability", label, *shape)
    on_hopper = label == "9.0" and dtype == "bfloat16" and heads in ("40", "128")
    assert facts["implementation"] == ("sm90" if on_hopper else "portable")
    assert facts["device"]["label"] == label
    assert facts["device"]["present"] is False
    assert facts["problem"]["heads"] == int(heads)
    assert facts["geometry"]["lanes"] * facts["geometry"]["row_tile"] >= int(heads)
    assert facts["schedule"]["groups"] == 16
    assert 1 <= facts["schedule"]["parts_used"] <= facts["geometry"]["parts"]
    assert {c["name"]: c["why_not"] is None for c in facts["candidates"]} == {
        "sm90": on_hopper,
        "portable": True,
        "reference": False,
    }
    assert cli.main(["explain", "--capability", label, *shape]) == 0
    out = capsys.readouterr().out
    assert f"({label}, not in this machine)" in out
    assert facts["config"]["text"] in out
    assert facts["config"]["reason"] in out
    assert "not       reference: " in out
    assert ("not       portable: the one above comes first" in out) is on_hopper
    assert ("not       sm90: " in out) is not on_hopper


def test_explain_the_machine_at_hand(capsys):
    facts = answer(capsys, "explain", "--heads", "16")
    assert facts["device"]["label"] == devices.current().label
    assert facts["device"]["present"] is True
    expected = "portable" if devices.current().runs_triton else "reference"
    assert facts["implementation"] == expected


def test_explain_the_cpu(capsys):
    facts = answer(capsys, "explain", "--capability", "cpu")
    assert facts["implementation"] == "reference"
    assert facts["config"] is None
    assert facts["geometry"] is None
    assert facts["schedule"] is None
    assert cli.main(["explain", "--capability", "cpu"]) == 0
    assert "TRITON_INTERPRET=1" in capsys.readouterr().out


def test_explain_what_no_batch_changes(capsys):
    """A tuned row is not asked, and pieces are of a request's own length."""
    options = ["explain", "--capability", "9.0", "--gpu", "NVIDIA H200", "--kv-len", "16384"]
    for batch in ("1", "200"):
        facts = answer(capsys, *options, "--batch", batch, "--batch-invariant")
        assert facts["config"]["source"] == "heuristic"
        assert facts["config"]["blocks"] == 1
        assert (facts["schedule"]["splits"], facts["schedule"]["fixed_piece"]) == (8, 2048)
    assert answer(capsys, *options)["schedule"]["fixed_piece"] is None
    assert cli.main([*options, "--batch-invariant"]) == 0
    out = capsys.readouterr().out
    assert "in a dense table, batch-invariant\n" in out
    assert "each in up to 8 pieces of 2048 keys, whatever the batch: " in out
    prompts = ["explain", "--capability", "9.0", "--prefill", "--batch", "4", "--s-q", "3"]
    tile = answer(capsys, *prompts, "--batch-invariant")["problem"]["usual_queries"]
    assert tile == 128 > answer(capsys, *prompts)["problem"]["usual_queries"]
    assert cli.main([*prompts, "--batch-invariant"]) == 0
    assert "keys in all, causal, batch-invariant\n" in capsys.readouterr().out


def test_explain_a_model(capsys):
    facts = answer(capsys, "explain", "--capability", "8.9", "--model", "deepseek-v3", "--tp", "8")
    assert facts["problem"]["heads"] == 16
    assert (facts["problem"]["latent"], facts["problem"]["rope"]) == (512, 64)
    inside = answer(capsys, "explain", "--capability", "9.0", "--model", "DeepSeek-V4-Flash")
    assert (inside["problem"]["latent"], inside["problem"]["value_dim"]) == (448, 512)


def test_explain_every_option(capsys):
    options = ["--heads", "20", "--latent", "256", "--rope", "32", "--value-dim", "256"]
    options += ["--batch", "3", "--s-q", "4", "--page-size", "48", "--dtype", "float16"]
    options += ["--csr", "--ragged", "--no-causal", "--kv-len", "100", "--impl", "portable"]
    problem = answer(capsys, "explain", "--capability", "8.0", *options)["problem"]
    expected = {
        "heads": 20,
        "latent": 256,
        "rope": 32,
        "value_dim": 256,
        "batch": 3,
        "s_q": None,
        "queries": 12,
        "page_size": 48,
        "dtype": "float16",
        "csr": True,
        "causal": False,
        "kv_len": 100,
    }
    assert {name: problem[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fp8", "e4m3, one scale for all latents and one for all rotary keys (fp8)"),
        (
            "fp8_ds_mla",
            "e4m3, a float32 scale for every 128 columns, bfloat16 rotary keys apart "
            "(fp8-128-float32)",
        ),
    ],
)
def test_explain_a_quantised_cache(capsys, name, line):
    options = ["explain", "--capability", "8.9", "--heads", "16", "--cache-format", name]
    assert cli.main(options) == 0
    assert f"cache     {line}" in capsys.readouterr().out.splitlines()
    storage = answer(capsys, *options)["problem"]["storage"]
    assert storage["name"] in line
    assert storage["scale"] == "float32"


def test_explain_lengths_of_zero_and_one(capsys):
    for kv_len in ("0", "1"):
        facts = answer(capsys, "explain", "--capability", "9.0", "--kv-len", kv_len)
        assert facts["schedule"]["splits"] == 1
        assert facts["schedule"]["merged_groups"] == 0


def test_explain_what_was_asked_for(capsys):
    options = ["--capability", "9.0", "--impl", "reference"]
    assert answer(capsys, "explain", *options)["implementation"] == "reference"
    assert cli.main(["explain", *options]) == 0
    assert "not       portable: reference was asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--capability", "7.5"], "capability must be one of 8.0, 8.6, "),
        (["--impl", "magic"], "impl must be one of sm90, portable, reference, got 'magic'"),
        (["--heads", "129"], "heads must be at most 128, got 129"),
        (["--heads", "0"], "argument --heads: must be a whole number of at least 1, got '0'"),
        (["--kv-len", "-1"], "argument --kv-len: must be a whole number of at least 0, got '-1'"),
        (["--model", "GPT-2"], "model must be one of DeepSeek-V2-Lite, "),
        (["--model", "GLM-4.7-Flash", "--tp", "8"], "tp must divide the 20 heads of the model, "),
        (["--value-dim", "100"], "value-dim must be latent or latent + rope, 512 or 576, got 100"),
        (
            ["--capability", "9.0", "--latent", "500"],
            "no implementation of decode can run on 9.0: ",
        ),
        (
            ["--capability", "cpu", "--impl", "portable"],
            "impl 'portable' cannot run this decode: the tensors are on the CPU",
        ),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_errors_are_one_line(capsys, arguments, line):
    assert f"error: {line}" in refused(capsys, "explain", *arguments)


def test_a_command_is_needed(capsys):
    assert refused(capsys) == "mla-triton: error: the following arguments are required: command"
    assert "invalid choice: 'train'" in refused(capsys, "train")


def test_error_as_a_command():
    done = run("explain", "--capability", "1.0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mla-triton explain: error: capability must be one of ")
    assert done.stderr.count("\n") == 1


def few(monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
    """Only the first cases, of a few keys."""
    some = check.cases(HAS_GPU)[:count]
    monkeypatch.setattr(check, "cases", lambda on_gpu: some)
    monkeypatch.setattr(check, "prefills", lambda on_gpu: [])
    monkeypatch.setattr(check, "merges", lambda on_gpu: [])
    monkeypatch.setattr(check_cache, "caches", lambda on_gpu: [])
    monkeypatch.setattr(check, "LONG", check.SHORT)


def test_check(capsys, monkeypatch):
    few(monkeypatch)
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 150 for line in lines)
    assert sum(line.startswith("ok ") for line in lines) == 2
    assert lines[-1] == "all 2 shapes are within the error budget of the float64 reference"
    if not HAS_GPU:
        assert "No GPU code was executed" in "\n".join(lines)
        assert "GB/s" not in "\n".join(lines)


def test_check_json(capsys, monkeypatch):
    few(monkeypatch)
    facts = answer(capsys, "check")
    assert facts["ok"] is True
    assert facts["gpu_code_executed"] is HAS_GPU
    assert facts["kv_lens"] == list(check.SHORT)
    assert (facts["bandwidth_gbps"] is None) is not HAS_GPU
    for row in facts["rows"]:
        assert row["ok"] is True
        assert row["implementation"] == "portable"
        assert "block_n" in row["config"]
        assert 0 < row["error"] <= row["budget"]
        assert (row["us"] is None) is not HAS_GPU


def test_check_fails_where_a_kernel_loses_a_key(capsys, monkeypatch):
    few(monkeypatch)
    right = mla_triton.decode

    def loses_a_key(q_nope, q_rope, cache, page_table, kv_lens, **options):
        return right(q_nope, q_rope, cache, page_table, kv_lens - 1, **options)

    monkeypatch.setattr(mla_triton, "decode", loses_a_key)
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED ") == 2
    assert out.endswith("2 of 2 shapes FAILED\n")
    assert cli.main(["check", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False
    assert all(row["message"] and row["us"] is None for row in facts["rows"])


def test_check_goes_on_after_a_crash(capsys, monkeypatch):
    few(monkeypatch)
    right, calls = mla_triton.decode, []

    def crashes_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("out of shared memory")
        return right(*arguments, **options)

    monkeypatch.setattr(mla_triton, "decode", crashes_once)
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: out of shared memory" in out
    assert out.endswith("1 of 2 shapes FAILED\n")


def test_what_is_right_is_timed(monkeypatch, device):
    """Every way of calling gets a plan that fits it; the clock always says 10 us."""
    decoded = []

    def timed(calls):
        decoded.append(calls[-1]())
        return 10.0

    monkeypatch.setattr(timing, "microseconds", timed)
    cases = [case for case in check.cases(False) if case.call != "s_q 1"][:3]
    packed = (("stored", "fp8_ds_mla"),)
    cases.append(check.Case("DeepSeek-V3", torch.bfloat16, heads=4, options=packed))
    cases.append(check.Case("DeepSeek-V4-Flash", torch.float16, heads=4))
    rows = list(check.run(cases, check.SHORT, device, bandwidth=1e12))
    assert len(decoded) == len(rows) == 5
    for row in rows:
        assert row.ok, row.message
        assert row.us == 10.0
        assert row.gbps is not None
        assert row.bandwidth_percent == pytest.approx(row.gbps / 10)
    keys = sum(check.SHORT) * 512 * 2
    rows_of_4 = len(check.SHORT) * 4 * (512 + 512) * 2
    assert rows[-1].gbps == pytest.approx((keys + rows_of_4) / 10 / 1e3)
    # The scales of a token take 16 bytes.
    moved = sum(check.SHORT) * 656 + len(check.SHORT) * 4 * (576 + 512) * 2
    assert rows[-2].gbps == pytest.approx(moved / 10 / 1e3)
    lines = list(check.table(rows, timed=True))
    assert lines[0].split()[-3:] == ["us", "GB/s", "%"]
    assert all(len(line) <= 150 for line in lines)


def test_a_packed_cache_is_copied_as_it_lies():
    cache = decode_inputs(kv_lens=[20], stored="fp8_ds_mla").cache
    copy = copied(cache)
    assert len({part.untyped_storage().data_ptr() for part in copy}) == 1
    for part, other in zip(cache, copy, strict=True):
        assert other.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()
        assert (other.stride(), other.dtype) == (part.stride(), part.dtype)
        assert torch.equal(other.float().nan_to_num(), part.float().nan_to_num())


def test_check_prefills(monkeypatch, device):
    """Timed, and without a word about bandwidth, of which they need little."""
    monkeypatch.setattr(timing, "microseconds", lambda calls: calls[-1]() and 10.0)
    cases = check.prefills(False)[:2]
    rows = list(check.run(cases, check.SHORT, device, bandwidth=1e12))
    for row in rows:
        assert row.ok, row.message
        assert (row.shape, row.call) == ("DeepSeek-V3 h2 192, 128", "prefill")
        assert (row.implementation, row.us, row.gbps) == ("portable", 10.0, None)
        assert "block_m" in row.config
    assert all(len(line) <= 150 for line in check.table(rows, timed=True))


def test_check_covers_the_widths_of_prefill():
    for on_gpu in (True, False):
        cases = check.prefills(on_gpu)
        widths = {case.shape.split(" ", 2)[2] for case in cases}
        assert widths == {"192, 128", "256, 256", "128, 128", "96, 64"}
        assert {case.causal for case in cases} == {True, False}
        assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16}


def test_check_fails_where_a_prefill_loses_a_key(monkeypatch, device):
    right = mla_triton.prefill

    def loses_a_key(q, k, v, **options):
        offsets = options.pop("cu_seqlens_k")
        return right(q, k, v, **options, cu_seqlens_k=(offsets - 1).clamp_min(0))

    monkeypatch.setattr(mla_triton, "prefill", loses_a_key)
    (row,) = check.run(check.prefills(False)[:1], check.SHORT, device, bandwidth=1e12)
    assert not row.ok
    assert row.us is None


def test_explain_a_prefill(capsys):
    shape = ["--capability", "8.9", "--prefill", "--tp", "8", "--batch", "3", "--s-q", "500"]
    facts = answer(capsys, "explain", *shape, "--kv-len", "2000")
    assert facts["implementation"] == "portable"
    expected = {
        "dtype": "bfloat16", "heads": 16, "qk_dim": 192, "k_nope": 128, "value_dim": 128,
        "causal": True, "batch": 3, "queries": 1500, "keys": 6000, "usual_queries": 128,
    }  # fmt: skip
    assert {name: facts["problem"][name] for name in expected} == expected
    assert (facts["config"]["source"], facts["config"]["block_m"]) == ("modelled", 128)
    assert cli.main(["explain", *shape, "--capability", "cpu", "--no-causal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("problem   prefill, 16 heads, qk 192 (64 of a key shared), value 12")
    assert lines[1] == "          3 sequences, 1500 queries and 12288 keys in all"
    assert "runs      reference" in lines
    states = answer(capsys, "explain", *shape, "--states", "2")["problem"]
    assert (states["rows"], states["value_dim"]) == (1500 * 16, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill", "--latent", "512"], "latent must be left out with --prefill, got 512"),
        (["--prefill", "--ragged"], "ragged must be left out with --prefill, got True"),
        (["--prefill", "--qk", "64"], "rope must be less than qk, 64, got 64"),
        (["--qk", "192"], "qk must be left out without --prefill, got 192"),
        (
            ["--prefill", "--qk", "200", "--impl", "portable"],
            "impl 'portable' cannot run this prefill: queries and keys must have a power of two ",
        ),
    ],
)
def test_what_explain_refuses_of_a_prefill(capsys, options, message):
    with pytest.raises(SystemExit):
        cli.main(["explain", "--capability", "9.0", *options])
    assert message in capsys.readouterr().err


def test_check_merges(monkeypatch, device):
    """Two states are read and one is written, in the 10 us that the clock always says."""
    monkeypatch.setattr(timing, "microseconds", lambda calls: calls[-1]() and 10.0)
    (case,) = check.merges(False)
    (row,) = check.run([case], check.SHORT, device, bandwidth=1e12)
    assert row.ok, row.message
    assert (row.shape, row.call, row.implementation) == (
        "merge t5 h16 512", "2 states", "portable"
    )  # fmt: skip
    assert "rows" in row.config
    assert row.gbps == pytest.approx(3 * 5 * 16 * (512 * 2 + 4) / 10 / 1e3)


def test_check_fails_where_a_merge_loses_a_state(monkeypatch, device):
    monkeypatch.setattr(mla_triton, "merge", lambda states: states[0])
    (row,) = check.run(check.merges(False), check.SHORT, device, bandwidth=1e12)
    assert not row.ok
    assert row.us is None


@pytest.mark.parametrize("case", check_cache.caches(False), ids=lambda case: case.shape)
def test_check_of_the_cache(case, device):
    (row,) = check.run([case], check.SHORT, device, bandwidth=None)
    assert row.ok, row.message
    assert (row.implementation, row.us, row.error) == ("portable", None, None)
    assert row.config != "-"


def test_the_verdict_tells_budgets_from_bits(device):
    todo = [*check.merges(False), *check_cache.caches(False)[:2]]
    rows = list(check.run(todo, check.SHORT, device, bandwidth=None))
    assert check.verdict(rows) == (
        "all 1 shapes are within the error budget of the float64 reference, "
        "2 operations on a cache are the reference's to the bit"
    )


@pytest.mark.parametrize("operation", ["append", "gather", "copy_pages"])
def test_check_fails_where_the_cache_is_not_written(monkeypatch, device, operation):
    def gather(*_: object, out: torch.Tensor, rope_out: torch.Tensor, **__: object):
        return out, rope_out

    does_nothing = gather if operation == "gather" else lambda *_, **__: None
    monkeypatch.setattr(mla_triton, operation, does_nothing)
    todo = [case for case in check_cache.caches(False) if case.operation == operation]
    rows = list(check.run(todo, check.SHORT, device, bandwidth=None))
    assert len(rows) == len(FORMS)
    assert not any(row.ok for row in rows)
    assert all("not the reference's" in row.message for row in rows)


@pytest.mark.parametrize(
    ("options", "count", "said"),
    [
        (["append", "--batch", "7", "--s-q", "2"], {"tokens": 14, "few": True}, "append of 14 tok"),
        (["append", "--batch", "1025"], {"tokens": 1025, "few": False}, "append of 1025 tokens"),
        (["gather", "--batch", "2", "--kv-len", "700"], {"rows": 1400}, "gather of 1400 tokens"),
        (
            ["copy_pages", "--batch", "3", "--kv-len", "65"],
            {"pages": 6, "words": (656 * 64 // 4,)},
            "copy of 6 pages of 41984 bytes",
        ),
    ],
)
def test_explain_an_operation_on_a_cache(capsys, options, count, said):
    call = ["--capability", "8.9", "--cache-format", "fp8_ds_mla", "--cache-operation", *options]
    facts = answer(capsys, "explain", *call)
    problem = facts["problem"] | {"words": tuple(facts["problem"].get("words", ()))}
    assert {name: problem[name] for name in count} == count
    assert facts["implementation"] == "portable"
    assert facts["config"]["source"] == "heuristic"
    assert cli.main(["explain", *call]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"problem   {said}")
    assert any(line.startswith("not       reference: ") for line in lines)
    assert cli.main(["explain", *call, "--impl", "reference"]) == 0
    assert "runs      reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format_", "said"),
    [
        ("16bit", "latents bfloat16, rotary keys bfloat16, page 16"),
        ("fp8", "latents float8_e4m3fn, rotary keys float8_e4m3fn, page 16, scales: one for all"),
        ("fp8_ds_mla", "rotary keys bfloat16, page 16, scales: float32 for every 128 columns"),
    ],
)
def test_explain_says_how_a_cache_holds_tokens(capsys, format_, said):
    options = ["--cache-format", format_, "--page-size", "16", "--cache-operation", "gather"]
    assert cli.main(["explain", *options]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(said)


@pytest.mark.parametrize(
    "options", [["--prefill"], ["--qk", "192"], ["--states", "2"], ["--ragged"]], ids=" ".join
)
def test_what_explain_refuses_of_a_cache(capsys, options):
    with pytest.raises(SystemExit):
        cli.main(["explain", "--cache-operation", "append", *options])
    rule = f"{options[0][2:]} must be left out with --cache-operation, got "
    assert rule in capsys.readouterr().err


def test_explain_a_merge(capsys):
    facts = answer(capsys, "explain", "--capability", "8.9", "--states", "3", "--heads", "8")
    assert facts["implementation"] == "portable"
    assert facts["problem"]["rows"] == 16 * 8
    assert facts["config"]["source"] == "heuristic"
    assert cli.main(["explain", "--capability", "cpu", "--states", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "problem   merge of 2 states, 2048 rows of 512, bfloat16"
    assert "runs      reference" in lines
    with pytest.raises(SystemExit):
        cli.main(["explain", "--states", "1"])
    assert "states must be two or more, got 1" in capsys.readouterr().err


def test_check_covers_the_models():
    on_gpu, interpreted = check.cases(True), check.cases(False)
    for cases in (on_gpu, interpreted):
        assert len({(c.shape, c.dtype, c.call) for c in cases}) == len(cases)
        assert {c.dtype for c in cases} == {torch.bfloat16, torch.float16, torch.float32}
        assert any("ragged" in c.call for c in cases)
        assert any("csr" in c.call for c in cases)
        assert any("s_q 2" in c.call for c in cases)
        assert {"fp8", "fp8_ds_mla"} <= {c.call for c in cases}
        widths = {c.shape.split()[-1] for c in cases}
        assert widths == {"512+64", "256+32", "256+64", "448+64"}
    assert {c.rank_heads for c in on_gpu} >= {5, 8, 16, 20, 32, 40, 64, 128}
    assert sum(check.LONG) > 80_000


@pytest.mark.skipif(HAS_GPU, reason="a GPU is used where there is one")
def test_check_turns_the_interpreter_on():
    """The whole check as a stranger runs it: no variable set, no GPU."""
    done = run("check", "--json", TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["device"]["backend"] == "interpreter"
    assert facts["gpu_code_executed"] is False
    others = [*check.prefills(False), *check.merges(False), *check_cache.caches(False)]
    assert len(facts["rows"]) == len(check.cases(False)) + len(others)
    assert {row["implementation"] for row in facts["rows"]} == {"portable"}
