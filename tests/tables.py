"""Made-up tables of tuned configs, and the cards that they are for."""

from __future__ import annotations

import torch
import triton

import mla_triton
from mla_triton.configs.table import Header, Items, Point, Row, Table, items
from mla_triton.device import KIB, Device

CARD = Device("NVIDIA H100 (made up)", "cuda", "sm_90", sm_count=132, shared_memory=227 * KIB)
KEY = items(
    {
        "dtype": "bfloat16",
        "format": "16bit",
        "latent": 512,
        "rope": 64,
        "value_dim": 512,
        "heads": 16,
        "s_q": 1,
        "page_size": 64,
        "row_tile": 16,
    }
)


def header(device: Device = CARD, **changes: object) -> Header:
    """Of a card under the versions that are here."""
    values: dict[str, object] = {
        "capability": device.label,
        "gpu": device.name,
        "sm_count": device.sm_count,
        "mla_triton": mla_triton.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": "2026-01-31",
        "protocol": "made up",
        "commit": "",
    }
    return Header(**(values | changes))  # type: ignore[arg-type]


def config(block_n: int = 32, num_warps: int = 4, num_stages: int = 2) -> Items:
    return items({"block_n": block_n, "num_warps": num_warps, "num_stages": num_stages})


CONFIG = config()


def row(
    batch: int = 16,
    length: int = 4096,
    values: Items = CONFIG,
    us: float | None = 10.0,
    key: Items = KEY,
    source: str = "tuned",
) -> Row:
    """Modelled where there are no microseconds."""
    point = Point("decode", "portable", key, batch, length)
    return Row(point, values, us, us, source if us is not None else "modelled")


def table(*rows: Row, device: Device = CARD) -> Table:
    return Table(header(device), rows)
