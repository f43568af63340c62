"""Which implementation is chosen for a card and a problem, and the reasons against the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from mla_triton import device as devices
from mla_triton import explain, reference, select
from mla_triton.device import CPU, INTERPRETER, KIB, Device
from mla_triton.kernels import sm90 as kernels_for_hopper
from mla_triton.kernels.portable import decode as portable
from mla_triton.kernels.sm90 import decode as sm90
from mla_triton.ops.plan import cut
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem

DEEPSEEK_V3 = DecodeProblem(
    dtype=torch.bfloat16,
    batch=16,
    s_q=1,
    queries=16,
    heads=128,
    latent=512,
    rope=64,
    value_dim=512,
    page_size=64,
    csr=False,
    causal=False,
    fused=True,
    ckv_stride_slot=576,
    kpe_stride_slot=0,
    page_slots=64,
)
HOPPER = devices.from_label("9.0")
TURING = Device("T4", "cuda", "sm_75", sm_count=40, shared_memory=64 * KIB)
NOT_ON_A_GPU = "it synchronises and copies; on a GPU it runs only when asked for (impl='reference')"
NO_TRITON = "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
TOO_OLD = "it needs capability 8.0 or later, this card has 7.5"
FEW_ROWS = (
    "portable is faster for up to 16 rows: it is bound by memory alone, and its programs are "
    "shorter"
)
NARROW = "it is written for 512+64, 512+0, 256+64, got "
NOT_16_BIT = "it reads aligned float16 or bfloat16"


def no_hopper(label: str) -> str:
    return f"it is written for capability 9.0, this card has {label}"


def problem(**changes: object) -> DecodeProblem:
    return replace(DEEPSEEK_V3, **changes)


PROBLEMS = {
    "DeepSeek-V3": problem(),
    "float16": problem(dtype=torch.float16),
    "float32": problem(dtype=torch.float32),
    "one head": problem(heads=1),
    "V2-Lite, alone": problem(batch=1, queries=1, heads=16),
    "17 heads, alone": problem(batch=1, queries=1, heads=17),
    "ragged": problem(s_q=None, queries=100),
    "ragged, few rows": problem(s_q=None, queries=16, heads=16),
    "four query tokens": problem(s_q=4, queries=64, causal=True),
    "four query tokens of four heads": problem(s_q=4, queries=64, heads=4, causal=True),
    "without rope": problem(rope=0, heads=32, ckv_stride_slot=512),
    "256+64": problem(latent=256, value_dim=256, heads=32, ckv_stride_slot=320),
    "MiniCPM3": problem(latent=256, rope=32, value_dim=256, heads=40),
    "128+32": problem(latent=128, rope=32, value_dim=128),
    "DeepSeek-V4": problem(latent=448, rope=64, value_dim=512, heads=64),
    "pages of 1, CSR": problem(page_size=1, page_slots=1, csr=True),
    "pages of 16, CSR": problem(page_size=16, page_slots=16, csr=True),
    "pages of 32": problem(page_size=32, page_slots=32),
    "pages of 48": problem(page_size=48, page_slots=48),
    "pages of 192": problem(page_size=192, page_slots=192),
    "pages of all layers": problem(page_slots=61 * 64),
    "pages in no row": problem(page_slots=0),
    "a pair": problem(fused=False, ckv_stride_slot=512, kpe_stride_slot=64),
    "not aligned": problem(aligned=False),
}
ON_HOPPER = {
    "float32": NOT_16_BIT,
    "one head": FEW_ROWS,
    "V2-Lite, alone": FEW_ROWS,
    "ragged, few rows": FEW_ROWS,
    "four query tokens of four heads": FEW_ROWS,
    "MiniCPM3": NARROW + "256+32",
    "128+32": NARROW + "128+32",
    "DeepSeek-V4": "its queries come in one tensor where no key column is behind the value",
    "not aligned": NOT_16_BIT,
}
"""Why the Hopper kernel does not run a problem on its card; it runs the others."""
OTHERS = [label for label in devices.KNOWN if label != "9.0"]


# -- selection


@pytest.mark.parametrize("label", OTHERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_other_card_runs_every_problem_on_the_portable_kernels(label, name):
    chosen = select.decode(PROBLEMS[name], devices.from_label(label))
    reasons = (("sm90", no_hopper(label)), ("portable", None), ("reference", NOT_ON_A_GPU))
    assert chosen == ("portable", portable, reasons)


@pytest.mark.parametrize("name", PROBLEMS)
def test_hopper_runs_its_own_kernel_or_says_why_not(name):
    chosen = select.decode(PROBLEMS[name], HOPPER)
    reason = ON_HOPPER.get(name)
    reasons = (("sm90", reason), ("portable", None), ("reference", NOT_ON_A_GPU))
    expected = ("sm90", sm90) if reason is None else ("portable", portable)
    assert chosen == (*expected, reasons)


def test_both_kernels_have_problems_on_hopper():
    assert set(ON_HOPPER) < set(PROBLEMS)


@pytest.mark.parametrize("label", devices.KNOWN)
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_chosen_can_be_configured(label, name):
    device = devices.from_label(label)
    module = select.decode(PROBLEMS[name], device).module
    geometry = module.geometry(PROBLEMS[name], device)
    config = module.heuristic(PROBLEMS[name], device)
    assert module.is_valid(config, PROBLEMS[name], device, geometry.row_tile)[0]


def test_the_interpreter_runs_the_portable_kernels():
    chosen = select.decode(DEEPSEEK_V3, INTERPRETER)
    reasons = (("sm90", no_hopper("interpreter")), ("portable", None), ("reference", None))
    assert chosen == ("portable", portable, reasons)


def test_the_cpu_runs_the_reference():
    chosen = select.decode(DEEPSEEK_V3, CPU)
    reasons = (("sm90", no_hopper("cpu")), ("portable", NO_TRITON), ("reference", None))
    assert chosen == ("reference", reference, reasons)


@pytest.mark.parametrize("device", [INTERPRETER, CPU])
def test_where_the_kernels_cannot_go_the_cpu_runs_the_reference(device):
    wide = problem(latent=96, value_dim=96)
    assert select.decode(wide, device).name == "reference"


def test_a_card_that_nothing_runs_on_is_refused_with_every_reason():
    with pytest.raises(NotImplementedError) as error:
        select.decode(DEEPSEEK_V3, TURING)
    assert str(error.value) == (
        f"no implementation of decode can run on 7.5: sm90: {no_hopper('7.5')}; "
        f"portable: {TOO_OLD}; reference: {NOT_ON_A_GPU}"
    )


def test_a_problem_that_no_kernel_takes_is_refused_on_a_gpu():
    with pytest.raises(NotImplementedError) as error:
        select.decode(problem(latent=96, value_dim=96), HOPPER)
    assert str(error.value) == (
        f"no implementation of decode can run on 9.0: sm90: {NARROW}96+64; "
        "portable: value_dim must be a power of two in [16, 512], got 96; "
        f"reference: {NOT_ON_A_GPU}"
    )


# -- by name


@pytest.mark.parametrize("device", [INTERPRETER, *map(devices.from_label, ("8.0", "gfx942"))])
def test_an_implementation_is_taken_by_name(device):
    assert select.decode(DEEPSEEK_V3, device, "portable").module is portable


@pytest.mark.parametrize("device", [CPU, INTERPRETER, devices.from_label("9.0"), TURING])
def test_the_reference_runs_anywhere_when_asked_for(device):
    assert select.decode(DEEPSEEK_V3, device, "reference").module is reference


@pytest.mark.parametrize(
    ("given", "device", "reason"),
    [
        (DEEPSEEK_V3, CPU, NO_TRITON),
        (DEEPSEEK_V3, TURING, TOO_OLD),
        (
            problem(latent=1024, value_dim=1024),
            devices.from_label("9.0"),
            "value_dim must be a power of two in [16, 512], got 1024",
        ),
    ],
)
def test_an_implementation_asked_for_by_name_is_never_replaced(given, device, reason):
    with pytest.raises(NotImplementedError) as error:
        select.decode(given, device, "portable")
    assert str(error.value) == f"impl 'portable' cannot run this decode: {reason}"


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_hopper_kernel_by_name(name):
    """That something else would be faster is nothing against it then."""
    reason = ON_HOPPER.get(name)
    if reason in (None, FEW_ROWS):
        chosen = select.decode(PROBLEMS[name], HOPPER, "sm90")
        assert chosen == (
            "sm90", sm90, (("sm90", None), ("portable", None), ("reference", NOT_ON_A_GPU))
        )  # fmt: skip
        return
    with pytest.raises(NotImplementedError) as error:
        select.decode(PROBLEMS[name], HOPPER, "sm90")
    assert str(error.value) == f"impl 'sm90' cannot run this decode: {reason}"


@pytest.mark.parametrize("label", [*OTHERS, "cpu", "interpreter"])
def test_the_hopper_kernel_by_name_on_another_card(label):
    with pytest.raises(NotImplementedError) as error:
        select.decode(DEEPSEEK_V3, devices.from_label(label), "sm90")
    assert str(error.value) == f"impl 'sm90' cannot run this decode: {no_hopper(label)}"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="impl") as error:
        select.decode(DEEPSEEK_V3, INTERPRETER, "fastest")
    assert str(error.value) == "impl must be one of sm90, portable, reference, got 'fastest'"


def test_a_refusal_is_repeated():
    """Selections are kept; what is refused has to be refused again."""
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            select.decode(DEEPSEEK_V3, TURING)


# -- a Triton without the Gluon that is known


@pytest.fixture
def no_gluon(monkeypatch) -> Iterator[str]:
    """As in a release of Triton that has renamed what the kernel takes of Gluon."""
    text = "Triton 9.9 has none of async_load, async_copy_global_to_shared"

    def import_module(name: str) -> ModuleType:
        raise AttributeError(text)

    monkeypatch.setattr(kernels_for_hopper, "import_module", import_module)
    kernels_for_hopper.load.cache_clear()
    select.decode.cache_clear()
    yield f"this Triton's Gluon is not one that it knows: {text}"
    monkeypatch.undo()
    kernels_for_hopper.load.cache_clear()
    select.decode.cache_clear()


def test_without_gluon_portable_serves_hopper(no_gluon):
    chosen = select.decode(DEEPSEEK_V3, HOPPER)
    reasons = (("sm90", no_gluon), ("portable", None), ("reference", NOT_ON_A_GPU))
    assert chosen == ("portable", portable, reasons)
    with pytest.raises(NotImplementedError) as error:
        select.decode(DEEPSEEK_V3, HOPPER, "sm90")
    assert str(error.value) == f"impl 'sm90' cannot run this decode: {no_gluon}"


def test_without_gluon_explain_says_so(no_gluon):
    facts = explain.decode(DEEPSEEK_V3, HOPPER, 4096)
    assert facts["candidates"][0] == {"name": "sm90", "why_not": no_gluon}
    assert f"not       sm90: {no_gluon}" in explain.lines(facts)
    assert "runs      portable" in explain.lines(facts)


def test_without_gluon_other_reasons_come_first(no_gluon):
    """Nothing is imported for a problem that another kernel runs anyway."""
    assert dict(select.decode(PROBLEMS["one head"], HOPPER).reasons)["sm90"] == FEW_ROWS
    assert dict(select.decode(DEEPSEEK_V3, TURING, "reference").reasons)["sm90"] == no_hopper("7.5")


# -- plans


def plan_of(given: DecodeProblem, impl: str | None = None) -> Geometry:
    geometry = cut(given.as_planned(), HOPPER, impl, None)
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("impl", [None, "portable", "sm90"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_call_follows_any_plan_of_its_card(name, impl):
    """Whatever a plan without a cache was cut for: what runs has the plan's geometry."""
    given = PROBLEMS[name]
    if impl == "sm90" and sm90.why_not(given.as_planned(), HOPPER) is not None:
        with pytest.raises(NotImplementedError):
            plan_of(given, impl)
        return
    like = plan_of(given, impl)
    chosen = select.decode(given, HOPPER, None, like)
    assert chosen.module.geometry(given, HOPPER, like=like) == like
    config = chosen.module.heuristic(given, HOPPER, like.row_tile)
    assert chosen.module.is_valid(config, given, HOPPER, like.row_tile)[0]


