"""Hopper's prefill kernel as far as a machine without one sees it: code, configs, selection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import NamedTuple

import ptxas
import pytest
import torch

from mla_triton import device as devices
from mla_triton import select, validate_prefill
from mla_triton.kernels import sm90 as kernels_for_hopper
from mla_triton.kernels.common.tensors import PrefillTensors
from mla_triton.kernels.portable import prefill as portable
from mla_triton.kernels.sm90 import prefill, prefill_config
from mla_triton.kernels.sm90.prefill_config import Config
from mla_triton.problem import PrefillProblem
from mla_triton.testing import prefill_inputs, resources
from mla_triton.testing.compilation import side_by_side
from mla_triton.testing.prefill_compilation import problem
from mla_triton.testing.prefill_problems import PrefillInputs

CARD = devices.from_label("9.0")
PLAIN = problem()
PROBLEMS = {
    "192/128": PLAIN,
    "128/128": problem(dimensions=(128, 64, 128)),
    "256/256": problem(dimensions=(256, 64, 256)),
    "float16": problem(torch.float16),
    "full": replace(PLAIN, causal=False),
    "keys in one tensor": replace(PLAIN, k_nope=192),
    "queries in two": replace(PLAIN, q_nope=128),
    "negative scale": replace(PLAIN, negative_scale=True),
}
NOT_ON_A_GPU = "it synchronises and copies; on a GPU it runs only when asked for (impl='reference')"
SHORT = "portable has tiles for sequences of up to 64 queries, which leave half of 128 empty"


def cases() -> list[tuple[str, Config]]:
    """Every config of the model's widths, the heuristic's of the other forms."""
    wide = ("192/128", "128/128", "256/256")
    every = [(name, c) for name in wide for c in prefill.search_space(PROBLEMS[name], CARD)]
    every += [(n, prefill.heuristic(p, CARD)) for n, p in PROBLEMS.items() if n not in wide]
    return [(n, c) for n, c in every if prefill.is_valid(c, PROBLEMS[n], CARD)[0]]


# -- code


class Seen(NamedTuple):
    """What the compiler made of a case."""

    shared_memory: int
    spilled: int
    instructions: frozenset[str]
    remarks: str
    steps: list[list[str]]
    """Of every loop over blocks, what it does in order, by the names of `DOES`."""
    exponentials: list[int]
    """Between the wait for a step's scores and that for its output, of every step in the code."""
    phases: list[list[str]]
    """That are waited for between these two, by their names before they are machine code."""
    ptx: str


DOES = {
    "HGMMA": "multiply",
    "gsb0, 0x1": "scores",
    "gsb0, 0x0": "output",
    "SYNCS.PHASECHK": "wait",
    "SYNCS.ARRIVE": "release",
    "FSEL": "hide",
}
"""What an instruction is for: the waits for scores and for the output are those for wgmma."""


def compile_case(case: tuple[str, Config]) -> Seen:
    name, config = case
    compiled, remarks = ptxas.with_remarks(lambda: prefill.compile(PROBLEMS[name], config, CARD))
    found = resources.read(compiled)
    text = resources._tool(compiled, "nvdisasm", "-c")
    return Seen(
        found.shared_memory,
        found.spilled,
        found.instructions,
        remarks,
        steps_of(text),
        exponentials_under_products(text),
        phases_under_products(compiled.asm["ttgir"]),
        compiled.asm["ptx"],
    )


def steps_of(text: str) -> list[list[str]]:
    """What the loops do that wait once for scores and once for the output."""
    label, branch = r"\s*(\.L_x_\d+):", r"BRA.*`\((\.L_x_\d+)\)"
    loops = resources.innermost_matrix_loops(text.splitlines(), label, branch, "HGMMA")
    steps = [[does for line in loop for does in named(line)] for loop in loops]
    return [step for step in steps if waited_for(step) == ["scores", "output"]]


def named(line: str) -> list[str]:
    return [does for name, does in DOES.items() if name in line]


def waited_for(step: list[str]) -> list[str]:
    return [does for does in step if does in ("scores", "output")]


def exponentials_under_products(text: str) -> list[int]:
    waits = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0"
    return [part.count("MUFU.EX2") for part in re.findall(waits, text, re.DOTALL)]


def phases_under_products(text: str) -> list[list[str]]:
    waits = r"pendings = 1 (.*?)pendings = 0 "
    wanted = r"wait_barrier %\w+, (%\w+)"
    return [re.findall(wanted, part) for part in re.findall(waits, text, re.DOTALL)]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, Config], Seen]:
    wanted = cases()
    return dict(zip(wanted, side_by_side(compile_case, wanted), strict=True))


