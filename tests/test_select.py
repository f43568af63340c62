"""Which implementation is chosen for a card and a problem, and the reasons against the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_triton import device as devices
from mla_triton import reference, select
from mla_triton.device import CPU, INTERPRETER, KIB, Device
from mla_triton.kernels.portable import decode as portable
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
)
TURING = Device("T4", "cuda", "sm_75", sm_count=40, shared_memory=64 * KIB)
NOT_ON_A_GPU = "it synchronises and copies; on a GPU it runs only when asked for (impl='reference')"
NO_TRITON = "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
TOO_OLD = "it needs capability 8.0 or later, this card has 7.5"


def problem(**changes: object) -> DecodeProblem:
    return replace(DEEPSEEK_V3, **changes)


PROBLEMS = {
    "DeepSeek-V3": problem(),
    "float16": problem(dtype=torch.float16),
    "float32": problem(dtype=torch.float32),
    "one head": problem(heads=1),
    "V2-Lite, alone": problem(batch=1, queries=1, heads=16),
    "ragged": problem(s_q=None, queries=100),
    "four query tokens": problem(s_q=4, queries=64, causal=True),
    "without rope": problem(rope=0, ckv_stride_slot=512),
    "MiniCPM3": problem(latent=256, rope=32, value_dim=256, heads=40),
    "128+32": problem(latent=128, rope=32, value_dim=128),
    "DeepSeek-V4": problem(latent=448, rope=64, value_dim=512, heads=64),
    "pages of 1, CSR": problem(page_size=1, csr=True),
    "pages of 48": problem(page_size=48),
    "a pair": problem(fused=False, ckv_stride_slot=512, kpe_stride_slot=64),
    "not aligned": problem(aligned=False),
}


# -- selection


@pytest.mark.parametrize("label", devices.KNOWN)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_known_card_runs_every_problem_on_the_portable_kernels(label, name):
    chosen = select.decode(PROBLEMS[name], devices.from_label(label))
    assert chosen == ("portable", portable, (("portable", None), ("reference", NOT_ON_A_GPU)))


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
    assert chosen == ("portable", portable, (("portable", None), ("reference", None)))


def test_the_cpu_runs_the_reference():
    chosen = select.decode(DEEPSEEK_V3, CPU)
    assert chosen == ("reference", reference, (("portable", NO_TRITON), ("reference", None)))


@pytest.mark.parametrize("device", [INTERPRETER, CPU])
def test_where_the_kernels_cannot_go_the_cpu_runs_the_reference(device):
    wide = problem(latent=96, value_dim=96)
    assert select.decode(wide, device).name == "reference"


def test_a_card_that_nothing_runs_on_is_refused_with_every_reason():
    with pytest.raises(NotImplementedError) as error:
        select.decode(DEEPSEEK_V3, TURING)
    assert str(error.value) == (
        f"no implementation of decode can run on 7.5: portable: {TOO_OLD}; "
        f"reference: {NOT_ON_A_GPU}"
    )


def test_a_problem_that_no_kernel_takes_is_refused_on_a_gpu():
    with pytest.raises(NotImplementedError) as error:
        select.decode(problem(latent=96, value_dim=96), devices.from_label("9.0"))
    assert str(error.value) == (
        "no implementation of decode can run on 9.0: "
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


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="impl") as error:
        select.decode(DEEPSEEK_V3, INTERPRETER, "fastest")
    assert str(error.value) == "impl must be one of portable, reference, got 'fastest'"


def test_a_refusal_is_repeated():
    """Selections are kept; what is refused has to be refused again."""
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            select.decode(DEEPSEEK_V3, TURING)


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
