"""The user's own rows on disk: concurrent writers, killed writers, full disks, unusable files.

Writers are real processes (`tests/store_writer.py`). Whatever happens, a call gets a config.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tables
import triton
from tables import CARD, header, row

import mla_triton
from mla_triton import configs
from mla_triton.configs import shipped, store
from mla_triton.configs.table import FormatError, loads
from mla_triton.kernels.portable import decode as portable
from mla_triton.testing import compilation

WRITER = Path(__file__).parent / "store_writer.py"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "cache"))
    configs.forget()
    yield
    configs.forget()


def kept() -> list[int]:
    """Batches of the rows in the card's file."""
    return sorted(row.point.batch for row in loads(store.path(CARD).read_text()).rows)


def beside() -> set[str]:
    """What stands in the directory of the card's file, less the lock."""
    file = store.path(CARD)
    return {entry.name for entry in file.parent.iterdir()} - {file.name + store.LOCK}


def unusable(text: str | bytes) -> Path:
    """The card's file, with something else in it."""
    file = store.path(CARD)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


# -- where


def test_a_file_for_a_card_and_its_versions(tmp_path):
    folder = f"{mla_triton.__version__}-triton{triton.__version__}"
    root = tmp_path / "cache" / "configs" / folder
    assert store.path(CARD) == root / "sm90-nvidia-h100-made-up-.json"
    h200 = replace(CARD, name="NVIDIA H200")
    assert store.path(h200) == root / "sm90-nvidia-h200.json"
    assert store.path(replace(h200, arch="sm_100")) == root / "sm100-nvidia-h200.json"
    amd = replace(CARD, name="AMD Instinct MI300X/2.0", arch="gfx942", backend="hip")
    assert store.path(amd) == root / "gfx942-amd-instinct-mi300x-2.0.json"
    assert not root.exists()


def test_nothing_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.load(CARD) is None
        assert store.read(CARD) is None


# -- what is saved is there


def test_rows_are_merged_and_the_header_is_the_last():
    assert store.save(CARD, header(date="2026-01-01"), [row(1), row(2)]) == store.path(CARD)
    slower = row(2, values=tables.config(64), us=99.0)
    store.save(CARD, header(date="2026-02-02"), [row(3), slower])
    table = store.load(CARD)
    assert table.header.date == "2026-02-02"
    assert {r.point.batch: r for r in table.rows} == {1: row(1), 2: slower, 3: row(3)}
    assert beside() == {store.path(CARD).name}


def test_a_look_up_finds_what_was_saved(recwarn):
    problem = replace(compilation.problem(), max_kv_len=4096)
    key, batch, length = portable.tuning_point(problem, CARD)
    store.save(CARD, header(), [row(batch, length, key=key, values=tables.config(16, 8, 1))])
    choice = configs.choose(portable, problem, CARD)
    assert choice.source == "user"
    assert choice.config == portable.Config(16, 8, 1)
    assert str(store.path(CARD)) in choice.reason
    assert not recwarn.list


def test_a_header_of_another_card_is_refused():
    for other in (header(gpu="B200"), header(capability="9.1"), header(triton="0")):
        with pytest.raises(ValueError, match=r"^header must be of NVIDIA H100"):
            store.save(CARD, other, [row()])
    assert not store.root().exists()


def test_rows_that_could_not_be_read_back_are_not_written():
    store.save(CARD, header(), [row(1)])
    with pytest.raises(FormatError, match="length must be a power of two, got 48"):
        store.save(CARD, header(), [row(2, 48)])
    assert kept() == [1]
    assert beside() == {store.path(CARD).name}


# -- several processes