def test_a_plan_decides_between_the_two():
    """It was cut for one of them; only without a plan does the number of rows decide."""
    few, many = PROBLEMS["V2-Lite, alone"], DEEPSEEK_V3
    for given in (few, many):
        for impl in ("portable", "sm90"):
            assert select.decode(given, HOPPER, None, plan_of(given, impl)).name == impl
    assert select.decode(few, HOPPER, None, plan_of(few)).name == "portable"
    assert select.decode(many, HOPPER, None, plan_of(many)).name == "sm90"
    followed = select.decode(many, HOPPER, None, plan_of(many, "portable"))
    assert dict(followed.reasons)["sm90"] == (
        "its tiles are 64 keys x 64 rows, those of the plan 32 keys x 64 rows"
    )


def test_the_choice_does_not_depend_on_what_a_plan_does_not_know():
    for name, given in PROBLEMS.items():
        if sm90.why_not(given, HOPPER) is None:
            chosen = select.decode(given, HOPPER).name
            assert chosen == select.decode(given.as_planned(), HOPPER).name, name
            shorter = replace(given, max_kv_len=1, num_pages=1)
            assert chosen == select.choose_decode(shorter, HOPPER).name, name


def test_without_gluon_portable_follows_the_plan_of_a_compiler(no_gluon):
    """Which cannot know that, because it does not look into an import."""
    assert plan_of(DEEPSEEK_V3).kv_tile == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        like = plan_of(DEEPSEEK_V3)
    assert (like.kv_tile, like.row_tile) == (64, 64)
    chosen = select.decode(DEEPSEEK_V3, HOPPER, None, like)
    assert chosen.name == "portable"
    assert dict(chosen.reasons)["sm90"] == no_gluon
    assert chosen.module.geometry(DEEPSEEK_V3, HOPPER, like=like) == like


