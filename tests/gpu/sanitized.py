"""A script for compute-sanitizer: every kernel on small problems, judged on the CPU.

    python sanitized.py WAY

WAY is portable, sm90-1, sm90-2, prefill-portable, prefill-sm90, merge or cache.

Memory comes straight from the driver (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that an access past the
end of a tensor is one past the end of an allocation. Prints the names of the kernels it launched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The modules that tests share lie there.
sys.path.append(str(Path(__file__).parents[1]))

import torch
import triton
from ways import WAYS, Way, forced, run

from mla_triton import AttentionState, append, copy_pages, merge, prefill
from mla_triton.testing import (
    append_excess,
    append_inputs,
    assert_within_budget,
    decode_inputs,
    gather_inputs,
    merge_inputs,
    plan_of,
    prefill_inputs,
    same_bits,
)
from mla_triton.testing.caches import FORMS

KV_LENS = (300, 0, 65, 1)
PORTABLE: tuple[dict[str, Any], ...] = (
    {"heads": 16, "dtype": torch.bfloat16},
    {"heads": 16, "dtype": torch.float16, "page_size": 1},
    {"heads": 5, "dtype": torch.float16, "page_size": 16, "table": "csr"},
    {"heads": 40, "dtype": torch.bfloat16, "latent": 256, "rope": 32, "page_size": 48},
    {"heads": 64, "dtype": torch.float16, "latent": 448, "rope": 64, "value_dim": 512},
    {"heads": 128, "dtype": torch.bfloat16, "s_q": 2},
    {"heads": 16, "dtype": torch.float16, "q_lens": (3, 1, 0, 33)},
    {"heads": 16, "dtype": torch.bfloat16, "layout": "pair", "strided": True},
    {"heads": 16, "dtype": torch.float16, "strided": 3},
    {"heads": 8, "dtype": torch.float32},
    {"heads": 16, "dtype": torch.bfloat16, "kv_lens": (2000,)},
    {"heads": 16, "dtype": torch.bfloat16, "parts": 9},
    {"heads": 16, "dtype": torch.bfloat16, "batch_invariant": True},
    {"heads": 16, "dtype": torch.bfloat16, "batch_invariant": True, "q_lens": (3, 1, 0, 33)},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8"},
    {"heads": 128, "dtype": torch.float16, "stored": "fp8", "layout": "pair", "page_size": 1},
    {"heads": 16, "dtype": torch.float16, "stored": "fp8_groups", "strided": True},
    {"heads": 5, "dtype": torch.bfloat16, "stored": "fp8_ds_mla", "page_size": 16},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8_v4", "latent": 448, "value_dim": 512},
    {"heads": 16, "dtype": torch.float16, "stored": "fp8_v41", "latent": 448, "value_dim": 512},
)
HOPPER: tuple[dict[str, Any], ...] = (
    {"heads": 16, "dtype": torch.bfloat16},
    {"heads": 128, "dtype": torch.float16, "page_size": 128, "causal": False},
    {"heads": 5, "dtype": torch.float16, "page_size": 32, "table": "csr"},
    {"heads": 40, "dtype": torch.bfloat16, "page_size": 16},
    {"heads": 40, "dtype": torch.bfloat16, "page_size": 1},
    {"heads": 20, "dtype": torch.float16, "page_size": 48, "layout": "pair", "table": "csr"},
    {"heads": 40, "dtype": torch.bfloat16, "latent": 256, "rope": 64},
    {"heads": 40, "dtype": torch.bfloat16, "latent": 512, "rope": 0, "page_size": 7},
    {"heads": 128, "dtype": torch.bfloat16, "latent": 512, "rope": 0},
    {"heads": 128, "dtype": torch.bfloat16, "s_q": 2},
    {"heads": 16, "dtype": torch.float16, "q_lens": (3, 1, 0, 33)},
    {"heads": 20, "dtype": torch.bfloat16, "layout": "pair", "strided": 16},
    {"heads": 128, "dtype": torch.bfloat16, "kv_lens": (2000,)},
    {"heads": 128, "dtype": torch.bfloat16, "parts": 9},
    {"heads": 128, "dtype": torch.bfloat16, "batch_invariant": True},
)
QUANTISED: tuple[dict[str, Any], ...] = (
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8"},
    {"heads": 24, "dtype": torch.float16, "stored": "fp8", "layout": "pair", "page_size": 32},
    {"heads": 128, "dtype": torch.bfloat16, "stored": "fp8", "table": "csr"},
    {"heads": 40, "dtype": torch.bfloat16, "stored": "fp8", "rope": 0, "causal": False},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8_ds_mla"},
    {"heads": 24, "dtype": torch.bfloat16, "stored": "fp8_ds_mla", "q_lens": (1, 1, 0, 1)},
    {"heads": 40, "dtype": torch.bfloat16, "stored": "fp8_ds_mla", "page_size": 16, "s_q": 2},
    {"heads": 64, "dtype": torch.bfloat16, "stored": "fp8_groups"},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8", "batch_invariant": True},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8_ds_mla", "parts": 9},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8", "kv_lens": (300, 0, 65) * 3},
    {"heads": 16, "dtype": torch.bfloat16, "stored": "fp8_ds_mla", "kv_lens": (300, 0, 65) * 3},
    {"heads": 64, "dtype": torch.float16, "stored": "fp8", "kv_lens": (200, 0, 65) * 11},
    {"heads": 40, "dtype": torch.bfloat16, "stored": "fp8_ds_mla", "kv_lens": (200, 0, 65) * 11},
)
"""For the Hopper kernel of e4m3 numbers: tiles of 16 and 32 rows, of programs that have an SM and
of those that share one, which have more than eight tiles; and of 64, of which there are 32."""

MERGES: tuple[dict[str, Any], ...] = (
    {"dtype": torch.bfloat16},
    {"states": 3, "dtype": torch.float16, "masked": True, "value_dim": 96},
    {"states": 8, "dtype": torch.float32, "strided": 3},
    {"states": 11, "dtype": torch.bfloat16, "stacked": True, "value_dim": 128},
    {"first_dtype": torch.float32, "dtype": torch.bfloat16, "masked": True},
)


def merge_all() -> int:
    """Merges states, apart and then in place of the first; how many problems."""
    for problem in MERGES:
        inputs = merge_inputs(tokens=(3, 3), heads=5, **problem)
        there = inputs.to("cuda")
        (states,), options = there.call_arguments()
        first = there.states[0]
        for buffers in (there.output_buffers(), {"out": first.out, "lse": first.lse}):
            state = merge(states, **options, **buffers)
            assert_within_budget(AttentionState(*(tensor.cpu() for tensor in state)), inputs)
    return 2 * len(MERGES)


def cache_all() -> int:
    """Appends to every form of cache, gathers and copies its pages; hostile slots and offsets."""
    judged = 0
    for form in FORMS:
        for norm, rotation, tokens in ((None, None, 20), (torch.float32, "half", 1500)):
            recipe = {"form": form, "tokens": tokens, "norm": norm, "rotation": rotation}
            inputs = append_inputs(**recipe, device="cuda")
            arguments, options = inputs.call_arguments()
            append(*arguments, **options)
            assert append_excess(inputs.memory.to("cpu"), append_inputs(**recipe)) <= 0
            judged += 1
        for csr in (False, True):
            found = gather_inputs(form=form, csr=csr, device="cuda")
            expected = gather_inputs(form=form, csr=csr).expected()
            assert same_bits([rows.cpu() for rows in found.call()], expected)
            found.cu_seqlens_k.copy_(torch.tensor([5, -7, 2**31 - 1, 3, 9]))
            found.call()
            torch.cuda.synchronize()
            judged += 1
    for size in (41984, 1001):
        pages = torch.randint(256, (5, size), dtype=torch.uint8, device="cuda")
        expected = pages[[0, 1, 0, 3, 4]]
        source = torch.tensor([0, -1, 9], device="cuda")
        copy_pages(pages, pages, source, torch.tensor([2, 1, 0], device="cuda"))
        assert torch.equal(pages, expected)
        judged += 1
    return judged


def decode_all(way: Way) -> int:
    """Decodes every problem of a way, and two whose lengths and page ids lie; how many."""
    problems = PORTABLE if way.impl == "portable" else HOPPER
    if way.blocks == 1:
        problems += QUANTISED
    for problem in problems:
        recipe = {"kv_lens": KV_LENS, **problem}
        parts, fixed = recipe.pop("parts", None), recipe.pop("batch_invariant", False)
        inputs = decode_inputs(**recipe)
        there = inputs.to("cuda")
        plan = None if parts is None else plan_of(there, way.impl, parts)
        state = run(there, way, plan=plan, batch_invariant=fixed)
        assert_within_budget(AttentionState(*(tensor.cpu() for tensor in state)), inputs)
    for page_size in (64, 1):
        wrong = decode_inputs(
            kv_lens=(300, 100), heads=16, page_size=page_size, dtype=torch.float16, device="cuda"
        )
        wrong.page_table.copy_(torch.tensor([[-5], [2**31 - 1]], dtype=torch.int32))
        wrong.kv_lens.copy_(torch.tensor([2**31 - 1, -7], dtype=torch.int32))
        run(wrong, way)
        torch.cuda.synchronize()
    return len(problems) + 2


PREFILL: tuple[dict[str, Any], ...] = (
    {"dtype": torch.bfloat16, "split_k": True},
    {"dtype": torch.float16, "split_k": True, "qk": 256, "v_dim": 256},
    {"dtype": torch.float16, "split_q": True, "split_k": True, "qk": 96, "rope": 32, "v_dim": 64},
    {"dtype": torch.bfloat16, "kv_heads": 2, "qk": 128, "causal": False},
    {"dtype": torch.bfloat16, "split_k": True, "strided": True},
    {"dtype": torch.float16, "strided": 3},
    {"dtype": torch.bfloat16, "q_lens": (3, 0, 9, 1), "k_lens": (40, 5, 0, 70)},
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16, "batch_invariant": True},
)
PREFILL_SM90: tuple[dict[str, Any], ...] = (
    {"dtype": torch.bfloat16, "split_k": True},
    {"dtype": torch.float16, "split_q": True, "split_k": True},
    {"dtype": torch.float16, "split_k": True, "qk": 256, "v_dim": 256},
    {"dtype": torch.bfloat16, "kv_heads": 2, "qk": 128, "causal": False},
    {"dtype": torch.bfloat16, "split_k": True, "strided": 16},
    {"dtype": torch.bfloat16, "q_lens": (3, 0, 9, 1), "k_lens": (40, 5, 0, 70)},
    {"dtype": torch.bfloat16, "split_k": True, "batch_invariant": True},
)


def prefill_all(impl: str) -> int:
    """The same for prefill, with offsets that lie at the end."""
    problems = PREFILL if impl == "portable" else PREFILL_SM90
    for problem in problems:
        recipe = {"q_lens": (130, 0, 65), "k_lens": (200, 9, 64), **problem}
        fixed = recipe.pop("batch_invariant", False)
        inputs = prefill_inputs(**recipe)
        arguments, options = inputs.to("cuda").call_arguments()
        state = prefill(*arguments, **options, impl=impl, batch_invariant=fixed)
        assert_within_budget(AttentionState(*(tensor.cpu() for tensor in state)), inputs)
    arguments, options = prefill_inputs(q_lens=(300, 9), device="cuda").call_arguments()
    wrong = torch.tensor([-5, 2**31 - 1, 7], dtype=torch.int32, device="cuda")
    prefill(*arguments, **(options | {"cu_seqlens_q": wrong, "cu_seqlens_k": wrong}), impl=impl)
    torch.cuda.synchronize()
    return len(problems) + 1


def main(name: str) -> int:
    launched: set[str] = set()
    triton.knobs.runtime.launch_enter_hook.add(
        lambda metadata: launched.add(metadata.get()["name"])
    )
    if name == "merge":
        judged = merge_all()
    elif name == "cache":
        judged = cache_all()
    elif name.startswith("prefill-"):
        judged = prefill_all(name.removeprefix("prefill-"))
    else:
        way = next(way for way in WAYS if str(way) == name)
        with forced(way):
            judged = decode_all(way)
    print(f"launched: {' '.join(sorted(launched))}")
    print(f"{judged} problems judged")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
