"""`mla-triton check --deep`: what it finds, what it says of it, and that it goes on."""

from __future__ import annotations

import json
import math
import re
import subprocess
from html import escape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from commands import refused

import mla_triton
from mla_triton import check, cli, testing
from mla_triton import device as devices
from mla_triton.report import cases, environment, examine, histogram, page, text
from mla_triton.report.cases import Case
from mla_triton.report.examine import Row
from mla_triton.testing.caches import FORMS

SPLITS = Case(
    "decode", "h2 64+16", "splits",
    {"kv_lens": [70, 1, 0], "heads": 2, "latent": 64, "rope": 16, "dtype": torch.float16,
     "seed": 3},
    (None, 3),
)  # fmt: skip
MERGE = Case(
    "merge", "h2 16", "2 states",
    {"states": 2, "heads": 2, "value_dim": 16, "dtype": torch.bfloat16, "seed": 0},
)  # fmt: skip
STRIDED = Case(
    "prefill", "h2 96, 64", "strided",
    {"q_lens": [5, 0], "k_lens": [9, 3], "heads": 2, "qk": 96, "v_dim": 64, "rope": 32,
     "dtype": torch.float32, "strided": True, "seed": 0},
)  # fmt: skip
FUSED = Case(
    "append", "t9 fp8_v4", "norm, rope half",
    {"form": "fp8_v4", "tokens": 9, "dtype": torch.bfloat16, "norm": torch.bfloat16,
     "rotation": "half", "seed": 1},
)  # fmt: skip
PLAIN = Case(
    "append", "t9 groups", "plain",
    {"form": "groups", "tokens": 9, "dtype": torch.float16, "latent": 256, "seed": 1},
)  # fmt: skip
GATHER = Case(
    "gather", "t13 pair", "strided",
    {"form": "pair", "lengths": (9, 0, 4), "strided": 8, "latent": 64, "rope": 16,
     "dtype": torch.bfloat16, "seed": 2},
)  # fmt: skip
COPY = Case(
    "copy_pages", "p8 fp8_ds_mla", "to another cache",
    {"form": "fp8_ds_mla", "apart": True, "dtype": torch.bfloat16, "seed": 0},
)  # fmt: skip
MEASURES = ["out", "out_rms", "lse"]


def rows_of(device, *todo: Case, repeats: int = 1) -> list[Row]:
    return list(examine.examine(todo, device, repeats))


def again(row: Row) -> None:
    """What its line of Python does."""
    exec(row.reproduction, {})


# -- rows


def test_every_implementation_is_computed(device):
    rows = rows_of(device, SPLITS, MERGE, STRIDED)
    found = [(row.operation, row.implementation, row.parts) for row in rows]
    assert found == [
        ("decode", "portable", None), ("decode", "portable", 3), ("decode", "reference", None),
        ("merge", "portable", None), ("merge", "reference", None),
        ("prefill", "portable", None), ("prefill", "reference", None),
    ]  # fmt: skip
    for row in rows:
        assert row.ok, row.message
        assert [measure.name for measure in row.measures] == MEASURES
        assert row.worst.ratio == max(m.error / m.budget for m in row.measures if m.budget) <= 1
        assert (row.differing, row.repeats) == (0, 1)
        assert sum(row.measures[0].histogram) == row.measures[0].rows > 0
        assert (row.config == "-") is (row.implementation == "reference")
        assert (row.config_source == "-") is (row.implementation == "reference")
        again(row)


def test_what_is_left_in_a_cache_is_judged_by_bits_and_budgets(device):
    rows = rows_of(device, FUSED, PLAIN, GATHER, COPY)
    assert [(row.operation, row.implementation) for row in rows] == [
        ("append", "portable"), ("append", "reference"), ("append", "portable"),
        ("gather", "portable"), ("gather", "reference"),
        ("copy_pages", "portable"), ("copy_pages", "reference"),
    ]  # fmt: skip
    for row in rows:
        assert row.ok, row.message
        assert row.is_exact is (row.call != "norm, rope half")
        assert row.message == ("equal bits" if row.is_exact else "within budget")
        assert (row.differing, row.differing_bytes) == (0, 0)
        assert all(each.compared > 500 and not each.first for each in row.bits)
        assert (row.config == "-") is (row.implementation == "reference")
        again(row)
    assert [[each.what for each in row.bits] for row in rows[1:4]] == [
        ["outside of the slots that are written"],
        ["of the cache and around it"],
        ["of out", "of rope_out"],
    ]
    (stored,) = rows[0].measures
    assert stored.name == "stored"
    assert 0 < stored.ratio <= 1
    assert stored.rows == sum(stored.histogram) == len(FUSED.inputs(device).written)
    inputs = FUSED.inputs(device)
    token, column = stored.where
    assert stored.expected == inputs.exact()[inputs.written.tolist().index(token), column]
    assert stored.text.startswith(f"stored[{token}, {column}] is ")


