"""The bugs: each an edit of a real kernel's text, and the trial that has to notice it."""

from __future__ import annotations

from typing import NamedTuple

from planting import Edit

DECODE = "kernels.portable.decode"
STEPS = "kernels.portable.decode_steps"
TILES16 = "kernels.portable.tiles16"
PREFILL = "kernels.portable.prefill"
MERGE = "kernels.portable.merge"
APPEND = "kernels.portable.append"
GATHER = "kernels.portable.gather"
COMBINE = "kernels.common.combine"
E4M3 = "kernels.common.e4m3"
PAGED = "kernels.common.paged"
TILES = "kernels.common.tiles"

DTYPES = ("float16", "bfloat16")


class Mutant(NamedTuple):
    trial: str
    edits: tuple[Edit, ...]
    missed: frozenset[str] = frozenset()
    """The dtypes in which it is within all budgets: what they cannot tell."""


def one(trial: str, module: str, old: str, new: str, *missed: str) -> Mutant:
    return Mutant(trial, (Edit(module, old, new),), frozenset(missed))


def through_e4m3(module: str, line: str) -> tuple[Edit, ...]:
    """The probabilities of a step rounded to e4m3 before they are what they are multiplied as."""
    return (
        Edit(
            module,
            "import triton.language as tl\n",
            "import triton.language as tl\n\n"
            "from mla_triton.kernels.common.e4m3 import decode_e4m3, encode_e4m3\n",
        ),
        Edit(
            module,
            line,
            line.replace("probabilities", "decode_e4m3(encode_e4m3(probabilities, False), False)"),
        ),
    )


