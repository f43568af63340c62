"""The user's own tuned rows, in a file of this machine.

One file for a card, package and Triton version: `configs/0.1.0-triton3.6.0/sm90-nvidia-h200.json`
below the cache directory. What was tuned for another of these is left alone.

Readers take no lock: a file is replaced whole, so they find the old one or the new one. Writers
take turns at a lock file beside it, and merge their rows into what the one before them left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import triton

from mla_triton.configs import shipped
from mla_triton.configs.directory import cache_directory
from mla_triton.configs.table import FormatError, Header, NewerSchemaError, Row, Table, loads
from mla_triton.device import Device

LOCK, TEMPORARY = ".lock", ".tmp"
"""Endings of what stands beside a table: never a table itself."""


class StoreError(OSError):
    """The user's rows cannot be kept; the message names the file and the reason."""


def root() -> Path:
    """Where the files of all cards and versions lie."""
    return cache_directory() / "configs"


def path(device: Device) -> Path:
    """The file of a card, whether it is there or not."""
    versions = _versions()
    slug = re.sub(r"[^a-z0-9.]+", "-", device.name.lower())
    folder = f"{versions['mla_triton']}-triton{versions['triton']}"
    return root() / folder / f"{shipped.stem(device)}-{slug}.json"


def why_not(header: Header, device: Device) -> str | None:
    """Why the rows below a header are not for a card under these versions, or None."""
    wanted = {"capability": device.label, "gpu": device.name, **_versions()}
    for name, value in wanted.items():
        if getattr(header, name) != value:
            return f"its {name} is {getattr(header, name)!r}, not {value!r}"
    return None


def read_file(file: Path) -> Table:
    """The table in a file, of whatever card and version.

    Raises OSError where it cannot be read, FormatError where it holds no table.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"it is not UTF-8 text ({error})") from error
    return loads(text)


def read(device: Device) -> Table | None:
    """The rows of a card; None where there is no file.

    Raises OSError and FormatError as `read_file`, the latter also for rows of another card or
    version.
    """
    try:
        table = read_file(path(device))
    except FileNotFoundError:
        return None
    reason = why_not(table.header, device)
    if reason is not None:
        raise FormatError(reason)
    return table


def load(device: Device) -> Table | None:
    """The rows of a card; None where there are none, with a warning where a file is unusable."""
    try:
        return read(device)
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
    except FormatError as error:
        reason = str(error)
    message = f"{path(device)} is not used, the shipped table serves: {reason}"
    warnings.warn(message, UserWarning, stacklevel=2)
    return None


def save(device: Device, header: Header, rows: Iterable[Row]) -> Path:
    """Puts rows in place of those at the same points, and the header over them all.

    An unusable file is set aside under another name, with a warning, and a new one begun. Returns
    the file.

    Raises ValueError for a header that is not the device's, FormatError for rows that could not be
    read back, StoreError where the file cannot be written or is of a newer schema; it is then as
    it was.
    """
    reason = why_not(header, device)
    if reason is not None:
        raise ValueError(f"header must be of {device.name} and these versions, got one: {reason}")
    file = path(device)
    aside = None
    with _as_store_error(file), _turn(file):
        found, unusable = _found(file, device)
        earlier = () if found is None else found.rows
        text = Table(header, earlier).with_rows(rows).dumps()
        # What could not be read back would cost the rows that are there.
        loads(text)
        with beside(file, text) as new:
            if unusable is not None:
                aside = _free_name(file)
                os.rename(file, aside)
            os.replace(new, file)
        _sync(file.parent)
    if aside is not None:
        message = f"{file} could not be used and was set aside as {aside}: {unusable}"
        warnings.warn(message, UserWarning, stacklevel=2)
    return file


def check_writable(device: Device) -> None:
    """Raises the StoreError that `save` would raise: to be called before an hour of timing."""
    file = path(device)
    with _as_store_error(file), _turn(file):
        _found(file, device)
        with beside(file, "\n"):
            pass


@contextmanager
def beside(file: Path, text: str) -> Iterator[Path]:
    """A temporary file in the directory of `file`, safely on disk, to be renamed to it.

    It is gone afterwards if it was not. Raises OSError.
    """
    new = file.with_name(f"{file.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(new, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            # Renamed before its text is on disk, a power cut would leave an empty file.
            os.fsync(stream.fileno())
        yield new
    finally:
        new.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    # The package imports this module before it has a version.
    import mla_triton

    return {"mla_triton": mla_triton.__version__, "triton": triton.__version__}


def _found(file: Path, device: Device) -> tuple[Table | None, str | None]:
    """(the rows to be kept, why the file that is there cannot be used)."""
    try:
        table = read_file(file)
    except FileNotFoundError:
        return None, None
    except NewerSchemaError as error:
        raise StoreError(
            f"{file} must not be replaced, a newer version wrote it: {error}"
        ) from error
    except FormatError as error:
        return None, str(error)
    reason = why_not(table.header, device)
    return (table, None) if reason is None else (None, reason)


@contextmanager
def _turn(file: Path) -> Iterator[None]:
    """This process's turn at a file: the kernel ends the turn of one that was killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The lock file stays. Were it removed, one process could hold the lock of the file that is
    # gone, and another that of a new one.
    with open(file.with_name(file.name + LOCK), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever wrote these held the lock, and was killed.
        for left in file.parent.glob(f"{file.name}.*{TEMPORARY}"):
            left.unlink(missing_ok=True)
        yield


@contextmanager
def _as_store_error(file: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"{file} cannot be written: {error.strerror or error}{where}; "
            f"MLA_TRITON_CACHE_DIR may name another directory"
        ) from error


def _free_name(file: Path) -> Path:
    names = (file.with_name(f"{file.name}.unusable-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _sync(directory: Path) -> None:
    """Puts a rename on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for a directory, and rename at once.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