@pytest.mark.parametrize(("heads", "rows"), [(16, 16), (128, 64)])
def test_a_compiler_traces_the_plan_of_a_hopper_card(heads, rows):
    """Without a graph break, and without a warning of what it looked into."""
    given = problem(heads=heads).as_planned()

    @torch.compile(fullgraph=True, backend="eager")
    def row_tile(kv_lens: torch.Tensor) -> torch.Tensor:
        geometry = cut(given, HOPPER, None, None)
        return kv_lens + geometry.row_tile

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row_tile(torch.zeros(1)).item() == rows


# -- reasons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"latent": 8, "value_dim": 8}, "value_dim must be a power of two in [16, 512], got 8"),
        ({"value_dim": 576}, "value_dim must be a power of two in [16, 512], got 576"),
        (
            {"latent": 1024, "value_dim": 1024},
            "value_dim must be a power of two in [16, 512], got 1024",
        ),
        ({"rope": 8}, "the rotary key must have 0, 16, 32, 64 or 128 columns, got 8"),
        ({"rope": 48}, "the rotary key must have 0, 16, 32, 64 or 128 columns, got 48"),
        ({"rope": 256}, "the rotary key must have 0, 16, 32, 64 or 128 columns, got 256"),
        ({"rope": 128}, None),
        # Inside the value the rotary part is no tile of its own.
        ({"latent": 500, "rope": 12, "value_dim": 512}, None),
    ],
)
@pytest.mark.parametrize("label", ["8.0", "9.0", "12.0", "gfx942", "interpreter"])
def test_why_not_portable(label, changes, reason):
    assert portable.why_not(problem(**changes), devices.from_label(label)) == reason