WIDE_SUM = """\
        accumulator * rescale[:, None],
        PRECISION,
        EMULATE_BF16,
    )
"""
OF_DECODE = {
    "scale applied twice": one(
        "decode", DECODE, "t.softmax_scale * LOG2_E", "t.softmax_scale**2 * LOG2_E"
    ),
    "scale applied twice in steps with a mask": one(
        "decode",
        STEPS,
        "    if MASKED:\n        visible",
        "    if MASKED:\n        scores = scores * value_factor\n        visible",
    ),
    "scale 2^-7 too large": one(
        "decode", DECODE, "softmax_scale * LOG2_E", "softmax_scale * LOG2_E * (1 + 2**-7)"
    ),
    "scale 2^-13 too large": one(
        "decode", DECODE, "softmax_scale * LOG2_E", "softmax_scale * LOG2_E * (1 + 2**-13)"
    ),
    "lse in base 2": one("decode", DECODE, "lse_log2 * LN_2", "lse_log2"),
    "ln 2 to three digits": one("decode", TILES, "0.6931471805599453", "0.693"),
    "lse without the scale": one(
        "decode",
        DECODE,
        "finish_softmax(accumulator, running_max, running_sum)",
        "finish_softmax(accumulator, running_max / scale_log2, running_sum)",
    ),
    "mask one key too wide": one(
        "decode", STEPS, "< visible_end[:, None]", "<= visible_end[:, None]"
    ),
    "mask one key too narrow": one(
        "decode", STEPS, "< visible_end[:, None]", "< visible_end[:, None] - 1"
    ),
    "mask aligned top-left": one(
        "decode",
        DECODE,
        "before_queries = kv_len - request_s_q + 1",
        "before_queries = request_s_q * 0 + 1",
    ),
    "first block with the diagonal taken whole": one(
        "decode",
        DECODE,
        "tl.minimum(end_key, before_queries + first_row // heads)",
        "tl.minimum(end_key, before_queries + BLOCK_N + first_row // heads)",
    ),
    "last page's tail unmasked": one(
        "decode, all keys", DECODE, "tl.minimum(end * KV_TILE, kv_len)", "end * KV_TILE"
    ),
    "tail masked in the logits, not in the values": one(
        "decode", TILES16, "if COLUMNS == WIDTH and not MASKED:", "if COLUMNS == WIDTH:"
    ),
    "last key dropped": one(
        "decode", STEPS, "block_keys < end_key - block", "block_keys < end_key - block - 1"
    ),
    "page of the block before": one(
        "decode, all keys", DECODE, "page_row, block + BLOCK_N,", "page_row, block,"
    ),
    "rotary part left out": one(
        "decode",
        STEPS,
        "        else:\n            scores = dot(q_tail,",
        "        else:\n            scores = dot(q_tail * 0,",
    ),
    "accumulator not rescaled": one(
        "decode, all keys", STEPS, "        accumulator * rescale[:, None],", "        accumulator,"
    ),
    "sum not rescaled": one(
        "decode, all keys", TILES, "running_sum * rescale + tl.sum", "running_sum + tl.sum"
    ),
    "softmax without its maximum": one(
        "decode, large logits",
        TILES,
        "new_max = tl.maximum(running_max, tl.max(scores, 1))",
        "new_max = running_max * 0",
    ),
    "accumulator in q's 16 bits": one(
        "decode, many keys",
        STEPS,
        WIDE_SUM + "    if LATENT",
        WIDE_SUM
        + "    accumulator = narrow(accumulator, q_value.dtype, EMULATE_BF16).to(tl.float32)\n"
        "    if LATENT",
    ),
    "accumulator in float16": one(
        "decode, large values",
        STEPS,
        WIDE_SUM + "    if LATENT",
        WIDE_SUM + "    accumulator = accumulator.to(tl.float16).to(tl.float32)\n    if LATENT",
    ),
    "P rounded to e4m3": Mutant(
        "decode, all keys",
        through_e4m3(STEPS, "narrow(probabilities, latent.dtype, EMULATE_BF16),"),
    ),
    "P rounded to bfloat16": one(
        "decode, all keys",
        STEPS,
        "narrow(probabilities, latent.dtype, EMULATE_BF16),",
        "narrow(narrow(probabilities, tl.bfloat16, True).to(tl.float32), latent.dtype, False),",
        "bfloat16",
    ),
    "sum in q's 16 bits": one(
        "decode, many keys",
        STEPS,
        "    accumulator = dot(\n        narrow(probabilities, latent",
        "    running_sum = narrow(running_sum, q_value.dtype, EMULATE_BF16).to(tl.float32)\n"
        "    accumulator = dot(\n        narrow(probabilities, latent",
    ),
    "a step that only the config of 8.9 takes": one(
        "decode, the config of 8.9",
        STEPS,
        "    if MASKED:\n        visible",
        "    if KEYS == 32 and not MASKED:\n        scores = scores * 1.5\n"
        "    if MASKED:\n        visible",
    ),
    "addresses of pages in int32": one(
        "decode, pages far apart",
        PAGED,
        "page.to(tl.int64) * stride_page",
        "page.to(tl.int32) * stride_page.to(tl.int32)",
    ),
    "addresses of slots in int32": one(
        "decode, slots far apart",
        PAGED,
        "STRIDE * PAGE_SIZE >= 2**31",
        "STRIDE * PAGE_SIZE >= 2**63",
    ),
}
OF_COMBINE = {
    "a stale split": one(
        "decode, split",
        COMBINE,
        "tl.where(piece == 0, group_rows, 0)",
        "tl.where(piece == 0, 0, 0)",
    ),
    "last split left out": one(
        "decode, split",
        COMBINE,
        "(piece + turn * ABREAST < splits)",
        "(piece + turn * ABREAST < splits - 1)",
    ),
    "a piece taken for the whole": one(
        "decode, split", DECODE, "if (begin == 0) & (end == tiles):", "if begin == 0:"
    ),
    "splits weighted in base e": one(
        "decode, split",
        COMBINE,
        "tl.exp2(lses[turn] - new_max[None, :])",
        "tl.exp(lses[turn] - new_max[None, :])",
    ),
    "splits averaged": one(
        "decode, split",
        COMBINE,
        "tl.exp2(lses[turn] - new_max[None, :])",
        "tl.exp2((lses[turn] - new_max[None, :]) * 0)",
    ),
    "lse in base 2 where it is merged": one(
        "decode, split", COMBINE, "merged_lse * LN_2", "merged_lse"
    ),
    "partial results in q's 16 bits": one(
        "decode, split",
        DECODE,
        "+ (tile_rows[:, None] * VALUE + value_columns[None, :]),\n                result,",
        "+ (tile_rows[:, None] * VALUE + value_columns[None, :]),\n                "
        "narrow(result, out.dtype.element_ty, EMULATE_BF16),",
        "float16",
        "bfloat16",
    ),
}
OF_QUANTISED = {
    "scale of the latents applied twice": one(
        "decode, two scales",
        DECODE,
        "times_factor(value_factor, DECODE) * value_scale * scale_log2",
        "times_factor(value_factor, DECODE) * value_scale * value_scale * scale_log2",
    ),
    "values without their scale": one(
        "decode, two scales",
        DECODE,
        "times_factor(result, DECODE) * value_scale",
        "times_factor(result, DECODE)",
    ),
    "rotary keys by the latents' scale": one(
        "decode, two scales", DECODE, "tl.load(scales + 1)", "tl.load(scales)"
    ),
    "queries in float16 without a factor": one(
        "decode, two scales",
        TILES16,
        "(wide * factor[:, None]).to(tl.float16), back",
        "wide.to(tl.float16), back",
    ),
    "wrong group's scale": one(
        "decode, scales of groups",
        TILES16,
        "* scales[:, :, None]",
        "* tl.flip(scales, 1)[:, :, None]",
    ),
    "scale of a group applied twice": one(
        "decode, scales of groups",
        TILES16,
        "* scales[:, :, None]",
        "* (scales * scales)[:, :, None]",
    ),
    "scale of the page's first key": one(
        "decode, scales of groups",
        STEPS,
        "num_pages, SCALES_SLOT, PAGE_SIZE,\n",
        "num_pages, 0, PAGE_SIZE,\n",
    ),
}
OF_PREFILL = {
    "prefill: scale applied twice": one(
        "prefill", PREFILL, "t.softmax_scale * LOG2_E", "t.softmax_scale**2 * LOG2_E"
    ),
    "prefill: scale applied twice in steps with a mask": one(
        "prefill",
        PREFILL,
        "tl.where(visible, products * scale_log2,",
        "tl.where(visible, products * scale_log2 * scale_log2,",
    ),
    "prefill: scale 2^-7 too large": one(
        "prefill", PREFILL, "softmax_scale * LOG2_E", "softmax_scale * LOG2_E * (1 + 2**-7)"
    ),
    "prefill: lse in base 2": one("prefill", PREFILL, "lse_log2 * LN_2", "lse_log2"),
    "prefill: mask one key too wide": one(
        "prefill", PREFILL, "< visible_end[:, None]", "<= visible_end[:, None]"
    ),
    "prefill: mask one key too narrow": one(
        "prefill", PREFILL, "< visible_end[:, None]", "< visible_end[:, None] - 1"
    ),
    "prefill: mask aligned top-left": one(
        "prefill",
        PREFILL,
        "row_end = key_count - query_count + 1 + first_row + tile_rows",
        "row_end = first_row + 1 + tile_rows",
    ),
    "prefill: values behind the last key not masked": one(
        "prefill", PREFILL, "0, VALUE, VALUE, MASKED)", "0, VALUE, VALUE, False)"
    ),
    "prefill: softmax without its maximum": one(
        "prefill, large logits",
        TILES,
        "new_max = tl.maximum(running_max, tl.max(scores, 1))",
        "new_max = running_max * 0",
    ),
    "prefill: accumulator in q's 16 bits": one(
        "prefill, many keys",
        PREFILL,
        "    if SETTLE:",
        "    accumulator = narrow(accumulator, values.dtype, EMULATE_BF16).to(tl.float32)\n"
        "    if SETTLE:",
    ),
    "prefill: P rounded to e4m3": Mutant(
        "prefill, many keys",
        through_e4m3(PREFILL, "narrow(probabilities, values.dtype, EMULATE_BF16),"),
    ),
}
OF_MERGE = {
    "merge: weights in base 2": one(
        "merge", MERGE, "weight = tl.exp(lse - largest)", "weight = tl.exp2(lse - largest)"
    ),
    "merge: lse without the sum": one("merge", MERGE, "largest + tl.log(total))", "largest)"),
    "merge: lse in base 2": one(
        "merge", MERGE, "largest + tl.log(total))", "largest + tl.log2(total))"
    ),
    "merge: values of empty states counted": one(
        "merge", MERGE, "tl.where(is_empty, 0.0, values.to(tl.float32))", "values.to(tl.float32)"
    ),
    "merge: maximum of the first state": one(
        "merge, far apart",
        MERGE,
        "new_largest = tl.maximum(new_largest, lses[place])",
        "new_largest = new_largest",
    ),
    "merge: sums in the states' 16 bits": one(
        "merge, a stack with a mask",
        MERGE,
        "        accumulator += term\n",
        "        accumulator += term\n"
        "        accumulator = narrow(\n"
        "            accumulator, values[place].dtype, values[place].dtype == tl.bfloat16\n"
        "        ).to(tl.float32)\n",
    ),
    "merge: states after the first turn left out": one(
        "merge, a stack with a mask",
        MERGE,
        "range(OTHERS, others, OTHERS)",
        "range(OTHERS, others - OTHERS, OTHERS)",
    ),
    "merge: rows that stay merged": one(
        "merge, a stack with a mask",
        MERGE,
        "tl.where(is_merged[:, None], merged, firsts.to(tl.float32))",
        "merged",
    ),
}
OF_CACHE = {
    "append: slot -1 is the last": one(
        "append",
        APPEND,
        "    is_written = (slot >= 0)",
        "    slot = tl.where(slot == -1, capacity - 1, slot)\n    is_written = (slot >= 0)",
    ),
    "append: what has no slot goes to the first": one(
        "append",
        APPEND,
        "    page = slot // PAGE_SIZE\n",
        "    is_written = is_token\n    page = slot // PAGE_SIZE\n",
    ),
    "append: rounded towards zero": one(
        "append, scales of groups",
        APPEND,
        "encode_e4m3(scaled, NATIVE)",
        "encode_e4m3(\n"
        "(scaled.to(tl.uint32, bitcast=True) & 0xFFF00000).to(tl.float32, bitcast=True), NATIVE\n)",
    ),
    "append: scales of groups in reverse": one(
        "append, scales of groups", APPEND, "            made,\n", "            tl.flip(made, 1),\n"
    ),
    "append: numbers up to 240": one(
        "append, scales of groups", E4M3, "tl.constexpr(448.0)", "tl.constexpr(240.0)"
    ),
    "append: mean over the tile's columns": one(
        "append, norm and rotation", APPEND, "norm_eps, LATENT)", "norm_eps, COLUMNS)"
    ),
    "append: norm without its eps": one(
        "append, norm and rotation", APPEND, "tl.rsqrt(mean + eps)", "tl.rsqrt(mean + eps * 0)"
    ),
    "append: rotated backwards": one(
        "append, norm and rotation",
        APPEND,
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
    ),
    "gather: no page is page 0": one(
        "gather",
        GATHER,
        "    page = tl.where(is_there, page, 0)\n",
        "    is_there = is_row & (page < num_pages)\n    page = tl.maximum(page, 0)\n"
        "    page = tl.where(is_there, page, 0)\n",
    ),
    "gather: wrong group's scale": one(
        "gather, scales of groups",
        GATHER,
        "* factors[:, :, None]",
        "* tl.flip(factors, 1)[:, :, None]",
    ),
    "gather: scale applied twice": one(
        "gather, scales of groups",
        GATHER,
        "* factors[:, :, None]",
        "* (factors * factors)[:, :, None]",
    ),
}
MUTANTS = OF_DECODE | OF_COMBINE | OF_QUANTISED | OF_PREFILL | OF_MERGE | OF_CACHE
