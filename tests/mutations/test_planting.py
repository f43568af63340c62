"""A planted bug is in the operation's way, and nothing of it is left afterwards."""

from __future__ import annotations

import linecache
import sys
from functools import _lru_cache_wrapper
from pathlib import Path

import hopper_mutants
import pytest
import torch
import triton
from mutants import MUTANTS, PAGED, TILES
from planting import PACKAGE, DoesNotApply, Edit, dependents, in_order, planted, source_at
from trials import TRIALS, decode, decode_problem
from triton.runtime.interpreter import InterpretedFunction

from mla_triton import testing
from mla_triton.kernels.common import tiles

ROOT = Path(__file__).parents[2]
LN_2 = Edit(TILES, "0.6931471805599453", "0.693")


def everything() -> dict[str, dict[str, int]]:
    """Every name of every module of the package, by what it is."""
    modules = {
        name: vars(module) for name, module in sys.modules.items() if name.startswith(PACKAGE)
    }
    return {
        name: {key: id(value) for key, value in names.items()} for name, names in modules.items()
    }


def kept() -> int:
    """Results that lie in caches of the package."""
    modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    values = {id(value): value for module in modules for value in vars(module).values()}
    caches = [value for value in values.values() if isinstance(value, _lru_cache_wrapper)]
    return sum(cache.cache_info().currsize for cache in caches)


def test_nothing_is_left_of_it() -> None:
    inputs, budget = decode_problem(torch.float16, False, 0, kv_lens=(150, 37))
    right = decode(inputs, None)
    before, functions, folder = everything(), set(InterpretedFunction.rewritten_fn), None
    compiled_to = triton.knobs.cache.dir
    with planted([LN_2]):
        folder = tiles.dot.fn.__code__.co_filename.rpartition("/")[0]
        assert everything() != before
        wrong = decode(inputs, None)
        assert any(name.startswith(folder) for name in linecache.cache)
        assert kept()
    assert everything() == before
    assert set(InterpretedFunction.rewritten_fn) == functions
    assert not any(name.startswith(folder) for name in linecache.cache)
    assert triton.knobs.cache.dir == compiled_to
    assert not kept()
    assert not testing.compare(wrong, inputs, budget).ok
    again = decode(inputs, None)
    assert torch.equal(right.out, again.out)
    assert torch.equal(right.lse, again.lse)


def test_nothing_is_left_where_what_is_planted_fails() -> None:
    before = everything()
    with pytest.raises(ZeroDivisionError), planted([LN_2]):
        raise ZeroDivisionError
    with pytest.raises(NameError), planted([Edit(TILES, "0.6931471805599453", "no_such_name")]):
        pass
    assert everything() == before


def test_a_bug_that_no_longer_applies_says_so() -> None:
    missing = Edit(TILES, "0.69314718055994530942", "0.693")
    with pytest.raises(DoesNotApply, match=r"kernels\.common\.tiles has '0\.6931.*' 0 times, not"):
        missing.apply("LN_2 = 0.6931471805599453")
    with (
        pytest.raises(DoesNotApply, match=r"\d+ times, not once"),
        planted([Edit(TILES, "running_max", "")]),
    ):
        pass
    with pytest.raises(ValueError, match="new must differ from old"):
        Edit(TILES, "a", "a").apply("a")
    with pytest.raises(ValueError, match=r"module must be one of mla_triton\.kernels\.\*, got"):
        Edit("ops.decode", "a", "b").apply("a")
    with (
        pytest.raises(ValueError, match="module must be one that is loaded, got"),
        planted([Edit("kernels.nowhere", "a", "b")]),
    ):
        pass


def test_whoever_took_a_function_by_name_is_made_again_behind_it() -> None:
    needed = dependents({f"{PACKAGE}.{PAGED}"})
    order = in_order(needed)
    portable = f"{PACKAGE}.kernels.portable"
    assert {f"{portable}.decode", f"{portable}.decode_steps"} < set(order)
    assert f"{portable}.merge" not in order
    for place, name in enumerate(order):
        assert needed[name] <= set(order[:place])


def test_every_trial_has_a_bug() -> None:
    assert {mutant.trial for mutant in MUTANTS.values()} == set(TRIALS)


@pytest.mark.parametrize("name", hopper_mutants.MUTANTS)
def test_bugs_of_the_hopper_kernels_still_apply(name: str) -> None:
    """They run on a Hopper card alone, in tests/gpu/test_mutations_gpu.py."""
    edit = hopper_mutants.MUTANTS[name].edit
    text = source_at(ROOT.joinpath(*edit.name.split(".")).with_suffix(".py"))
    assert edit.apply(text) != text
