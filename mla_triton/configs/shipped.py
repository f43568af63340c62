"""The tables that come with the package: a file for a capability, `sm90.json` for 9.0."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from mla_triton.configs.table import Table, loads
from mla_triton.device import Device


def stem(device: Device) -> str:
    """ "sm90", "gfx942": the name of a card's table without its ending."""
    return device.arch.replace("_", "")


def file_name(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}.json"


@cache
def capabilities() -> tuple[tuple[int, int], ...]:
    """NVIDIA capabilities that a table is there for, ascending."""
    names = [entry.name for entry in files(__package__).iterdir()]
    numbers = [
        int(name.removeprefix("sm").removesuffix(".json"))
        for name in names
        if name.startswith("sm") and name.endswith(".json")
    ]
    return tuple(sorted(divmod(number, 10) for number in numbers))


def nearest(device: Device) -> tuple[int, int] | None:
    """The capability whose table serves a card: its own, else the nearest lower of its family.

    A family is what shares the major number: its cards differ in sizes, not in instructions.
    """
    mine = device.capability
    if mine is None:
        return None
    lower = [known for known in capabilities() if known[0] == mine[0] and known <= mine]
    return max(lower, default=None)


@cache
def load(capability: tuple[int, int]) -> Table:
    """The table of a capability that has one."""
    return loads((files(__package__) / file_name(capability)).read_text(encoding="utf-8"))
