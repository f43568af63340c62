"""In batch-invariant mode nothing that decides on bits knows of the batch.

`tests/properties/test_batch_properties.py` compares results; here it is what they are made by, for
cards that are not here.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from mla_triton import configs, select
from mla_triton import device as devices
from mla_triton.kernels.common import combine
from mla_triton.problem import LARGEST_TILE, DecodeProblem
from mla_triton.testing import compilation, prefill_compilation

LABELS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx942")
BATCHES = (1, 16, 200)
HEADS = (1, 16, 20, 128)
H200 = replace(devices.from_label("9.0"), name="NVIDIA H200")


def choice(problem: DecodeProblem, device: devices.Device) -> tuple:
    """What decides on the order of a row's sums: who computes it, in which tiles, and who merges
    how many pieces at once."""
    module = select.decode(problem, device).module
    geometry = module.geometry(problem, device)
    config = configs.choose(module, problem, device, geometry.row_tile).config
    merging = combine.heuristic(problem, geometry, device)
    levels = (merging.pieces, merging.step, merging.levels)
    return module.__name__, config, geometry.kv_tile, geometry.row_tile, levels


def choices(plain: DecodeProblem, device: devices.Device, **known: int) -> set[tuple]:
    """Of batches of all sizes, lengths, page sizes and, where they are ragged, query tokens."""
    found = set()
    mean = (1, 3, 100) if plain.s_q is None else (plain.s_q,)
    for batch, page_size, s_q, length in product(BATCHES, (1, 16, 64), mean, (100, 100_000)):
        problem = replace(
            plain, batch=batch, queries=batch * s_q, page_size=page_size, page_slots=page_size,
            max_kv_len=length, **known,
        )  # fmt: skip
        found.add(choice(problem, device))
    return found


@pytest.mark.parametrize("label", [*LABELS, "H200"])
@pytest.mark.parametrize("s_q", [1, 2, None], ids=["one", "two", "ragged"])
def test_a_decode_is_computed_alike_in_every_batch(label, s_q):
    device = H200 if label == "H200" else devices.from_label(label)
    for heads in HEADS:
        plain = replace(compilation.problem(heads=heads), s_q=s_q, causal=s_q != 1)
        assert len(choices(plain, device, fixed_pieces=4)) == 1, heads


def test_without_the_mode_it_is_not():
    """On the card whose table was tuned, and where rows of ragged requests are an average."""
    assert len(choices(compilation.problem(heads=128), H200)) > 1
    ragged = replace(compilation.problem(heads=16), s_q=None)
    assert len({found[0] for found in choices(ragged, H200)}) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", [*LABELS, "H200"])
def test_a_prefill_is_computed_alike_in_every_batch(label, dtype):
    device = H200 if label == "H200" else devices.from_label(label)
    plain = prefill_compilation.problem(dtype)
    counts: dict[bool, set] = {False: set(), True: set()}
    for batch, queries, keys in product(BATCHES, (1, 60, 5000), (1, 5000)):
        for invariant, found in counts.items():
            usual = min(queries, LARGEST_TILE) if not invariant else LARGEST_TILE
            problem = replace(
                plain, batch=batch, queries=batch * queries, keys=batch * keys,
                usual_queries=usual, batch_invariant=invariant,
            )  # fmt: skip
            module = select.prefill(problem, device).module
            found.add((module.__name__, configs.choose(module, problem, device).config))
    assert len(counts[True]) == 1
    if label != "gfx942":
        assert len(counts[False]) > 1