def test_every_config_fits_an_sm_and_the_estimate(compiled):
    for (name, config), seen in compiled.items():
        estimate = prefill_config.shared_memory(config, PROBLEMS[name], CARD)
        assert seen.shared_memory <= estimate <= CARD.shared_memory, (name, config)
        assert seen.shared_memory > 0.95 * estimate, (name, config)


def test_nothing_spills(compiled):
    assert {case: seen.spilled for case, seen in compiled.items() if seen.spilled} == {}


def test_wgmma_is_not_serialised_and_registers_are_given_away(compiled):
    for case, seen in compiled.items():
        assert seen.instructions == {"wgmma"}, case
        assert "ptxas info" in seen.remarks
        for remark in ("serialized", "ignored", "warning", "Potential Performance Loss"):
            assert remark not in seen.remarks, case
        assert "setmaxnreg" in seen.ptx, case


def test_the_softmax_runs_under_a_product(compiled):
    """Both warpgroups have a step's exponentials while its second product is under way: the
    assembler is free to wait for the product first, and once did."""
    for (name, config), seen in compiled.items():
        # One step in each loop, and under a mask that of the first warpgroup behind half a block.
        assert len(seen.exponentials) == (5 if PROBLEMS[name].causal else 2), (name, config)
        # A thread has two rows, and shares each with three others.
        assert min(seen.exponentials) >= 64 * config.block_n // 128, (name, config)


def test_masks_have_a_loop_of_their_own(compiled):
    """Each warpgroup looks where keys are hidden in one loop, if anywhere, and not in the other."""
    for (name, config), seen in compiled.items():
        hides = [step.count("hide") for step in seen.steps]
        if PROBLEMS[name].causal:
            first, first_plain, second, second_plain = hides
            assert min(first, second) >= 64 * config.block_n // 128, (name, config)
            assert (first_plain, second_plain) == (0, 0), (name, config)
        else:
            assert hides == [0, 0], (name, config)


def test_a_slot_is_released_before_the_next_is_waited_for(compiled):
    """A step waits for its keys and values at its beginning. The wait in its middle only holds the
    softmax where it is: for a phase that is the same in every step, and over."""
    order = ["wait", "multiply", "scores", "wait", "output", "release"]
    for case, seen in compiled.items():
        assert len(seen.phases) == len(seen.exponentials), case
        for phases in seen.phases:
            assert [phase[:7] for phase in phases] == ["%c1_i32"], case
        for step in seen.steps:
            assert [d for d, _ in groupby(step) if d != "hide"] == order, case


def test_what_changes_code_is_in_the_variant_and_nothing_else():
    config = prefill.heuristic(PLAIN, CARD)
    plain = prefill.variant(PLAIN, config, CARD)
    for same in (
        replace(PLAIN, batch=7, queries=999, keys=5000),
        replace(PLAIN, heads=40, kv_heads=8),
        replace(PLAIN, usual_queries=1),
        replace(PLAIN, max_seqlen_q=77),
    ):
        assert prefill.variant(same, config, CARD) == plain
    others = {
        prefill.variant(given, prefill.heuristic(given, CARD), CARD) for given in PROBLEMS.values()
    }
    assert len(others) == len(PROBLEMS)


# -- what it takes


@pytest.mark.parametrize(
    ("given", "label", "reason"),
    [
        (PLAIN, "10.0", "it is written for capability 9.0, this card has 10.0"),
        (PLAIN, "8.9", "it is written for capability 9.0, this card has 8.9"),
        (PLAIN, "gfx942", "it is written for capability 9.0, this card has gfx942"),
        (PLAIN, "interpreter", "it is written for capability 9.0, this card has interpreter"),
        (problem(torch.float32), "9.0", "it reads aligned float16 or bfloat16"),
        (replace(PLAIN, aligned=False), "9.0", "it reads aligned float16 or bfloat16"),
        (
            problem(dimensions=(96, 32, 64)),
            "9.0",
            "it is written for 192 and 128 or 128 and 128 or 256 and 256 columns, got 96 and 64",
        ),
        (
            replace(PLAIN, k_nope=160),
            "9.0",
            "a TMA box is 64 columns of one tensor, got 160 columns of k before its rotary ones",
        ),
        (
            replace(PLAIN, q_nope=96),
            "9.0",
            "a TMA box is 64 columns of one tensor, got 96 columns of q before its rotary ones",
        ),
        (
            replace(PLAIN, distinct=False),
            "9.0",
            "a TMA descriptor has no strides of 0, as expand leaves them",
        ),
    ],
)
def test_what_it_does_not_take(given: PrefillProblem, label: str, reason: str):
    card = devices.from_label(label)
    assert prefill.why_not(given, card) == reason
    assert prefill.is_valid(Config(128, 2), given, card) == (False, reason)


