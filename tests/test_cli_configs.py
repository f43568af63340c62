"""`mla-triton configs`: what it lists, shows, compares, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import pytest
import tables
import triton
from tables import header, row

import mla_triton
from mla_triton import cli, configs
from mla_triton import device as devices
from mla_triton.configs import shipped, store, validation
from mla_triton.configs.table import Table, items, loads
from mla_triton.kernels.portable import decode as portable
from mla_triton.testing import compilation

H200 = replace(devices.from_label("9.0"), name="NVIDIA H200")
ASKED = ("--capability", "9.0", "--gpu", "NVIDIA H200")
OTHER_KEY = items(dict(tables.KEY) | {"heads": 8})
BLOCK_16, BLOCK_32, BLOCK_64 = (tables.config(block_n) for block_n in (16, 32, 64))


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of its own, a machine without a GPU, and two shipped tables."""
    made = {
        (9, 0): Table(
            replace(header(H200), date="2026-01-01"),
            (row(1, values=BLOCK_16), row(2), row(4, key=OTHER_KEY, us=None)),
        ),
        (8, 9): Table(replace(header(devices.from_label("8.9")), gpu="RTX 4090"), (row(1),)),
    }
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "current", lambda: devices.CPU)
    monkeypatch.setattr(shipped, "capabilities", lambda: tuple(sorted(made)))
    monkeypatch.setattr(shipped, "load", made.__getitem__)
    configs.forget()
    yield
    configs.forget()


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert cli.main(["configs", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[str]:
    assert cli.main(["configs", *arguments]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of bad arguments, without the command."""
    command = f"mla-triton configs {arguments[0]}: error: "
    said = commands.refused(capsys, "configs", *arguments)
    assert said.startswith(command)
    return said.removeprefix(command)


def batches(facts: Any) -> list[tuple[str, int]]:
    return [(found["table"], found["batch"]) for found in facts["rows"]]


# -- list


def test_list_without_a_card_uses_none(capsys):
    facts = answer(capsys, "list")
    assert facts["device"] is None
    assert facts["directory"] == str(store.root())
    assert [(t["file"], t["table"], t["in_use"]) for t in facts["tables"]] == [
        ("sm89.json", "shipped", False),
        ("sm90.json", "shipped", False),
    ]
    assert facts["tables"][1] | {"protocol": "", "torch": ""} == {
        "file": "sm90.json",
        "table": "shipped",
        "in_use": False,
        "capability": "9.0",
        "gpu": "NVIDIA H200",
        "rows": 3,
        "tuned": 2,
        "modelled": 1,
        "date": "2026-01-01",
        "mla_triton": mla_triton.__version__,
        "triton": triton.__version__,
        "torch": "",
        "protocol": "",
        "commit": "",
        "note": None,
    }
    assert "no GPU here" in lines(capsys, "list")[0]


def test_list_says_what_is_in_use(capsys):
    own = store.save(H200, header(H200), [row()])
    facts = answer(capsys, "list", *ASKED)
    assert facts["device"] == {"name": "NVIDIA H200", "label": "9.0"}
    assert {t["file"]: (t["in_use"], t["note"]) for t in facts["tables"]} == {
        "sm89.json": (False, None),
        "sm90.json": (True, None),
        str(own): (True, None),
    }
    text = lines(capsys, "list", *ASKED)
    assert text[0] == "card    NVIDIA H200 (9.0)"
    assert [line.split()[-1] for line in text if line.startswith("*")] == ["sm90.json", str(own)]

    # By its capability alone the card has another name.
    by_label = {t["file"]: t for t in answer(capsys, "list", "--capability", "9.0")["tables"]}
    assert by_label[str(own)]["in_use"] is False
    assert by_label[str(own)]["note"] == "not in use: its gpu is 'NVIDIA H200', not 'H200'"


def test_list_of_the_card_that_is_here(capsys, monkeypatch):
    own = store.save(H200, header(H200), [row()])
    monkeypatch.setattr(devices, "current", lambda: H200)
    in_use = [t["file"] for t in answer(capsys, "list")["tables"] if t["in_use"]]
    assert in_use == ["sm90.json", str(own)]


def test_list_says_which_table_serves_a_card_without_its_own(capsys, monkeypatch):
    monkeypatch.setattr(devices, "current", lambda: replace(H200, arch="sm_91"))
    by_file = {t["file"]: t for t in answer(capsys, "list")["tables"]}
    assert by_file["sm90.json"]["in_use"] is True
    assert by_file["sm90.json"]["note"] == "9.1 has no table, the nearest lower one serves"


def test_list_knows_other_files(capsys):
    """Of another version, misplaced, unusable, set aside; neither a lock nor half a file."""
    own = store.save(H200, header(H200), [row()])
    folder = own.parent
    old = store.root() / "0.0.1-triton3.6.0" / own.name
    old.parent.mkdir()
    old.write_text(Table(replace(header(H200), mla_triton="0.0.1"), (row(),)).dumps())
    (folder / "copy.json").write_text(own.read_text())
    (folder / "broken.json").write_text("{")
    (folder / "folder.json").mkdir()
    aside = folder / f"{own.name}.unusable-1"
    aside.write_text("[]")
    (folder / f"{own.name}.17{store.TEMPORARY}").write_text("half")
    found = answer(capsys, "list", *ASKED)["tables"]
    notes = {t["file"]: t["note"] for t in found if t["table"] == "user"}
    assert notes.pop(str(folder / "broken.json")).startswith("cannot be used: it is not JSON (")
    assert notes == {
        str(own): None,
        str(old): f"not in use: its mla_triton is '0.0.1', not '{mla_triton.__version__}'",
        str(folder / "copy.json"): f"not in use: only {own} is read",
        str(folder / "folder.json"): "cannot be used: Is a directory",
        str(aside): "cannot be used: it is not a table of configurations: it has no schema",
    }
    assert [t["file"] for t in found if t["in_use"]] == ["sm90.json", str(own)]
    text = "\n".join(lines(capsys, "list", *ASKED))
    assert all(f"{file}: {note}" in text for file, note in notes.items() if note)


def test_list_of_nothing(capsys, monkeypatch):
    monkeypatch.setattr(shipped, "capabilities", lambda: ())
    assert answer(capsys, "list")["tables"] == []
    assert lines(capsys, "list")[-1] == "no tables"


# -- show


def test_show_what_look_up_sees(capsys):
    """The user's rows of a key in place of all shipped ones of it, and the others below."""
    store.save(H200, header(H200), [row(8)])
    assert batches(answer(capsys, "show", *ASKED)) == [("shipped", 4), ("user", 8)]
    facts = answer(capsys, "show", *ASKED, "--source", "user")
    assert batches(facts) == [("user", 8)]
    assert set(facts["headers"]) == {"user"}
    assert facts["rows"][0] == {"table": "user", **row(8).plain()}
    facts = answer(capsys, "show", *ASKED, "--source", "shipped")
    assert batches(facts) == [("shipped", 4), ("shipped", 1), ("shipped", 2)]
    assert facts["headers"]["shipped"]["date"] == "2026-01-01"


def test_show_agrees_with_look_up(capsys):
    """Every row that it shows of the card is the one that a call of its point gets."""
    store.save(H200, header(H200), [row(8, us=7.0)])
    for found in answer(capsys, "show", *ASKED)["rows"]:
        heads, batch = found["key"]["heads"], found["batch"]
        problem = compilation.problem(heads=heads)
        problem = replace(problem, batch=batch, queries=batch, max_kv_len=found["length"])
        choice = configs.choose(portable, problem, H200)
        assert choice.row.plain() == {n: v for n, v in found.items() if n != "table"}
        assert (choice.source == "user") is (found["table"] == "user")


def test_show_is_a_table(capsys):
    text = lines(capsys, "show", "--capability", "9.0")
    assert text[0].startswith("shipped  9.0, NVIDIA H200, 2026-01-01, mla_triton ")
    names, *body = [line.split() for line in text[2:]]
    assert names[:2] == ["op", "impl"]
    assert len(body) == 3
    assert all(len(line) == len(names) for line in body)
    shown = [dict(zip(names, line, strict=True)) for line in body]
    assert [(s["heads"], s["batch"], s["us"], s["source"]) for s in shown] == [
        ("8", "4", "-", "modelled"),
        ("16", "1", "10.0", "tuned"),
        ("16", "2", "10.0", "tuned"),
    ]


def test_show_where(capsys):
    def where(*conditions: str) -> list[tuple[str, int]]:
        return batches(answer(capsys, "show", "--capability", "9.0", "--where", *conditions))

    assert where("heads=16") == [("shipped", 1), ("shipped", 2)]
    assert where("heads=16", "batch=2") == [("shipped", 2)]
    assert where("heads=16", "--where", "block_n=16") == [("shipped", 1)]
    assert where("source=modelled") == [("shipped", 4)]
    assert where("dtype=float16") == []
    text = lines(capsys, "show", "--capability", "9.0", "--where", "dtype=float16")
    assert text[-1] == "no rows"


def test_show_errors(capsys, monkeypatch):
    assert refused(capsys, "show") == (
        "capability must be given where there is no GPU: --capability 9.0"
    )
    assert refused(capsys, "show", "--capability", "cpu") == (
        "capability must be that of a GPU, got 'cpu'"
    )
    assert refused(capsys, "show", "--capability", "7.5").startswith(
        "capability must be one of 8.0, 8.6, "
    )
    file = store.path(replace(H200, name="H200"))
    assert refused(capsys, "show", "--capability", "9.0", "--source", "user") == (
        f"capability must be of a card that has a table, got 9.0: there is no {file}"
    )
    assert refused(capsys, "show", "--capability", "12.0").endswith(", and none is shipped")
    assert refused(capsys, "show", "--capability", "9.0", "--source", "other").startswith(
        "argument --source: invalid choice: 'other'"
    )
    for condition in ("heads", "=16", ""):
        assert refused(capsys, "show", "--capability", "9.0", "--where", condition) == (
            f"argument --where: must be NAME=VALUE, got {condition!r}"
        )
    message = refused(capsys, "show", "--capability", "9.0", "--where", "head=16")
    assert message.startswith("where must name one of batch, block_n, dtype, format, heads, ")
    assert message.endswith(", got 'head'")
    store.save(H200, header(H200), [row()]).write_text("{}")
    message = refused(capsys, "show", *ASKED)
    assert message == (
        f"the user's file must be a table, got {store.path(H200)}: "
        "it is not a table of configurations: it has no schema"
    )
    assert lines(capsys, "show", *ASKED, "--source", "shipped")


# -- diff


def written(path: Path, *rows: Any, **changes: Any) -> str:
    path.write_text(Table(header(H200, **changes), rows).dumps())
    return str(path)


def test_diff_of_the_same(capsys, tmp_path):
    """Other times, another date and another order are no difference: the answers are the same."""
    a = written(tmp_path / "a", row(1), row(2))
    b = written(tmp_path / "b", row(2, us=99.0), row(1, us=None), date="2026-02-02")
    assert answer(capsys, "diff", a, b)["same"] == 2
    assert lines(capsys, "diff", a, b)[-1] == (
        "2 rows have the same config, 0 another; 0 are in a alone, 0 in b alone"
    )
    assert answer(capsys, "diff", "sm90", "sm90")["same"] == 3


def test_diff_of_others(capsys, tmp_path):
    a = written(tmp_path / "a", row(1), row(2, values=BLOCK_16), row(4), row(16, us=None))
    b = written(tmp_path / "b", row(8), row(2, us=8.0), row(4), row(16, values=BLOCK_64))
    facts = answer(capsys, "diff", a, b, code=1)
    assert facts["a"]["name"] == a
    assert facts["b"]["gpu"] == "NVIDIA H200"
    assert facts["only_a"] == [row(1).plain()]
    assert facts["only_b"] == [row(8).plain()]
    assert facts["same"] == 1
    assert facts["changed"] == [
        {"a": row(2, values=BLOCK_16).plain(), "b": row(2, us=8.0).plain(), "ratio": 0.8},
        {"a": row(16, us=None).plain(), "b": row(16, values=BLOCK_64).plain(), "ratio": None},
    ]
    text = lines(capsys, "diff", a, b, code=1)
    assert sum(line.startswith("only in a  decode portable dtype=bfloat16 ") for line in text) == 1
    assert sum(line.startswith("only in b  ") for line in text) == 1
    (faster, unknown) = [line for line in text if line.startswith("changed ")]
    assert faster.endswith(
        " batch=2 length=4096: [block_n=16 num_stages=2 num_warps=4] -> "
        "[block_n=32 num_stages=2 num_warps=4], 10.0 us -> 8.0 us (x0.800)"
    )
    assert unknown.endswith("[block_n=64 num_stages=2 num_warps=4]")
    assert text[-1] == "1 rows have the same config, 2 another; 1 are in a alone, 1 in b alone"


@pytest.mark.parametrize("alone", ["a", "b"])
def test_a_row_in_one_alone_is_a_difference(capsys, tmp_path, alone):
    names = {"a": [row(1)], "b": [row(1)]}
    names[alone].append(row(2))
    a, b = (written(tmp_path / name, *rows) for name, rows in names.items())
    assert len(answer(capsys, "diff", a, b, code=1)[f"only_{alone}"]) == 1


def test_diff_with_a_shipped_table(capsys, tmp_path):
    own = written(tmp_path / "own.json", row(1, values=BLOCK_16))
    facts = answer(capsys, "diff", "sm90", own, code=1)
    assert (len(facts["only_a"]), facts["only_b"], facts["same"]) == (2, [], 1)


def test_diff_errors(capsys, tmp_path):
    a = written(tmp_path / "a", row())
    assert refused(capsys, "diff", a, "sm75") == (
        "b must be a file or a shipped table (sm89, sm90), got 'sm75'"
    )
    assert refused(capsys, "diff", str(tmp_path), a) == (
        f"a must be a table, got '{tmp_path}': Is a directory"
    )
    (tmp_path / "b").write_text("{}")
    assert refused(capsys, "diff", a, str(tmp_path / "b")).endswith("it has no schema")
    assert "the following arguments are required: b" in refused(capsys, "diff", a)


# -- export


def test_export_is_what_look_up_sees(capsys, tmp_path):
    store.save(H200, header(H200, date="2026-03-03"), [row(8)])
    file = tmp_path / "out.json"
    facts = answer(capsys, "export", str(file), *ASKED)
    assert facts == {"file": str(file), "user": 1, "shipped": 1}
    table = loads(file.read_text())
    assert table.header.date == "2026-03-03"
    assert [r.point.batch for r in table.rows] == [4, 8]
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out.json"}


def test_an_export_can_be_copied_into_a_cache(capsys, tmp_path, monkeypatch):
    own = store.save(H200, header(H200), [row(8)])
    assert lines(capsys, "export", str(tmp_path / "out.json"), *ASKED) == [
        f"wrote 1 rows of the user's and 1 shipped to {tmp_path / 'out.json'}"
    ]
    own.write_text((tmp_path / "out.json").read_text())
    monkeypatch.setattr(shipped, "capabilities", lambda: ())
    assert {r.point.batch for r in store.load(H200).rows} == {4, 8}


def test_export_without_rows_of_the_users(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert answer(capsys, "export", str(file), "--capability", "8.9")["shipped"] == 1
    assert loads(file.read_text()) == shipped.load((8, 9))


def test_export_overwrites_only_by_force(capsys, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("precious")
    assert refused(capsys, "export", str(file), "--capability", "9.0") == (
        f"path must not be there yet, got {file}: --force overwrites it"
    )
    assert file.read_text() == "precious"
    assert answer(capsys, "export", str(file), "--capability", "9.0", "--force")["shipped"] == 3
    assert len(loads(file.read_text()).rows) == 3


def test_an_export_that_fails_leaves_what_was_there(capsys, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "out.json"
    file.write_text("precious")
    monkeypatch.setattr("os.fsync", full)
    assert refused(capsys, "export", str(file), "--capability", "9.0", "--force") == (
        f"path must be a file that can be written, got {file}: No space left on device"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert file.read_text() == "precious"
    nowhere = tmp_path / "no" / "out.json"
    assert refused(capsys, "export", str(nowhere), "--capability", "9.0") == (
        f"path must be a file that can be written, got {nowhere}: No such file or directory"
    )


def test_export_does_not_leave_the_users_rows_out(capsys, tmp_path):
    store.save(H200, header(H200), [row()]).write_text("{")
    file = tmp_path / "out.json"
    assert refused(capsys, "export", str(file), *ASKED).startswith("the user's file must be a ")
    assert not file.exists()


# -- validate


def test_validate_what_is_in_use(capsys, monkeypatch):
    assert answer(capsys, "validate") == {"ok": True, "files": 2, "rows": 4, "problems": []}
    own = store.save(H200, header(H200), [row(16), row(32)])
    monkeypatch.setattr(devices, "current", lambda: H200)
    assert answer(capsys, "validate")["rows"] == 6
    assert lines(capsys, "validate") == ["3 tables, 6 rows: every row can be found and run"]
    own.write_text(own.read_text().replace('"block_n": 32', '"block_n": 48'))
    facts = answer(capsys, "validate", code=1)
    assert [(p["file"], p["row"]) for p in facts["problems"]] == [(str(own), 1), (str(own), 2)]


def test_validate_a_header_that_is_not_of_its_place(capsys, monkeypatch):
    own = store.save(H200, header(H200), [row()])
    own.write_text(own.read_text().replace('"NVIDIA H200"', '"NVIDIA H20"'))
    monkeypatch.setattr(devices, "current", lambda: H200)
    monkeypatch.setattr(shipped, "capabilities", lambda: ((9, 0),))
    monkeypatch.setattr(shipped, "load", lambda at: tables.table(device=H200))
    assert lines(capsys, "validate", code=1) == [
        f"{own}: its gpu is 'NVIDIA H20', not 'NVIDIA H200'",
        "2 tables, 1 rows: 1 rules are broken",
    ]
    monkeypatch.setattr(shipped, "capabilities", lambda: ((8, 9),))
    assert lines(capsys, "validate", code=1)[0] == (
        "sm89.json: header.capability must be 8.9, got '9.0'"
    )


def test_validate_names_file_row_and_rule(capsys, tmp_path):
    good = written(tmp_path / "good.json", row(1), row(2))
    bad = written(tmp_path / "bad.json", row(1), row(2, values=tables.config(48)))
    assert lines(capsys, "validate", good, bad, code=1) == [
        f"{bad}: row 2: config {dict(tables.config(48))} cannot be used: "
        "block_n must be a power of two in [16, 256], got 48",
        "2 tables, 4 rows: 1 rules are broken",
    ]
    (tmp_path / "none.json").write_text("[]")
    assert lines(capsys, "validate", str(tmp_path / "none.json"), code=1)[0] == (
        f"{tmp_path / 'none.json'}: it is not a table of configurations: it has no schema"
    )


def test_validate_errors(capsys, tmp_path):
    missing = tmp_path / "missing.json"
    assert refused(capsys, "validate", str(missing)) == (
        f"path must be a file that can be read, got {missing}: No such file or directory"
    )


@pytest.mark.parametrize("label", ["7.5", "cpu", "interpreter", ""])
def test_a_table_is_of_a_gpu_that_is_known(label):
    ((number, rule),) = validation.broken_rules(Table(header(capability=label), (row(),)))
    assert number is None
    assert rule.startswith("header.capability must be ")
    assert rule.endswith(f"got {label!r}")


def test_a_card_that_is_here_is_known(monkeypatch):
    card = replace(H200, arch="sm_91", shared_memory=64 * 1024)
    monkeypatch.setattr(devices, "current", lambda: card)
    table = Table(header(card), (row(1, values=BLOCK_16), row(2, values=BLOCK_64)))
    ((number, rule),) = validation.broken_rules(table)
    assert number == 2
    assert "9.1 has 65536" in rule


def keyed(**changes: Any) -> Any:
    return row(64, key=items(dict(tables.KEY) | changes))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (replace(row(), point=row().point._replace(op="merge")), "op and impl must be decode "),
        (replace(row(), point=row().point._replace(op="prefill")), "key must have causal, dtype, "),
        (replace(row(), point=row().point._replace(impl="sm80")), "op and impl must be decode sm9"),
        (replace(row(), us=None), "us must be a number if tuned and null if modelled, got None "),
        (replace(row(), source="modelled"), "us must be a number if tuned and null if modelled, "),
        (row(key=tables.KEY[1:]), "key must have dtype, format, heads, latent, "),
        (keyed(more=1), "key must have dtype, format, heads, latent, "),
        (keyed(heads="16"), "key.heads must be int, got '16'"),
        (keyed(s_q=True), "key.s_q must be int, got True"),
        (keyed(dtype="float32"), "key.dtype must be one of bfloat16, float16, got 'float32'"),
        (
            keyed(format="8bit"),
            "key.format must be 16bit, fp8 or fp8-<columns that share a s",
        ),
        (keyed(format="fp8-100-float32"), "key.format must be 16bit, fp8 or fp8-<columns that "),
        (keyed(format="fp8-0-e8m0"), "key.format must be 16bit, fp8 or fp8-<columns that share a "),
        (keyed(format="fp8-128-int8"), "key.format must be 16bit, fp8 or fp8-<columns that share "),
        (keyed(heads=20), "key.heads must be 32, got 20"),
        (keyed(heads=0), "key.heads must be 1, got 0"),
        (keyed(s_q=8), "key.s_q must be 4, got 8"),
        (keyed(s_q=3), "key.s_q must be 4, got 3"),
        (keyed(page_size=128), "key.page_size must be 64, got 128"),
        (keyed(page_size=0), "key.page_size must be 64, got 0"),
        (keyed(latent=500, value_dim=500), "key must be of a problem that portable takes: value_"),
        (keyed(rope=48), "key must be of a problem that portable takes: the rotary key must "),
        (keyed(value_dim=256, latent=320, rope=0), "key.value_dim must be latent or latent + rope"),
        (
            keyed(row_tile=64),
            "key.row_tile must be 16 at batch 64 on 9.0, or no call finds the row, got 64",
        ),
        (
            keyed(heads=64, s_q=4),
            "key.row_tile must be 64 at batch 64 on 9.0, or no call finds the row, got 16",
        ),
        (row(values=tables.CONFIG[1:]), "config {'num_stages': 2, 'num_warps': 4} cannot be used"),
        (row(values=tables.config(256, 8, 6)), "needs "),
    ],
)
def test_every_rule_of_a_row(given, rule):
    found = validation.broken_rule(given, H200)
    assert found is not None
    assert rule in found


@pytest.mark.parametrize("label", devices.KNOWN)
def test_what_a_tuner_would_write_breaks_no_rule(label):
    """The heuristic's config at the point of each problem; buckets whose row tiles differ, too."""
    device = devices.from_label(label)
    dimensions = (*compilation.DIMENSIONS, compilation.ROPE_INSIDE)
    for heads in (1, 5, 16, 17, 40, 65, 128):
        for s_q in (1, 2, 3, 4, 40):
            for batch in (1, 2, 64):
                widths = dimensions[(heads + s_q + batch) % len(dimensions)]
                problem = compilation.problem(heads=heads, dimensions=widths)
                problem = replace(problem, batch=batch, s_q=s_q, queries=batch * s_q)
                key, _, _ = portable.tuning_point(problem, device)
                config = portable.heuristic(problem, device)
                values = tables.config(config.block_n, config.num_warps, config.num_stages)
                found = validation.broken_rule(row(batch, values=values, key=key), device)
                assert found is None, (heads, s_q, batch, found)


@pytest.mark.parametrize("label", ["8.0", "8.9", "9.0", "gfx942"])
def test_rows_of_quantised_caches_break_no_rule(label):
    device = devices.from_label(label)
    for heads in (5, 16, 40, 128):
        for form, problem in compilation.quantised_problems(heads=heads).items():
            key, batch, _ = portable.tuning_point(problem, device)
            config = portable.heuristic(problem, device)
            values = tables.config(config.block_n, config.num_warps, config.num_stages)
            found = validation.broken_rule(row(batch, values=values, key=key), device)
            assert found is None, (form, heads, found)
            wrong = row(batch, values=tables.config(256, 8, 6), key=key)
            assert "needs " in validation.broken_rule(wrong, device)


# -- the group


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["configs"])
    assert stopped.value.code == 2
    line = "mla-triton configs: error: the following arguments are required: command\n"
    assert capsys.readouterr().err == line


def test_commands_that_read_do_not_write(capsys):
    for command in (["list"], ["show", "--capability", "9.0"], ["validate"]):
        cli.main(["configs", *command])
    assert not store.root().exists()
