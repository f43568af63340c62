"""An attention layer of DeepSeek-V3 computes the same through `mla_triton.decode` as by itself."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import examples
import pytest
import torch

import mla_triton
from mla_triton import reference
from mla_triton.state import AttentionState


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return examples.load("deepseek_v3_attention")


def test_kernels_reproduce_the_layer(example: ModuleType, device: torch.device) -> None:
    steps = example.run(device)
    assert [len(step.tokens) for step in steps] == [37, 1, 1, 1, 1, 4]
    assert all(step.ok for step in steps), steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_reproduces_the_layer(example: ModuleType, dtype: torch.dtype) -> None:
    for decode in (reference.decode, reference.decode_same_precision):
        steps = example.run("cpu", dtype, decode=decode)
        assert all(step.ok for step in steps), steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softmax_scale", (512 + 64) ** -0.5),
        ("softmax_scale", (128 + 64) ** -0.5),
        ("causal", False),
    ],
    ids=["scale of absorbed shapes", "scale without mscale", "not causal"],
)
def test_the_layer_tells_right_from_wrong(example: ModuleType, name: str, value: Any) -> None:
    def decode(*arguments: Any, **options: Any) -> AttentionState:
        return reference.decode(*arguments, **{**options, name: value})

    steps = example.run("cpu", torch.bfloat16, decode=decode)
    wrong = [step for step in steps if name != "causal" or len(step.tokens) > 1]
    assert not any(step.ok for step in wrong), steps


def test_pages_hold_what_the_layer_caches(example: ModuleType) -> None:
    from transformers import DynamicCache

    torch.manual_seed(0)
    layer, tokens = example.make_layer(torch.float32, torch.device("cpu")), 20
    hidden = torch.randn(example.BATCH, tokens, layer.hidden_size)
    positions = torch.arange(tokens)[None].expand(example.BATCH, -1)
    rotation = example.deepseek.DeepseekV3RotaryEmbedding(layer.config)(hidden, positions)
    cache = DynamicCache(config=layer.config)
    engine = example.Engine(layer, tokens, reference.decode)
    with torch.no_grad():
        layer(hidden, rotation, None, past_key_values=cache)
        engine.step(hidden, rotation)
    c_kv, k_pe = cache.layers[0].keys, cache.layers[0].values
    for request in range(example.BATCH):
        kept = reference.gather_keys(engine.cache, engine.page_table, request, tokens)
        assert torch.equal(kept, torch.cat([c_kv, k_pe], dim=-1)[request, 0])


def test_the_script_prints_and_exits(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["deepseek_v3_attention.py", "--device", "cpu", "--dtype", "bfloat16"]
    )
    monkeypatch.setattr(mla_triton, "decode", reference.decode)
    assert example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "tokens", "0..36", "37..37", "38..38", "39..39", "40..40", "41..44"
    ]  # fmt: skip
    monkeypatch.setattr(mla_triton, "decode", partial(reference.decode, max_kv_len=40))
    assert example.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("too far") for line in lines] == [False] * 5 + [True] * 2
