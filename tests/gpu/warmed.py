"""A process that warms up for the GPU in this machine, or one that serves afterwards.

    python warmed.py warm     prints JSON: what was warmed up, and the kernels that were launched
    python warmed.py serve    prints JSON: kernels found and compiled, launchers built, by calls of
                              the deployment; and what a call outside of it compiles
    python warmed.py tune     tunes a point and makes judged calls of it; prints JSON: what was
                              kept, the row that is there then, kernels that were compiled

Triton's cache is the one that the environment names, so that the two processes share it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
import triton

import mla_triton
from mla_triton import configs
from mla_triton import device as devices
from mla_triton.testing import assert_within_budget, decode_inputs, prefill_inputs
from mla_triton.testing.problems import DecodeInputs

DEPLOYMENT = {
    "heads": 16, "s_q": [1, 2], "page_size": 64, "max_batch": 40, "max_len": 4096,
    "prefill_tokens": 4096,
}  # fmt: skip
PROMPTS = ([300], [3000, 7], [5, 40, 0, 1])
KV_LENS = ([300], [4000], [100, 0], [1, 64, 65, 700, 2048], [30 * n for n in range(33)])


def warm() -> dict[str, Any]:
    launched: list[str] = []
    triton.knobs.runtime.launch_enter_hook.add(
        lambda metadata: launched.append(metadata.get()["name"])
    )
    warmed = mla_triton.warmup(**DEPLOYMENT)
    torch.cuda.synchronize()
    return asdict(warmed) | {"launched": launched}


def laid_out(inputs: DecodeInputs, how: str) -> DecodeInputs:
    """The same queries, lying in memory as an engine leaves them."""
    q_nope, q_rope = inputs.q_nope, inputs.q_rope
    if how == "joined":
        q_nope, q_rope = torch.cat([q_nope, q_rope], -1).split([512, 64], -1)
    elif how == "head_major":
        rows = q_nope.flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1)
        q_nope = rows.unflatten(0, q_nope.shape[:2])
        # Behind what was absorbed, in the output of one projection.
        q_rope = torch.cat([torch.zeros_like(q_nope[..., :128]), q_rope], -1)[..., 128:]
    return replace(inputs, q_nope=q_nope, q_rope=q_rope)


def decode(inputs: DecodeInputs, planned: bool = False) -> None:
    arguments, options = inputs.call_arguments()
    plan = None
    if planned:
        _, s_q, heads, _ = inputs.q_nope.shape
        plan = mla_triton.plan(inputs.kv_lens, heads=heads, s_q=s_q, dtype=inputs.q_nope.dtype)
    state = mla_triton.decode(*arguments, **options, plan=plan)
    torch.cuda.synchronize()
    assert_within_budget(state, inputs)


def prefill(lens: list[int], causal: bool, split_q: bool) -> None:
    """A prefill, and the merge of what it leaves with itself."""
    inputs = prefill_inputs(
        q_lens=lens, heads=16, split_k=True, split_q=split_q, causal=causal, device="cuda"
    )
    arguments, options = inputs.call_arguments()
    state = mla_triton.prefill(*arguments, **options)
    torch.cuda.synchronize()
    assert_within_budget(state, inputs)
    twice = mla_triton.merge([state, state])
    assert torch.equal(twice.out, state.out)


def serve() -> dict[str, Any]:
    found: list[str] = []
    compiled: list[str] = []
    built: list[str] = []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        (found if cache_hit else compiled).append(metadata["name"])

    def refuse(name: str, *_: Any) -> str:
        built.append(name)
        raise RuntimeError(f"{name} is built, though everything was to be there")

    triton.knobs.compilation.listener = listen
    triton.knobs.build.impl = refuse
    calls = 0
    for kv_lens in KV_LENS:
        for s_q in DEPLOYMENT["s_q"]:
            inputs = decode_inputs(kv_lens=kv_lens, s_q=s_q, heads=16, device="cuda")
            for how in ("split", "joined", "head_major"):
                for planned in (False, True):
                    decode(laid_out(inputs, how), planned)
                    calls += 1
    for lens in PROMPTS:
        for causal in (True, False):
            for split_q in (True, False):
                prefill(lens, causal, split_q)
                calls += 1
    served = {"calls": calls, "found": list(found), "compiled": list(compiled), "built": built}
    triton.knobs.build.impl = None
    decode(decode_inputs(kv_lens=[300], page_size=16, heads=16, device="cuda"))
    return served | {"outside": compiled[len(served["compiled"]) :]}


def tune() -> dict[str, Any]:
    compiled: list[str] = []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append(metadata["name"])

    triton.knobs.compilation.listener = listen
    tuned = mla_triton.tune(heads=16, batches=[1], lengths=[512], quiet=True)
    for kv_lens in ([512], [300], [512, 70, 0, 2000]):
        decode(decode_inputs(kv_lens=kv_lens, heads=16, device="cuda"))
    prefill([300, 7], True, True)
    (row,) = configs.store.read(devices.current()).rows
    return {
        "failed": len(tuned.failed), "kept": [outcome.row.config for outcome in tuned.outcomes],
        "skipped": tuned.skipped, "row": row.config, "compiled": compiled,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"warm": warm, "serve": serve, "tune": tune}[sys.argv[1]]()))