@pytest.mark.parametrize(
    ("config", "name", "rule"),
    [
        (Config(32, 2), "192/128", "block_n must be 64 or 128, got 32"),
        (Config(64, 1), "192/128", "stages must be 2, 3 or 4, got 1"),
        (
            Config(128, 2),
            "256/256",
            "registers hold 64 keys beside 256 columns of values, got blocks of 128",
        ),
        (
            Config(128, 3),
            "192/128",
            "needs 300032 bytes of shared memory, 9.0 has 232448",
        ),
    ],
)
def test_configs_that_are_refused(config, name, rule):
    assert prefill.is_valid(config, PROBLEMS[name], CARD) == (False, rule)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_heuristic_is_valid_and_says_why(name):
    given = PROBLEMS[name]
    config, reason = prefill.choose(given, CARD)
    valid, rule = prefill.is_valid(config, given, CARD)
    assert valid
    assert reason.endswith(rule)
    assert prefill.heuristic(given, CARD) == config
    assert config in set(prefill.search_space(given, CARD))
    assert prefill.tuning_point(given, CARD)[1:] == (given.batch, given.keys // given.batch)


def test_the_heuristic_of_what_it_does_not_take():
    with pytest.raises(ValueError, match="problem must be one that sm90 takes"):
        prefill.choose(problem(torch.float32), CARD)


# -- how the work is cut


@pytest.mark.parametrize(
    "lengths",
    [[1], [128], [129], [0, 0, 0], [128] * 5, [1] * 40, [0, 700, 0, 1, 127, 128, 129, 4096, 0]],
)
def test_every_tile_has_a_place_and_no_two_the_same(lengths):
    """The arithmetic of `first_slot`: places from one sequence to the next are enough."""
    tile = prefill_config.BLOCK_M
    given = replace(PLAIN, batch=len(lengths), queries=sum(lengths))
    places, each = prefill_config.tile_slots(given)
    assert each == 0
    before, taken = 0, []
    for number, length in enumerate(lengths):
        first = (before + number * (tile - 1)) // tile
        taken += range(first, first + -(-length // tile))
        before += length
    assert len(set(taken)) == len(taken)
    assert all(0 <= place < places for place in taken)
    assert places <= len(taken) + len(lengths)


def test_one_sequence_has_no_place_too_many():
    for length in (1, 127, 128, 129, 8192):
        given = replace(PLAIN, batch=1, queries=length)
        assert prefill_config.tile_slots(given) == (-(-length // 128), 0)


@pytest.mark.parametrize(
    ("queries", "batch", "longest", "expected"),
    [
        (64 * 128, 64, 128, (64, 1)),
        (64 * 100, 64, 100, (64, 1)),
        (64 * 100, 64, 129, (113, 0)),
        (8192, 1, 8192, (64, 64)),
        (1000, 3, 0, (3, 1)),
        (0, 0, 5, (1, 0)),
    ],
)
def test_a_hint_spares_places(queries, batch, longest, expected):
    given = replace(PLAIN, batch=batch, queries=queries, max_seqlen_q=longest)
    assert prefill_config.tile_slots(given) == expected


# -- descriptors


def problem_and_tensors(inputs: PrefillInputs) -> tuple[PrefillProblem, PrefillTensors]:
    buffers = inputs.output_buffers()
    tensors = (
        inputs.q, inputs.q_rope, inputs.k, inputs.k_rope, inputs.v, inputs.cu_seqlens_q,
        inputs.cu_seqlens_k, buffers["out"], buffers["lse"],
    )  # fmt: skip
    given = validate_prefill.prefill(
        *tensors, softmax_scale=inputs.softmax_scale, causal=inputs.causal, max_seqlen_q=None
    )
    return given, PrefillTensors(*tensors, inputs.softmax_scale)


@pytest.mark.parametrize("split", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("heads", [1, 3])
def test_descriptors_see_the_tensors_as_they_are(heads, split):
    inputs = prefill_inputs(
        q_lens=[5, 9], k_lens=[5, 12], heads=heads, strided=16, split_q=split[0], split_k=split[1]
    )
    given, tensors = problem_and_tensors(inputs)
    assert prefill.why_not(given, CARD) is None
    named = (inputs.q, inputs.q_rope, inputs.k, inputs.k_rope, inputs.v)
    seen = prefill.maps(tensors)
    for view, tensor, instead in zip(seen, named, (None, 0, None, 2, None), strict=True):
        expected = named[instead] if tensor is None else tensor
        assert view.tensor is expected
        assert all(step > 0 and step % 8 == 0 for step in view.strides[:2])
        assert view.strides[2] == 1
        again = expected.as_strided(view.shape, view.strides)
        # NaN lies between and behind the rows.
        assert torch.equal(again.nan_to_num().flatten(), expected.nan_to_num().flatten())


def test_without_keys_there_is_memory_to_describe():
    inputs = prefill_inputs(q_lens=[5], k_lens=[0], split_k=True)
    tensors = problem_and_tensors(inputs)[1]
    none = tensors._replace(k=tensors.k[:0], v=tensors.v[:0], k_rope=inputs.k_rope[:0])
    assert all(view.tensor is inputs.q for view in prefill.maps(none))


def test_heads_that_lie_on_each_other_are_not_described():
    inputs = prefill_inputs(q_lens=[5], heads=4, kv_heads=1)
    assert problem_and_tensors(inputs)[0].distinct
    for name in ("k", "v"):
        expanded = {n: getattr(inputs, n).expand(-1, 4, -1) for n in ("k", "v")}
        given = problem_and_tensors(replace(inputs, **expanded))[0]
        assert not given.distinct, name
        assert select.prefill(replace(given, usual_queries=128), CARD).name == "portable"


def test_arguments_are_in_order():
    given, tensors = problem_and_tensors(prefill_inputs(q_lens=[5, 9]))
    assert len(prefill.arguments(given, tensors)) == len(prefill.ARGUMENTS)
    negative = tensors._replace(softmax_scale=-tensors.softmax_scale)
    assert prefill.arguments(given, negative)[-1] == prefill.arguments(given, tensors)[-1] > 0


# -- selection


@pytest.mark.parametrize("name", PROBLEMS)
def test_hopper_runs_its_own_kernel(name):
    reasons = (("sm90", None), ("portable", None), ("reference", NOT_ON_A_GPU))
    assert select.prefill(PROBLEMS[name], CARD) == ("sm90", prefill, reasons)


@pytest.mark.parametrize("label", [label for label in devices.KNOWN if label != "9.0"])
def test_other_cards_run_the_portable_one(label):
    reason = f"it is written for capability 9.0, this card has {label}"
    reasons = (("sm90", reason), ("portable", None), ("reference", NOT_ON_A_GPU))
    chosen = select.prefill(PLAIN, devices.from_label(label))
    assert chosen == ("portable", portable, reasons)
    with pytest.raises(NotImplementedError) as error:
        select.prefill(PLAIN, devices.from_label(label), "sm90")
    assert str(error.value) == f"impl 'sm90' cannot run this prefill: {reason}"


def test_short_sequences_are_left_to_the_portable_one_unless_it_is_asked_for():
    for usual in (1, 32, 64):
        short = replace(PLAIN, usual_queries=usual)
        chosen = select.prefill(short, CARD)
        assert (chosen.name, dict(chosen.reasons)["sm90"]) == ("portable", SHORT)
        assert select.prefill(short, CARD, "sm90").name == "sm90"


@pytest.fixture
def no_gluon(monkeypatch) -> Iterator[str]:
    """As in a release of Triton that has renamed what the kernel takes of Gluon."""

    def import_module(name: str) -> ModuleType:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(kernels_for_hopper, "import_module", import_module)
    kernels_for_hopper.load.cache_clear()
    select.prefill.cache_clear()
    name = "mla_triton.kernels.sm90.prefill"
    yield f"this Triton's Gluon is not one that it knows: no {name}"
    monkeypatch.undo()
    kernels_for_hopper.load.cache_clear()
    select.prefill.cache_clear()


def test_without_gluon_portable_serves_hopper(no_gluon):
    chosen = select.prefill(PLAIN, CARD)
    reasons = (("sm90", no_gluon), ("portable", None), ("reference", NOT_ON_A_GPU))
    assert chosen == ("portable", portable, reasons)
    with pytest.raises(NotImplementedError) as error:
        select.prefill(PLAIN, CARD, "sm90")
    assert str(error.value) == f"impl 'sm90' cannot run this prefill: {no_gluon}"
