"""Device functions between float32 and the bytes of a quantised cache: e4m3 numbers, e8m0 scales.

To the bit what `mla_triton.cache.quantise` defines, on every card: those without a conversion of
their own (8.0, 8.6; AMD's, whose e4m3 may be another) compute it in integers. Bytes are uint8
throughout, because a card without e4m3 has no such type.
"""

import torch
import triton
import triton.language as tl

from mla_triton.device import Device

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)


def converts_e4m3(device: Device) -> bool:
    """Whether a card's own conversion is used."""
    return device.backend == "cuda" and device.has_fp8


def bytes_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same memory as uint8 where it holds e4m3, as the interpreter wants it; strides stay."""
    if tensor is None or tensor.dtype != torch.float8_e4m3fn:
        return tensor
    return tensor.view(torch.uint8)


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """float32 to e4m3 bytes: to nearest, ties to even; saturated; NaN is 0x7f."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Exponents from -6 on keep three bits of their mantissa, rounded with the carry.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        # Below, steps are 2**-9: those of float32 at 2**14, where an addition rounds to them.
        shifted = tl.abs(x) + 16384.0
        small = shifted.to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude > 0x7F800000, 0x7F, code | ((bits >> 24) & 0x80))
        return code.to(tl.uint8)


@triton.jit
def decode_e4m3(code, NATIVE: tl.constexpr):
    """e4m3 bytes to float32, exactly."""
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.uint32)
        magnitude = bits & 0x7F
        # The bits as a float32's, whose exponents are biased by 120 more; subnormals included.
        scaled = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        scaled = tl.where(magnitude == 0x7F, float("nan"), scaled)
        # Not by a minus, which takes the sign of a zero away.
        signed = scaled.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)
        return signed.to(tl.float32, bitcast=True)


@triton.jit
def largest_finite(grouped):
    """Largest finite magnitude `[ROWS, GROUPS]` of columns `[ROWS, GROUPS, GROUP]`; 0 or NaN where
    there is none."""
    # Infinity times 0 is NaN, which a maximum leaves out.
    return tl.max(tl.abs(tl.fma(grouped, tl.zeros_like(grouped), grouped)), 2)


@triton.jit
def group_scales(grouped, POWER_OF_TWO: tl.constexpr):
    """(scales, their reciprocals), float32 `[ROWS, GROUPS]`, of columns `[ROWS, GROUPS, GROUP]`."""
    largest = largest_finite(grouped)
    if POWER_OF_TWO:
        # 448 is 1.75 * 2**8: without a division, whose way for zeros is a long one.
        bits = (largest.to(tl.uint32, bitcast=True) + 0x1FFFFF) & 0x7F800000
        bits = tl.maximum(bits, (1 + 8) << 23) - (8 << 23)
        bits = tl.where(largest > 0.0, bits, 127 << 23)
        return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)
    else:
        scales = tl.div_rn(largest, tl.full(largest.shape, E4M3_MAX, tl.float32))
        scales = tl.where(largest > 0.0, tl.maximum(scales, SMALLEST_SCALE), 1.0)
        return scales, reciprocal(scales)


@triton.jit
def reciprocal(x):
    """1 / x, rounded to nearest."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def encode_e8m0(scales):
    """The biased exponents of float32 powers of two."""
    return (scales.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def decode_e8m0(code):
    """uint8 to float32: 2**(code - 127), and NaN for 255."""
    exponent = code.to(tl.uint32)
    bits = tl.where(exponent == 0, 0x400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