def byte_of(memory: testing.CacheMemory, where: int) -> None:
    """Flips a bit of a byte that lies so far behind the canaries before the cache."""
    memory.buffers[0][256 + where] ^= 1


def spoils_append(memory: testing.CacheMemory, inputs: testing.AppendInputs) -> None:
    slot = int(inputs.slots[inputs.written[0]])
    cache = memory.cache
    cache.ckv.view(torch.uint8)[slot // 16, slot % 16, 3] ^= 0x80


def spills_append(memory: testing.CacheMemory, inputs: testing.AppendInputs) -> None:
    memory.buffers[0][-7] = 0


def spills_rows(rows: tuple[torch.Tensor, torch.Tensor], inputs: testing.GatherInputs) -> None:
    out, width = rows[0], rows[0].shape[1]
    out.as_strided((width + 1,), (1,), out.storage_offset())[-1] = 0


def spoils_rows(rows: tuple[torch.Tensor, torch.Tensor], inputs: testing.GatherInputs) -> None:
    rows[1][11, 2] = 7.0


def spoils_copy(memory: testing.CacheMemory, inputs: testing.CopyInputs) -> None:
    byte_of(memory, 5 * 656 * 16 + 656 + 512)


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        (FUSED, spoils_append,
            r"stored\[\d, 3\] is .*, expected .*: its error .* is over its budget .* "
            r"\(1 of \d tokens\)"),
        (FUSED, spills_append,
            r"1 of \d+ bytes outside of the slots that are written are not the reference's"),
        (PLAIN, spoils_append,
            r"1 of \d+ bytes of the cache and around it are not the reference's, first ckv"
            r"\[\d, \d+, 3\]: .*, expected .*"),
        (PLAIN, spills_append, r"1 of .* not the reference's, first where no token lies"),
        (GATHER, spills_rows, r"2 of \d+ bytes of out are not .*, first between rows"),
        (GATHER, spoils_rows,
            r"\d of \d+ bytes of rope_out are not .*, first rope_out\[11, 2\]: 7, expected .*"),
        (COPY, spoils_copy, r"1 of \d+ .* the reference's, first scales\[5, 1, 0\]: .*"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)  # fmt: skip
def test_a_byte_that_is_wrong_fails(monkeypatch, device, case, spoil, message):
    right = testing.cache_results.run

    def spoilt(inputs, impl=None):
        result = right(inputs, impl)
        spoil(result, inputs)
        return result

    monkeypatch.setattr(testing.cache_results, "run", spoilt)
    row = rows_of(device, case)[0]
    assert not row.ok
    assert re.fullmatch(message, row.message), row.message
    assert row.differing == 0
    with pytest.raises(AssertionError, match=message):
        again(row)
    lines = list(text.lines([row]))
    assert lines[0].startswith("FAILED ")
    assert lines[1].strip() == row.message
    if row.is_exact:
        assert f" {row.differing_bytes} bytes differ " in lines[0]
    made = page.page(environment.facts(), 0, 1, [row])
    assert escape(row.message) in made
    assert text.facts({}, 0, 1, [row], "cpu")["rows"][0]["bits"][0]["compared"] > 0


def test_a_cache_that_is_not_the_same_twice_fails(monkeypatch, device):
    right, calls = testing.cache_results.run, []

    def drifts(inputs, impl=None):
        result = right(inputs, impl)
        calls.append(result)
        if len(calls) % 2 == 0:
            result[0][0, 0] += 1
        return result

    monkeypatch.setattr(testing.cache_results, "run", drifts)
    row = rows_of(device, GATHER, repeats=3)[0]
    assert row.message == "2 of 3 repeats have other bits than the first call"
    calls.clear()
    with pytest.raises(AssertionError, match="two runs are not the same"):
        again(row)


@pytest.mark.parametrize("case", [PLAIN, GATHER, COPY], ids=lambda case: case.operation)
def test_what_a_cache_operation_reads_is_not_written(monkeypatch, device, case):
    right = testing.cache_results.run
    read = {"append": "latent", "gather": "cache", "copy_pages": "source"}[case.operation]

    def writes(inputs, impl=None):
        result = right(inputs, impl)
        tensor = dict(testing.calls.tensors_of(inputs))[read]
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        memory.set_(tensor.untyped_storage())[0] ^= 1
        return result

    monkeypatch.setattr(testing.cache_results, "run", writes)
    row = rows_of(device, case, repeats=0)[0]
    assert f"{read} must be read only, and changed" in row.message


def test_equal_bits_are_no_histogram(device):
    exact, mixed = rows_of(device, PLAIN, COPY), rows_of(device, FUSED)
    lines = list(text.lines(exact))
    assert all(" equal bits " in line for line in lines if line.startswith("ok "))
    assert text.verdict(exact) == (
        "all 4 are the reference's to the bit, and the same in every repeat"
    )
    assert text.verdict([*exact, *mixed]) == (
        "all 2 are within their error budgets, 4 are the reference's to the bit, and the same in "
        "every repeat"
    )
    made = page.page(environment.facts(), 0, 1, exact)
    assert "<svg" not in made
    assert made.count("<code>equal bits</code>") == 4
    assert made.count("bytes held against the reference's: equal bits.") == 2
    made = page.page(environment.facts(), 0, 1, mixed)
    # One of each row, and one of both together.
    assert made.count("<svg") == 3
    assert "stored numbers" in made
    facts = text.facts({}, 0, 1, [*exact, *mixed], "cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert [len(row["measures"]) for row in facts["rows"]] == [0, 0, 0, 0, 1, 1]
    assert all(row["bits"][0]["differing"] == 0 for row in facts["rows"])


def test_the_reference_is_computed_once(device):
    rows = rows_of(device, MERGE, MERGE)
    assert [row.implementation for row in rows] == ["portable", "reference", "portable"]


def test_the_worst_element_is_the_one_that_is_wrong(monkeypatch, device):
    right = mla_triton.merge

    def one_wrong(*arguments, **options):
        state = right(*arguments, **options)
        state.out[3, 1, 5] += 1
        return state

    monkeypatch.setattr(mla_triton, "merge", one_wrong)
    row = rows_of(device, MERGE)[0]
    assert not row.ok
    out = row.measures[0]
    assert out.where == (3, 1, 5)
    assert out.got - out.expected == pytest.approx(1, abs=0.05)
    assert out.over == 1
    assert sum(out.histogram[histogram.AT_BUDGET + 1 :]) == 1
    assert f"out[3, 1, 5] is {out.got:.9g}, expected {out.expected:.9g}" in out.text
    with pytest.raises(AssertionError, match=r"at out\[3, 1, 5\]: "):
        again(row)


def test_a_kernel_that_is_not_the_same_twice_fails(monkeypatch, device):
    right, calls = mla_triton.merge, []

    def drifts(*arguments, **options):
        state = right(*arguments, **options)
        calls.append(state)
        if len(calls) % 2 == 0:
            state.lse.add_(2.0**-22)
        return state

    monkeypatch.setattr(mla_triton, "merge", drifts)
    row = rows_of(device, MERGE, repeats=4)[0]
    assert not row.ok
    assert row.differing == 2
    assert row.message == "2 of 4 repeats have other bits than the first call"
    calls.clear()
    with pytest.raises(AssertionError, match="two runs are not the same: "):
        again(row)


def test_writing_where_nothing_is_to_be_written_fails(monkeypatch, device):
    right = mla_triton.prefill

    def spills(q, k, v, **options):
        v[0, 0, 0] += 1
        out = options["out"]
        out.as_strided((out.shape[-1] + 1,), (1,), out.storage_offset())[-1] = 0
        return right(q, k, v, **options)

    monkeypatch.setattr(mla_triton, "prefill", spills)
    row = rows_of(device, STRIDED)[0]
    assert not row.ok
    assert "v must be read only, and changed" in row.message
    assert "what lies between rows of out was written" in row.message


def test_a_case_that_raises_is_a_row(monkeypatch, device):
    right = mla_triton.decode

    def crashes(*arguments, **options):
        if "plan" in options:
            raise RuntimeError("out of <shared> memory")
        return right(*arguments, **options)

    monkeypatch.setattr(mla_triton, "decode", crashes)
    impossible = Case("decode", "h2", "no such format", {"kv_lens": [3], "stored": "fp9"} | {
        "dtype": torch.float16
    })  # fmt: skip
    rows = rows_of(device, SPLITS, impossible, MERGE)
    assert [row.ok for row in rows] == [True, False, True, False, True, True]
    assert rows[1].message == "RuntimeError: out of <shared> memory"
    assert "in crashes" in rows[1].traceback
    assert rows[1].measures == ()
    assert rows[1].worst is None
    assert (rows[3].implementation, rows[3].call) == ("-", "no such format")
    with pytest.raises(RuntimeError, match="out of <shared> memory"):
        again(rows[1])
    lines = list(text.lines(rows))
    assert sum(line.startswith("FAILED ") for line in lines) == 2
    assert "       RuntimeError: out of <shared> memory" in lines
    assert text.verdict(rows) == "2 of 6 FAILED"
    made = page.page(environment.facts(), 3, 1, rows)
    assert "out of &lt;shared&gt; memory" in made
    assert "<shared>" not in made


# -- what is computed


@pytest.mark.parametrize("on_gpu", [True, False])
def test_cases_cover_what_a_call_may_have(on_gpu):
    todo = cases.cases(on_gpu, seed=7)
    labels = [case.label for case in todo]
    assert len({(case.label, str(case.options)) for case in todo}) == len(todo)
    assert {case.options["seed"] for case in todo} == {7}
    for case in check.cases(on_gpu):
        assert any(case.shape in label and case.call in label for label in labels)
    decodes = [case for case in todo if case.operation == "decode"]
    stored = {case.options.get("stored", "16bit") for case in decodes}
    assert stored == {"16bit", "fp8", "fp8_groups", "fp8_ds_mla", "fp8_v4", "fp8_v41"}
    for operation in ("decode", "prefill", "merge"):
        own = [case for case in todo if case.operation == operation]
        assert {case.dtype for case in own} == {"bfloat16", "float16", "float32"}
        assert any(case.options.get("strided") for case in own)
    for operation in ("append", "gather", "copy_pages"):
        own = [case for case in todo if case.operation == operation]
        assert {case.options["form"] for case in own} == set(FORMS)
        plain = [case for case in own if case.call == "page 16"]
        assert {case.options["form"] for case in plain} == set(FORMS)
    appends = [case.options for case in todo if case.operation == "append"]
    for rotation in ("interleaved", "half"):
        fused = [each for each in appends if each.get("norm") and each.get("rotation") == rotation]
        assert {each["form"] for each in fused} == set(FORMS)
    for one, other in (("norm", "rotation"), ("rotation", "norm")):
        assert any(each.get(one) and not each.get(other) for each in appends)
    for words in ("ragged", "s_q 2", "splits", "no keys at all", "csr", "misaligned", "large"):
        assert any(words in case.call for case in decodes)
    assert max(len(case.parts) for case in decodes) >= 2


def test_every_case_can_be_made(device):
    """Those of the interpreter; of each the line that makes it gives the same values."""
    for case in cases.cases(False, seed=5)[::9]:
        inputs = case.inputs(torch.device("cpu"))
        names = {"torch": torch} | {name: getattr(testing, name) for name in testing.__all__}
        made = eval(case.code(torch.device("cpu")), names)
        assert repr(made) == repr(inputs)
        pairs = zip(testing.calls.tensors_of(made), testing.calls.tensors_of(inputs), strict=True)
        for (name, one), (_, other) in pairs:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


# -- pictures and pages


def test_rows_are_counted_by_their_share():
    shares = [0.0, 1e-9, 0.001, 0.0011, 0.999, 1.0, 1.0001, 99.0, 101.0, math.inf]
    counts = histogram.counts(torch.tensor(shares, dtype=torch.float64))
    assert len(counts) == len(histogram.EDGES) + 1
    assert sum(counts) == 10
    assert (counts[0], counts[1]) == (3, 1)
    assert sum(counts[: histogram.AT_BUDGET + 1]) == 6
    assert (counts[histogram.AT_BUDGET], counts[histogram.AT_BUDGET + 1]) == (2, 1)
    assert counts[-1] == 2
    image = histogram.svg(counts, "a < b")
    assert image.count('class="beyond"') == image.count('class="within"') == 1
    assert "a &lt; b" in image
    assert 'class="beyond"' not in histogram.svg([1] + [0] * (len(counts) - 1), "")


class Reader(HTMLParser):
    """What a page has in it, and whether every element is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_loads_and_executes_nothing(device):
    made = page.page(environment.facts(), 0, 1, rows_of(device, SPLITS, MERGE))
    reader = Reader()
    reader.feed(made)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.seen)
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in reader.attributes}
    assert "http" not in made
    assert "url(" not in made
    assert "prefers-color-scheme: dark" in made
    # Three measures of five rows, and of each of the two operations.
    assert reader.seen.count("svg") == 3 * (5 + 2)
    assert made.count("assert_correct(decode_inputs(") == 3
    assert "all 5 are within their error budgets" in made


# -- the command


def test_deep_as_a_command(capsys, tmp_path):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html")}
    written = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    options = ["--deep", "--only", "merge h8 512 bfloat16", "--seed", "4", "--repeats", "2"]
    assert cli.main(["check", *options, *written]) == 0
    out = capsys.readouterr().out
    assert f"torch       {torch.__version__}" in out
    assert "cache       " in out
    facts = json.loads(files["json"].read_text())
    assert facts["ok"] is True
    assert facts["seed"] == 4
    assert facts["environment"]["versions"]["mla_triton"] == mla_triton.__version__
    assert facts["gpu_code_executed"] is not devices.interpreting()
    assert len(facts["rows"]) == out.count("\nok ") == out.count('python -c "import torch; ')
    for row in facts["rows"]:
        assert row["repeats"] == 2
        assert row["reproduction"] in out
        assert "seed=4" in row["reproduction"]
    assert out.rstrip().endswith("within their error budgets, and the same in every repeat")
    assert files["html"].read_text().startswith("<!doctype html>")


def test_deep_fails_where_a_kernel_does(capsys, monkeypatch):
    right = mla_triton.merge

    def strange(states, **options):
        state = right(states, **options)
        state.lse[0, 0] = math.nan
        return state

    monkeypatch.setattr(mla_triton, "merge", strange)
    assert cli.main(["check", "--deep", "--only", "float32 3 states", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False
    (row,) = (row for row in facts["rows"] if row["implementation"] == "portable")
    assert row["message"].startswith("lse[0, 0] is nan, expected ")
    assert (row["measures"][2]["ratio"], row["measures"][2]["got"]) == ("inf", "nan")


def test_no_such_case(capsys):
    line = refused(capsys, "check", "--deep", "--only", "nothing of the kind")
    assert line.endswith("only must be in the name of a case, got 'nothing of the kind'")


def test_options_reach_the_child():
    words = ["--deep", "--json", "a.json", "--html", "b.html", "--seed", "3", "--only", "x y"]
    from mla_triton.cli import deep

    assert deep.words(cli.parser().parse_args(["check", *words])) == [
        "--deep", "--json", "a.json", "--html", "b.html", "--seed", "3", "--only", "x y",
    ]  # fmt: skip
    assert deep.words(cli.parser().parse_args(["check", "--json"]))[:2] == ["--json", "-"]


# -- the environment


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("550.54.15\n550.54.15\n", "550.54.15"), ("\n", None), (OSError(), None)],
)
def test_the_driver(monkeypatch, answer, expected):
    def run(command, **_):
        assert command[0] == "nvidia-smi"
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    assert environment.driver() == expected


def test_the_head_says_where_it_was(monkeypatch):
    facts = environment.facts()
    facts |= {"driver": "550.54.15", "torch_built_for": "CUDA 12.8", "debug_checks": True}
    lines = environment.lines(facts)
    assert "driver      550.54.15" in lines
    assert "built for   CUDA 12.8" in lines
    assert any(line.startswith("debug ") for line in lines)
    assert json.loads(json.dumps(facts)) == facts