def test_why_not_portable_on_other_devices():
    assert portable.why_not(DEEPSEEK_V3, CPU) == NO_TRITON
    assert portable.why_not(DEEPSEEK_V3, TURING) == TOO_OLD


# -- devices


def test_a_card_is_described_by_its_label():
    for label in devices.KNOWN:
        device = devices.from_label(label)
        assert device.label == label
        assert device.modelled
        assert device.runs_triton
    assert devices.from_label("cpu") is CPU
    assert devices.from_label("interpreter") is INTERPRETER


@pytest.mark.parametrize("label", ["7.5", "9", "sm_90", "90", "gfx90a", "", "10"])
def test_an_unknown_label_is_refused(label):
    with pytest.raises(ValueError, match="capability") as error:
        devices.from_label(label)
    assert str(error.value) == (
        "capability must be one of 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 11.0, 12.0, 12.1, "
        f"gfx942, gfx950, got {label!r}"
    )


@pytest.mark.parametrize(
    ("arch", "capability", "label"),
    [
        ("sm_75", (7, 5), "7.5"),
        ("sm_89", (8, 9), "8.9"),
        ("sm_90", (9, 0), "9.0"),
        ("sm_100", (10, 0), "10.0"),
        ("sm_103", (10, 3), "10.3"),
        ("sm_120", (12, 0), "12.0"),
        ("sm_121", (12, 1), "12.1"),
    ],
)
def test_capability_of_an_architecture(arch, capability, label):
    device = Device("card", "cuda", arch, sm_count=1, shared_memory=1)
    assert device.capability == capability
    assert device.label == label


@pytest.mark.parametrize("label", ["gfx942", "cpu", "interpreter"])
def test_what_is_not_nvidia_has_no_capability(label):
    device = devices.from_label(label)
    assert device.capability is None
    assert device.label == label


FEATURES = {
    "async_copy": {"8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"},
    "wgmma": {"9.0"},
    "tma": {"9.0", "10.0", "10.3", "11.0", "12.0", "12.1"},
    "fp8": {"8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "gfx942", "gfx950"},
    "programmatic_launch": {"9.0", "10.0", "10.3", "11.0", "12.0", "12.1"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_cards_with_a_feature(feature):
    labels = [*devices.KNOWN, "cpu", "interpreter"]
    have = {label for label in labels if devices.from_label(label).features()[feature]}
    assert have == FEATURES[feature]


def test_tensor_memory_is_of_data_centre_blackwell():
    labels = ("8.9", "9.0", "10.0", "10.3", "12.0", "12.1", "gfx950", "cpu")
    have = [label for label in labels if devices.from_label(label).has_tcgen05]
    assert have == ["10.0", "10.3"]


def test_no_feature_of_turing():
    features = TURING.features()
    assert not any(features[name] for name in FEATURES)


def test_cpu_tensors_are_of_the_interpreter_where_it_is_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert devices.of(torch.device("cpu")) is INTERPRETER
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert devices.of(torch.device("cpu")) is CPU
    assert devices.of(torch.device("meta")) is CPU
