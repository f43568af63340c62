"""Device functions on tiles that stay in registers: dot products and the online softmax."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# The running maximum starts here and not at -inf, so that a row without a visible key so far
# subtracts finite numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """`a @ b + accumulator`, accumulated in float32."""
    # The interpreter multiplies bfloat16's raw bits.
    if EMULATE_BF16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def narrow(x, TYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """float32 rounded to nearest, ties to even, in `TYPE`."""
    # The interpreter cuts bfloat16's low bits off instead of rounding them.
    if EMULATE_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


@triton.jit
def online_softmax_update(scores, running_max, running_sum):
    """One step of the online softmax, in the exp2 domain; `scores` is -inf where a key is hidden.

    Returns the new maximum and sum, the factor that brings earlier sums to the new maximum, and the
    tile's unnormalised probabilities.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    rescale = tl.exp2(running_max - new_max)
    probabilities = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * rescale + tl.sum(probabilities, 1)
    return new_max, running_sum, rescale, probabilities


@triton.jit
def finish_softmax(accumulator, running_max, running_sum):
    """(out, lse in base 2) of rows; a row that saw no key gives 0 and -inf, a NaN stays a NaN."""
    empty = running_sum == 0.0
    total = tl.where(empty, 1.0, running_sum)
    out = accumulator * (1.0 / total)[:, None]
    lse = tl.where(empty, float("-inf"), running_max + tl.log2(total))
    return out, lse
