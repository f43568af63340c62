"""Bugs in the kernels for Hopper, which have no interpreter: planted on a Hopper card alone."""

from __future__ import annotations

from typing import NamedTuple

from planting import Edit

ASYMMETRIC = "kernels.sm90.asymmetric"
PAIRS = "kernels.sm90.pairs"
SCORES = "kernels.sm90.quantised_scores"
OUTPUT = "kernels.sm90.quantised_output"
APART = "kernels.sm90.quantised_apart"
VIEWS = "kernels.sm90.views"
PREFILL = "kernels.sm90.prefill"
PREFILL_STEPS = "kernels.sm90.prefill_steps"


class HopperMutant(NamedTuple):
    form: str
    """"decode, 1" and "decode, 2" are the two forms of decode over 16-bit caches."""
    edit: Edit


MUTANTS = {
    "scale applied twice": HopperMutant(
        "decode, 1", Edit(VIEWS, "t.softmax_scale * LOG2_E", "t.softmax_scale**2 * LOG2_E")
    ),
    "scale 2^-7 too large": HopperMutant(
        "decode, 2", Edit(VIEWS, "softmax_scale * LOG2_E", "softmax_scale * LOG2_E * (1 + 2**-7)")
    ),
    "lse in base 2, form 1": HopperMutant(
        "decode, 1", Edit(ASYMMETRIC, "lse_log2 * LN_2", "lse_log2")
    ),
    "mask one key too wide, form 1": HopperMutant(
        "decode, 1",
        Edit(
            ASYMMETRIC,
            "(key >= gl.expand_dims(visible_end, 1))",
            "(key > gl.expand_dims(visible_end, 1))",
        ),
    ),
    "values behind the last key left, form 1": HopperMutant(
        "decode, 1",
        Edit(
            ASYMMETRIC,
            "if block + KEYS > end_key:\n                    clear_past(shared.left",
            "if block > end_key:\n                    clear_past(shared.left",
        ),
    ),
    "sum not rescaled, form 1": HopperMutant(
        "decode, 1",
        Edit(
            ASYMMETRIC,
            "running_sum * rescale + gl.sum(weights, 1)",
            "running_sum + gl.sum(weights, 1)",
        ),
    ),
    "P rounded to e4m3, form 1": HopperMutant(
        "decode, 1",
        Edit(
            ASYMMETRIC, "narrow = weights.to(dtype)", "narrow = weights.to(gl.float8e4nv).to(dtype)"
        ),
    ),
    "lse in base 2, form 2": HopperMutant("decode, 2", Edit(PAIRS, "lse_log2 * LN_2", "lse_log2")),
    "mask one key too wide, form 2": HopperMutant(
        "decode, 2",
        Edit(
            PAIRS,
            "(key >= gl.expand_dims(before_queries + row // call.heads, 1))",
            "(key > gl.expand_dims(before_queries + row // call.heads, 1))",
        ),
    ),
    "mask one key too wide over e4m3": HopperMutant(
        "decode, e4m3",
        Edit(
            SCORES,
            "(key >= gl.expand_dims(visible_end, 0))",
            "(key > gl.expand_dims(visible_end, 0))",
        ),
    ),
    "lse in base 2 over e4m3": HopperMutant(
        "decode, e4m3", Edit(OUTPUT, "lse_log2 * LN_2", "lse_log2")
    ),
    "output not rescaled over e4m3, 64 rows": HopperMutant(
        "decode, e4m3, 64 rows",
        Edit(APART, "if gl.min(rescale, 0) < 1.0:", "if gl.min(rescale, 0) < -1.0:"),
    ),
    "sum not rescaled over e4m3, 64 rows": HopperMutant(
        "decode, e4m3, 64 rows", Edit(APART, "sums *= as_factor(rescale, SUMS)", "sums *= 1.0")
    ),
    "prefill: scale applied twice": HopperMutant(
        "prefill",
        Edit(PREFILL, "abs(t.softmax_scale) * LOG2_E", "abs(t.softmax_scale) ** 2 * LOG2_E"),
    ),
    "prefill: mask one key too wide": HopperMutant(
        "prefill",
        Edit(
            PREFILL_STEPS,
            "gl.expand_dims(key, 0) >= gl.expand_dims(row_ends, 1)",
            "gl.expand_dims(key, 0) > gl.expand_dims(row_ends, 1)",
        ),
    ),
    "prefill: lse in base 2": HopperMutant(
        "prefill", Edit(PREFILL_STEPS, "lse_log2 * LN_2", "lse_log2")
    ),
    "prefill: sum not rescaled": HopperMutant(
        "prefill",
        Edit(
            PREFILL_STEPS,
            "running_sum * rescale + gl.sum(weights, 1)",
            "running_sum + gl.sum(weights, 1)",
        ),
    ),
}
