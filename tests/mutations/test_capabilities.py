"""A card that gets what is another card's: what refuses it, and what would if that did not.

Of the first kind is a config that does not fit; of the second, a step that only one card's config
takes, wrong as long as nobody runs it.
"""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from foreign_configs import shared_memory_of
from mutants import DTYPES, MUTANTS
from planting import Edit, planted
from trials import COMPILED, TRIALS, configured_as, of_decode, with_bug

from mla_triton import configs
from mla_triton import device as devices
from mla_triton.kernels.portable import decode_config
from mla_triton.testing.compilation import LABELS, problem, side_by_side

CONFIG = "kernels.portable.decode_config"
HOPPERS = Edit(
    CONFIG,
    "    if device.shared_memory >= 227 * KIB:\n        if problem.rows > 16:",
    "    if True:\n        if problem.rows > 16:",
)
"""16 rows over a 16-bit cache: two large tiles in flight, whatever the card has."""
UNCHECKED = Edit(CONFIG, "if needed > device.shared_memory:", "if needed < 0:")
SMALLER = ("8.0", "8.6", "8.9", "12.0")
FITTING = [
    label
    for label in LABELS
    if not COMPILED
    or (
        devices.from_label(label).backend == devices.current().backend
        and devices.from_label(label).shared_memory <= devices.current().shared_memory
    )
]
"""Cards whose configs can be run here."""
BUG = "a step that only the config of 8.9 takes"

by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@by_dtype
@pytest.mark.parametrize("label", SMALLER)
def test_a_config_that_does_not_fit_is_refused(label: str, dtype: str) -> None:
    card, what = devices.from_label(label), problem(getattr(torch, dtype))
    config = decode_config.heuristic(what, card)
    assert decode_config.is_valid(config, what, card)[0]
    refusal = rf"must fit a config on {label}, got .*needs \d+ bytes of shared memory, {label} has"
    with planted([HOPPERS]), pytest.raises(ValueError, match=refusal):
        decode_config.heuristic(what, card)
    assert decode_config.heuristic(what, card) == config


def test_without_that_rule_what_is_compiled_does_not_fit() -> None:
    cards = {label: devices.from_label(label) for label in SMALLER}
    asked = [(label, dtype) for label in ("8.0", "8.9") for dtype in DTYPES]

    def chosen() -> list[tuple[str, str, tuple[int, int, int]]]:
        whats = {dtype: problem(getattr(torch, dtype)) for dtype in DTYPES}
        return [(c, d, astuple(decode_config.heuristic(whats[d], cards[c]))) for c, d in asked]

    right = chosen()
    with planted([HOPPERS, UNCHECKED]):
        wrong = chosen()
    sizes = side_by_side(shared_memory_of, [*right, *wrong])
    limits = [cards[label].shared_memory for label, _ in asked]
    for limit, fits, does_not in zip(limits, sizes[: len(asked)], sizes[len(asked) :], strict=True):
        assert fits <= limit < does_not


@by_dtype
def test_a_step_that_is_not_taken_is_right_whatever_it_says(dtype: str) -> None:
    """Why the suite has problems under other cards' configs: under one alone, all is well."""
    kind = getattr(torch, dtype)
    judge = of_decode(kv_lens=(150, 128), config_of="9.0", parts=1)
    with planted(MUTANTS[BUG].edits):
        assert not judge(kind).caught_by
    assert with_bug(BUG, kind).caught_by


@by_dtype
@pytest.mark.parametrize("label", FITTING)
def test_every_cards_config_gives_right_results(label: str, dtype: str) -> None:
    """Wherever this runs, and so in the interpreter, too, whose own config is one of them."""
    with configured_as(label):
        for trial in ("decode", "decode, scales of groups", "prefill"):
            found = TRIALS[trial](getattr(torch, dtype))
            assert not found.caught_by, (trial, found)


def test_the_config_is_back_afterwards() -> None:
    right = configs.choose
    with configured_as("8.9"):
        assert configs.choose is not right
    assert configs.choose is right
