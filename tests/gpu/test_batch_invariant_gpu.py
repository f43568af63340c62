"""Batch-invariant decode in a CUDA graph on the GPU in this machine: the bits of a request alone.

`tests/properties/test_batch_properties.py` compares batches; here lengths change in place.
"""

from __future__ import annotations

import pytest
import torch
from ways import is_refused, run

import mla_triton
from mla_triton.testing import (
    assert_same_bits,
    assert_within_budget,
    decode_changes,
    decode_inputs,
    plan_of,
)

LENGTHS = (5000, 0, 1, 700, 2048)
LATER = ((1, 0, 1, 700, 2000), (4999, 0, 0, 65, 1025), LENGTHS)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(
    "recipe",
    [{"heads": 16}, {"heads": 128}, {"heads": 16, "stored": "fp8_ds_mla"}],
    ids=str,
)
def test_a_replay_has_the_bits_of_a_request_alone(way, recipe, planned):
    inputs = decode_inputs(kv_lens=LENGTHS, dtype=torch.bfloat16, device="cuda", **recipe)
    if is_refused(inputs, way):
        return
    state = mla_triton.AttentionState(**inputs.output_buffers())

    def step() -> None:
        plan = None
        if planned:
            plan = plan_of(inputs, way.impl, batch_invariant=True, max_kv_len=max(LENGTHS))
        run(inputs, way, batch_invariant=True, plan=plan, out=state.out, lse=state.lse)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in LATER:
        inputs.kv_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for tensor in state:
            tensor.fill_(float("nan"))
        graph.replay()
        assert_within_budget(state, inputs)
        for request in range(len(lengths)):
            alone = run(decode_changes.reordered(inputs, [request]), way, batch_invariant=True)
            assert_same_bits(alone, [tensor[request : request + 1] for tensor in state])
