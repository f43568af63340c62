"""Page formats, byte for byte: where numbers lie, how they are rounded, what NaN becomes."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mla_triton
from mla_triton import LatentCache
from mla_triton import device as devices
from mla_triton.cache import FP8_DS_MLA, FP8_V4, FP8_V41
from mla_triton.cache.formats import PACKED_FORMATS
from mla_triton.cache.quantise import (
    dequantise,
    from_e8m0,
    group_scales,
    pack,
    quantise,
    to_e4m3,
    to_e8m0,
    unpack,
)

NAN, INF = float("nan"), float("inf")


def value(code: int) -> float:
    """An e4m3 number by its definition: four bits of exponent biased by 7, three of mantissa."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return NAN
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


CODES = list(range(127))
"""Of the finite numbers that are not negative, ascending."""


def codes(values: torch.Tensor) -> list[int]:
    return to_e4m3(values).view(torch.uint8).tolist()


def kernel_codes(values: torch.Tensor) -> torch.Tensor:
    """The same as a kernel stores them, under a scale of 1."""
    rows = values.reshape(-1, 16)
    stored = torch.zeros(1, len(rows), 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    cache = LatentCache(stored, None, torch.ones(2))
    mla_triton.append(cache, rows, None, torch.arange(len(rows)))
    return stored.view(torch.uint8).flatten()


# -- numbers


def test_e4m3_numbers_are_kept():
    every = torch.tensor([value(code) for code in CODES])
    assert codes(every) == CODES
    assert codes(-every) == [code | 0x80 for code in CODES]


def test_what_lies_between_goes_to_the_nearest_and_a_tie_to_even():
    lower, upper = (torch.tensor([value(c) for c in part]) for part in (CODES[:-1], CODES[1:]))
    middle = (lower + upper) / 2
    assert codes(middle) == [c + (c & 1) for c in CODES[:-1]]
    above, below = (torch.nextafter(middle, torch.tensor(end)) for end in (INF, -INF))
    assert codes(above) == CODES[1:]
    assert codes(below) == CODES[:-1]


def test_large_numbers_are_saturated_and_nan_has_no_sign():
    assert codes(torch.tensor([448.0, 464.0, 465.0, 1e30, INF])) == [0x7E] * 5
    assert codes(torch.tensor([-449.0, -INF])) == [0xFE] * 2
    assert codes(torch.tensor([NAN, -NAN]).neg()) == [0x7F] * 2
    assert codes(torch.tensor([0.0, -0.0])) == [0, 0x80]


def test_kernels_round_every_bfloat16_as_the_reference_does():
    """All 65536 of them, NaN and infinities among them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    assert torch.equal(kernel_codes(every), to_e4m3(every).view(torch.uint8))


def test_kernels_round_what_is_near_a_tie_as_the_reference_does():
    numbers = torch.tensor([value(code) for code in CODES])
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (INF, -INF)]
    every = torch.cat([middle, *near, numbers, numbers[:1]])
    every = torch.cat([every, -every])
    every = torch.cat([every, every.new_zeros(-len(every) % 16)])
    assert torch.equal(kernel_codes(every), to_e4m3(every).view(torch.uint8))


def test_kernels_decode_all_codes():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).view(torch.float8_e4m3fn)
    table, bounds = (torch.tensor(n, dtype=torch.int32) for n in ([[0]], [0, 16]))
    rows, _ = mla_triton.gather(
        LatentCache(stored, None, torch.ones(2)), table, bounds, rows=16, dtype=torch.float32
    )
    expected = torch.tensor([value(code) for code in range(256)])
    torch.testing.assert_close(rows.flatten(), expected, rtol=0, atol=0, equal_nan=True)
    assert rows.flatten()[[0, 128]].signbit().tolist() == [False, True]


# -- scales


def test_scales_of_groups():
    values = torch.tensor([448.0, -896.0, 0.0, NAN, INF, 449.0, 1e-44, 3.0]).view(1, 8)
    arbitrary = group_scales(values, 8)[0].tolist()
    assert arbitrary[:6] == [1.0, 2.0, 1.0, 1.0, 1.0, torch.tensor(449 / 448).item()]
    assert arbitrary[6] == 2.0**-126
    powers = group_scales(values, 8, power_of_two=True)[0].tolist()
    assert powers == [1.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0**-126, 2.0**-7]


@given(st.floats(2.0**-117, 2.0**126, width=32))
def test_a_power_of_two_is_the_next_that_is_not_below(largest):
    arbitrary, power = (
        group_scales(torch.tensor([[largest]]), 1, power).item() for power in (False, True)
    )
    assert power / 2 < arbitrary <= power
    assert to_e8m0(torch.tensor([power])).item() == torch.tensor(power).log2().item() + 127


def test_e8m0():
    every = from_e8m0(torch.arange(256, dtype=torch.uint8))
    assert every[:255].double().tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert every[255].isnan()
    assert torch.equal(to_e8m0(every[1:255]), torch.arange(1, 255, dtype=torch.uint8))


def test_nan_and_infinity_are_of_their_own_elements_alone():
    latent = torch.linspace(-3, 3, 512).view(1, 512)
    strange = latent.clone()
    strange[0, 5], strange[0, 200], strange[0, 300] = NAN, INF, -INF
    views = FP8_DS_MLA.views(torch.zeros(1, 656, dtype=torch.uint8), 1)
    plain, other = (quantise(values, torch.zeros(1, 64), views) for values in (latent, strange))
    found = other.ckv.view(torch.uint8)[0]
    assert found[[5, 200, 300]].tolist() == [0x7F, 0x7E, 0xFE]
    kept = torch.ones(512, dtype=torch.bool)
    kept[[5, 200, 300]] = False
    assert torch.equal(other.scales, plain.scales)
    assert torch.equal(found[kept], plain.ckv.view(torch.uint8)[0, kept])


def test_zeros_stay_zeros():
    for form in PACKED_FORMATS:
        rope = torch.zeros(1, 1, form.rope) if form.rope else None
        pages = pack(form, torch.zeros(1, 1, form.latent), rope)
        latents, keys = unpack(form, pages, 1)
        assert not latents.any()
        assert keys is None or not keys.any()
        scales = form.views(pages, 1).scales
        assert (scales == (127 if scales.dtype == torch.uint8 else 1.0)).all()


# -- where the bytes lie


def test_fp8_ds_mla_by_hand():
    """Two tokens of 656 bytes: 512 e4m3, four float32 scales, 64 bfloat16."""
    codes_of = [[(7 * t + c) % 120 for c in range(512)] for t in range(2)]
    scales = [[2.0**t, 0.5, 3.0, 0.0078125] for t in range(2)]
    rope = [[(t + 1) * (c - 30) / 4 for c in range(64)] for t in range(2)]
    packed = b""
    for t in range(2):
        packed += bytes(codes_of[t]) + struct.pack("<4f", *scales[t])
        packed += b"".join(struct.pack("<f", number)[2:] for number in rope[t])
    pages = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(1, -1)
    assert FP8_DS_MLA.page_bytes(2) == pages.shape[1] == 1312
    latents, keys = unpack(FP8_DS_MLA, pages, 2)
    expected = [[value(codes_of[t][c]) * scales[t][c // 128] for c in range(512)] for t in range(2)]
    assert latents.tolist() == [expected]
    assert keys.tolist() == [rope]


def test_fp8_v4_by_hand():
    """Three tokens: their 576 bytes of data, then their 8 bytes of scales, then padding."""
    codes_of = [[(5 * t + c) % 126 for c in range(448)] for t in range(3)]
    exponents = [[120 + t + g for g in range(7)] for t in range(3)]
    rope = [[(t + 1) * (c - 20) / 8 for c in range(64)] for t in range(3)]
    data = b""
    for t in range(3):
        data += bytes(codes_of[t])
        data += b"".join(struct.pack("<f", number)[2:] for number in rope[t])
    packed = data + b"".join(bytes([*exponents[t], 0xEE]) for t in range(3))
    packed += b"\xdd" * (2304 - len(packed))
    pages = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(1, -1)
    assert FP8_V4.page_bytes(3) == pages.shape[1]
    latents, keys = unpack(FP8_V4, pages, 3)
    expected = [
        [value(codes_of[t][c]) * 2.0 ** (exponents[t][c // 64] - 127) for c in range(448)]
        for t in range(3)
    ]
    assert latents.tolist() == [expected]
    assert keys.tolist() == [rope]


def test_fp8_v41_by_hand():
    """Two tokens of 528 bytes: 512 e4m3, 16 exponents."""
    codes_of = [[(3 * t + c) % 126 for c in range(512)] for t in range(2)]
    exponents = [[121 + t + g for g in range(16)] for t in range(2)]
    packed = b"".join(bytes(codes_of[t]) + bytes(exponents[t]) for t in range(2))
    pages = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(1, -1)
    latents, keys = unpack(FP8_V41, pages, 2)
    expected = [
        [value(codes_of[t][c]) * 2.0 ** (exponents[t][c // 32] - 127) for c in range(512)]
        for t in range(2)
    ]
    assert keys is None
    assert latents.tolist() == [expected]


@pytest.mark.parametrize("form", PACKED_FORMATS, ids=lambda form: form.name)
def test_pages_are_packed_by_hand_alike(form):
    """A token's numbers that e4m3 and its scale hold exactly come back as they are."""
    generator = torch.Generator().manual_seed(0)
    width = form.latent
    numbers = torch.tensor([value(code) for code in CODES])
    latent = numbers[torch.randint(127, (2, 3, width), generator=generator)]
    # The largest of each group is 448 times a power of two, so that this is the scale.
    latent.unflatten(-1, (form.groups, -1))[..., 0] = 448.0
    powers = torch.randint(-3, 4, (2, 3, form.groups), generator=generator)
    latent *= (2.0**powers).repeat_interleave(form.group, -1)
    rope = torch.randint(-99, 99, (2, 3, form.rope), generator=generator).float()
    for power_of_two in (True, False):
        pages = pack(form, latent, rope if form.rope else None, power_of_two)
        latents, keys = unpack(form, pages, 3)
        assert torch.equal(latents, latent)
        assert keys is None or torch.equal(keys, rope)
    assert [form.token_bytes for form in PACKED_FORMATS] == [656, 584, 528]


def test_a_page_of_v4_is_padded():
    """Pages of 64 tokens: 64 * 584 = 37376 bytes, up to a multiple of 576."""
    assert FP8_V4.page_bytes(64) == 37440
    assert FP8_V4.page_bytes(1) == 1152
    assert FP8_DS_MLA.page_bytes(64) == 64 * 656
    assert FP8_V41.page_bytes(64) == 64 * 528


def test_dequantised_exactly_in_float64_and_rounded_twice_otherwise():
    scales = torch.tensor([0.3, 0.7])
    stored = torch.arange(96, dtype=torch.uint8).view(1, 1, 96).view(torch.float8_e4m3fn)
    cache = LatentCache(stored, None, scales)
    exact, _ = dequantise(cache, torch.float64, rope=32)
    factors = [scales[0].item()] * 64 + [scales[1].item()] * 32
    assert exact[0, 0].tolist() == [value(c) * factor for c, factor in enumerate(factors)]
    single, _ = dequantise(cache, torch.float32, rope=32)
    assert torch.equal(single, exact.float())
    assert torch.equal(dequantise(cache, torch.bfloat16, rope=32)[0], single.bfloat16())


def test_what_is_no_page_is_refused():
    with pytest.raises(TypeError, match=r"^pages must be uint8, got torch\.int8$"):
        FP8_V41.views(torch.zeros(2, 528, dtype=torch.int8), 1)
    rule = r"^pages must have 1056 contiguous bytes a page \(fp8_v41, 2 tokens\), got shape \(2, 52"
    with pytest.raises(ValueError, match=rule):
        FP8_V41.views(torch.zeros(2, 528, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="contiguous bytes a page"):
        FP8_V41.views(torch.zeros(528, 2, dtype=torch.uint8).mT, 1)


def test_the_software_of_older_cards_is_what_the_interpreter_runs():
    """So that the tests above are of it."""
    from mla_triton.kernels.common.e4m3 import converts_e4m3

    assert not converts_e4m3(devices.INTERPRETER)
    native = {label: converts_e4m3(devices.from_label(label)) for label in devices.KNOWN}
    assert [label for label, own in native.items() if not own] == [
        "8.0", "8.6", "8.7", "gfx942", "gfx950"
    ]  # fmt: skip