@contextlib.contextmanager
def writers(*arguments: tuple[str, int]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ready to save; none outlives the block."""
    started = [
        subprocess.Popen(
            [sys.executable, str(WRITER), how, str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for how, first in arguments
    ]
    try:
        for writer in started:
            assert writer.stdout.readline() == "ready\n"
        yield started
    finally:
        for writer in started:
            writer.kill()
            writer.communicate()


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def test_no_row_of_concurrent_writers_is_lost():
    store.save(CARD, header(), [row(1)])
    seen = 0
    with writers(("25", 1000), ("25", 2000), ("25", 3000), ("25", 4000)) as started:
        go(*started)
        while any(writer.poll() is None for writer in started):
            count = len(kept())
            assert count >= seen, "rows that were there are gone"
            seen = count
        assert [writer.returncode for writer in started] == [0, 0, 0, 0]
    assert kept() == [1, *(1000 * n + m for n in (1, 2, 3, 4) for m in range(25))]
    assert beside() == {store.path(CARD).name}


def test_a_killed_writer_loses_no_row_that_it_has_kept():
    """Killed at whatever moment; what it has printed is in the file, which is whole."""
    written: set[int] = set()
    with writers(("forever", 1000), ("forever", 2000), ("forever", 3000)) as started:
        go(*started)
        for number, writer in enumerate(started):
            for _ in range(20 + number):
                written.add(int(writer.stdout.readline()))
            writer.kill()
            written.update(map(int, writer.communicate()[0].split()))
            assert written <= set(kept())
    store.save(CARD, header(), [row(1)])
    assert written | {1} <= set(kept())
    assert beside() == {store.path(CARD).name}


def test_a_writer_killed_before_its_rename_leaves_the_old_file():
    file = store.path(CARD)
    store.save(CARD, header(), [row(1)])
    before = file.read_bytes()
    with writers(("stuck", 2)) as (stuck,):
        go(stuck)
        assert stuck.stdout.readline() == "stuck\n"
        temporary = f"{file.name}.{stuck.pid}{store.TEMPORARY}"
        assert beside() == {file.name, temporary}
        assert file.read_bytes() == before

        # It holds the lock: another writer waits for it, and no longer than it lives.
        other = threading.Thread(target=store.save, args=(CARD, header(), [row(3)]))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        stuck.kill()
        other.join(30)
        assert not other.is_alive()
    assert kept() == [1, 3]
    assert beside() == {file.name}


def test_what_another_card_is_writing_is_left_alone():
    store.save(CARD, header(), [row(1)])
    other = store.path(replace(CARD, name="NVIDIA H200"))
    passing = other.with_name(f"{other.name}.1{store.TEMPORARY}")
    passing.write_text("half")
    store.save(CARD, header(), [row(2)])
    assert passing.read_text() == "half"


# -- what cannot be written


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing more reaches the disk, as a file's data first shows when it is flushed there."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel writes so many bytes of a file and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_everything_as_it_was(monkeypatch):
    file = store.save(CARD, header(), [row(1)])
    before = file.read_bytes()
    with full_disk(monkeypatch):
        for attempt in (
            lambda: store.save(CARD, header(), [row(2)]),
            lambda: store.check_writable(CARD),
        ):
            with pytest.raises(store.StoreError) as error:
                attempt()
            assert str(error.value) == (
                f"{file} cannot be written: No space left on device; "
                "MLA_TRITON_CACHE_DIR may name another directory"
            )
            assert file.read_bytes() == before
            assert beside() == {file.name}
    store.save(CARD, header(), [row(2)])
    assert kept() == [1, 2]


def test_half_a_file_is_never_seen():
    file = store.save(CARD, header(), [row(1)])
    before = file.read_bytes()
    with files_of_at_most(len(before) // 2), pytest.raises(store.StoreError) as error:
        store.save(CARD, header(), [row(2)])
    assert f"{file} cannot be written: File too large" in str(error.value)
    assert file.read_bytes() == before
    assert beside() == {file.name}


def test_a_full_disk_does_not_set_the_old_file_aside(monkeypatch):
    file = unusable("{}")
    with full_disk(monkeypatch), pytest.raises(store.StoreError):
        store.save(CARD, header(), [row()])
    assert file.read_text() == "{}"
    assert beside() == {file.name}


def test_a_directory_that_cannot_be_made(monkeypatch, tmp_path):
    """As one that must not be written; root may write those, and may not do this either."""
    blocking = tmp_path / "a file"
    blocking.write_text("")
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(blocking))
    for attempt in (
        lambda: store.save(CARD, header(), [row()]),
        lambda: store.check_writable(CARD),
    ):
        with pytest.raises(store.StoreError) as error:
            attempt()
        assert str(error.value).startswith(
            f"{store.path(CARD)} cannot be written: Not a directory ({blocking}"
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_must_not_be_written():
    file = store.save(CARD, header(), [row(1)])
    shutil.copy(file, file.with_suffix(".before"))
    file.parent.chmod(0o500)
    try:
        for attempt in (
            lambda: store.save(CARD, header(), [row(2)]),
            lambda: store.check_writable(CARD),
        ):
            with pytest.raises(store.StoreError, match="Permission denied"):
                attempt()
    finally:
        file.parent.chmod(0o700)
    assert kept() == [1]


def test_check_writable_writes_nothing_of_its_own():
    store.check_writable(CARD)
    assert beside() == set()
    file = store.save(CARD, header(), [row(1)])
    before = file.read_bytes()
    store.check_writable(CARD)
    assert file.read_bytes() == before
    assert beside() == {file.name}


def test_a_file_of_a_newer_schema_is_never_replaced():
    text = json.dumps({"schema": 2, "rows": "something of the future"})
    file = unusable(text)
    for attempt in (
        lambda: store.save(CARD, header(), [row()]),
        lambda: store.check_writable(CARD),
    ):
        with pytest.raises(store.StoreError) as error:
            attempt()
        assert str(error.value) == (
            f"{file} must not be replaced, a newer version wrote it: "
            "its schema is 2, this version reads 1"
        )
    assert file.read_text() == text
    assert beside() == {file.name}


def test_a_directory_in_place_of_the_file_is_left_there():
    file = store.path(CARD)
    (file / "inside").mkdir(parents=True)
    for attempt in (
        lambda: store.save(CARD, header(), [row()]),
        lambda: store.check_writable(CARD),
    ):
        with pytest.raises(store.StoreError, match="cannot be written: Is a directory"):
            attempt()
    assert (file / "inside").is_dir()
    assert beside() == {file.name}


# -- what cannot be used

WHOLE = tables.table(row(64, 4096, values=tables.config(16, 8, 1))).dumps()
UNUSABLE = {
    "empty": (b"", "it is not JSON (Expecting value"),
    "truncated": (WHOLE[: len(WHOLE) // 2].encode(), "it is not JSON ("),
    "corrupt": (WHOLE.replace('"batch": 64', '"batch": -64').encode(), "row 1: batch must be a "),
    "not UTF-8": (b"\xff\xfe" + WHOLE.encode("utf-16-le"), "it is not UTF-8 text ("),
    "foreign": (b'{"name": "a-javascript-package"}', "it is not a table of configurations: "),
    "nested": (b"[" * 200_000, "it is not JSON ("),
    "older schema": (WHOLE.replace('"schema": 1', '"schema": 0').encode(), "its schema is 0, "),
    "another capability": (
        WHOLE.replace('"capability": "9.0"', '"capability": "8.0"').encode(),
        "its capability is '8.0', not '9.0'",
    ),
    "another GPU": (
        WHOLE.replace(CARD.name, "NVIDIA H20").encode(),
        f"its gpu is 'NVIDIA H20', not '{CARD.name}'",
    ),
    "another package": (
        WHOLE.replace(f'"mla_triton": "{mla_triton.__version__}"', '"mla_triton": "0"').encode(),
        f"its mla_triton is '0', not '{mla_triton.__version__}'",
    ),
    "another Triton": (
        WHOLE.replace(f'"triton": "{triton.__version__}"', '"triton": "2.0"').encode(),
        f"its triton is '2.0', not '{triton.__version__}'",
    ),
}
NEWER = (WHOLE.replace('"schema": 1', '"schema": 2').encode(), "its schema is 2, this version ")


def refused_by_look_up(file: Path, reason: str) -> None:
    """One warning, in a process, that names the file; and a config nevertheless."""
    problem = compilation.problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for heads in (16, 32, 64):
            choice = configs.choose(portable, replace(problem, heads=heads), CARD)
            assert portable.is_valid(choice.config, replace(problem, heads=heads), CARD)[0]
            assert choice.source != "user"
    assert [warning.category for warning in caught] == [UserWarning]
    message = str(caught[0].message)
    assert message.startswith(f"{file} is not used, the shipped table serves: {reason}")


@pytest.mark.parametrize("name", [*UNUSABLE, "newer schema"])
def test_an_unusable_file_is_named_in_a_warning(name):
    assert loads(WHOLE), "only what is changed is wrong"
    text, reason = UNUSABLE.get(name, NEWER)
    refused_by_look_up(unusable(text), reason)


def test_a_file_that_cannot_be_read_is_named_in_a_warning(monkeypatch, tmp_path):
    file = store.path(CARD)
    file.mkdir(parents=True)
    refused_by_look_up(file, "it cannot be read (Is a directory)")

    configs.forget()
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "a file"))
    refused_by_look_up(store.path(CARD), "it cannot be read (Not a directory)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_must_not_be_read_is_named_in_a_warning():
    file = unusable(WHOLE)
    file.chmod(0)
    refused_by_look_up(file, "it cannot be read (Permission denied)")


def test_the_shipped_table_serves_where_the_users_file_is_unusable(monkeypatch):
    problem = replace(compilation.problem(), max_kv_len=4096)
    key, batch, length = portable.tuning_point(problem, CARD)
    made_up = tables.table(row(batch, length, key=key, values=tables.config(16, 4, 3)))
    monkeypatch.setattr(shipped, "capabilities", lambda: ((9, 0),))
    monkeypatch.setattr(shipped, "load", lambda capability: made_up)
    unusable("{")
    with pytest.warns(UserWarning, match="is not used, the shipped table serves"):
        choice = configs.choose(portable, problem, CARD)
    assert (choice.source, choice.config) == ("tuned", portable.Config(16, 4, 3))


def test_an_error_that_nobody_expects_is_not_hidden(monkeypatch):
    def fails(text: str) -> None:
        raise KeyError("a bug")

    unusable(WHOLE)
    monkeypatch.setattr(store, "loads", fails)
    with pytest.raises(KeyError):
        store.load(CARD)


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_set_aside(name):
    text, reason = UNUSABLE[name]
    file = unusable(text)
    aside = file.with_name(file.name + ".unusable-1")
    with pytest.warns(UserWarning, match="could not be used and was set aside") as caught:
        store.save(CARD, header(), [row(1)])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"{file} could not be used and was set aside as {aside}: {reason}")
    assert aside.read_bytes() == text
    assert kept() == [1]
    assert store.load(CARD) is not None


def test_nothing_that_was_set_aside_is_overwritten():
    for number in (1, 2, 3):
        file = unusable(f"{{{number}")
        with pytest.warns(UserWarning, match=f"{file.name}.unusable-{number}:"):
            store.save(CARD, header(), [row(number)])
    for number in (1, 2, 3):
        assert file.with_name(f"{file.name}.unusable-{number}").read_text() == f"{{{number}"
    assert kept() == [3]
