"""An attention layer of DeepSeek-V3, served: its weights and latents through `mla_triton.decode`.

Builds transformers' own layer with random weights and the real head dimensions, lets it read whole
sequences, and computes them again as an engine does: latents in a paged cache, queries absorbed,
first a prompt, then single tokens, then several at once.

The layer in float64 is the truth. The layer in the working precision says what that precision can
give, and the engine may be twice as far from the truth as that and one rounding of the output.

    python docs/examples/deepseek_v3_attention.py

Needs transformers. Uses the GPU in bfloat16 if there is one, else the CPU in float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

import mla_triton
from mla_triton.reference import absorb_queries, project_values

BATCH = 2
PAGE_SIZE = 16


@dataclass(frozen=True)
class Step:
    """One call: its tokens, over the batch, against the layer."""

    tokens: range
    error: float
    """Largest of an element of the output."""
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


def make_layer(dtype: torch.dtype, device: torch.device) -> deepseek.DeepseekV3Attention:
    """A layer of 16 heads whose weights keep the variance: its attention is far from uniform."""
    config = DeepseekV3Config(
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=163840,
        rope_scaling={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        attn_implementation="eager",
    )
    layer = deepseek.DeepseekV3Attention(config, layer_idx=0)
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return layer.to(device, dtype).eval()


def in_float64(layer: deepseek.DeepseekV3Attention) -> deepseek.DeepseekV3Attention:
    """The same layer, without the steps that it takes in float32 whatever its dtype."""
    exact = copy.deepcopy(layer).double()
    exact.config._attn_implementation = "sdpa"
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(layer, name)
        twin = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
        twin.weight = torch.nn.Parameter(norm.weight.double())
        setattr(exact, name, twin)
    return exact


def layer_output(
    layer: deepseek.DeepseekV3Attention,
    hidden: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What the layer itself makes of whole sequences `[batch, tokens, hidden]`."""
    tokens = hidden.shape[1]
    mask = torch.full((tokens, tokens), float("-inf"), device=hidden.device).triu(1)
    cos, sin = (part.to(hidden.dtype) for part in rotation)
    return layer(hidden, (cos, sin), mask.to(hidden.dtype)[None, None])[0]


class Engine:
    """What an inference engine does with the layer: fold its weights, then append and attend."""

    def __init__(
        self, layer: deepseek.DeepseekV3Attention, max_tokens: int, decode: Callable[..., Any]
    ) -> None:
        self.layer, self.decode = layer, decode
        weight = layer.kv_b_proj.weight
        self.rank, self.nope = layer.kv_lora_rank, layer.qk_nope_head_dim
        per_head = weight.view(layer.num_heads, self.nope + layer.v_head_dim, self.rank)
        self.w_uk, self.w_uv = per_head.split([self.nope, layer.v_head_dim], dim=1)

        # Every request has its pages anywhere in the cache, as after some time of serving.
        pages = -(-max_tokens // PAGE_SIZE)
        width = self.rank + layer.qk_rope_head_dim
        self.cache = weight.new_full((2 * BATCH * pages, PAGE_SIZE, width), float("nan"))
        order = torch.randperm(len(self.cache), device=weight.device)
        self.page_table = order[: BATCH * pages].view(BATCH, pages).to(torch.int32)
        self.kv_lens = torch.zeros(BATCH, dtype=torch.int32, device=weight.device)
        self.length = 0

    def rotate(self, q: torch.Tensor, k: torch.Tensor, rotation: Any) -> Any:
        interleaved = self.layer.config.rope_interleave
        name = "apply_rotary_pos_emb_interleave" if interleaved else "apply_rotary_pos_emb"
        return getattr(deepseek, name)(q, k, *rotation, unsqueeze_dim=2)

    def step(self, hidden: torch.Tensor, rotation: Any) -> torch.Tensor:
        """Appends the tokens `[batch, s_q, hidden]` to the cache and returns the layer's output."""
        layer, (batch, s_q) = self.layer, hidden.shape[:2]
        query = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(hidden)))
        query = query.view(batch, s_q, layer.num_heads, layer.qk_head_dim)
        q_nope, q_rope = query.split([self.nope, layer.qk_rope_head_dim], dim=-1)
        c_kv, k_pe = layer.kv_a_proj_with_mqa(hidden).split(
            [self.rank, layer.qk_rope_head_dim], dim=-1
        )
        q_rope, k_pe = self.rotate(q_rope, k_pe[:, :, None], rotation)
        self.append(torch.cat([layer.kv_a_layernorm(c_kv), k_pe[:, :, 0]], dim=-1))

        state = self.decode(
            absorb_queries(q_nope, self.w_uk),
            q_rope,
            self.cache,
            self.page_table,
            self.kv_lens,
            softmax_scale=layer.scaling,
        )
        values = project_values(state.out.to(hidden.dtype), self.w_uv)
        return layer.o_proj(values.flatten(-2))

    def append(self, latents: torch.Tensor) -> None:
        position = torch.arange(self.length, self.length + latents.shape[1], device=latents.device)
        pages = self.page_table[:, position // PAGE_SIZE].long()
        self.cache[pages, position % PAGE_SIZE] = latents
        self.length += latents.shape[1]
        self.kv_lens.fill_(self.length)


@torch.no_grad()
def run(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    prompt: int = 37,
    single: int = 4,
    together: int = 4,
    decode: Callable[..., Any] | None = None,
) -> list[Step]:
    """Serves `prompt` tokens in one call, `single` ones one by one, `together` in one call."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    layer, tokens = make_layer(dtype, device), prompt + single + together
    hidden = torch.randn(BATCH, tokens, layer.hidden_size).to(device, dtype)
    positions = torch.arange(tokens, device=device)[None].expand(BATCH, -1)
    rotation = deepseek.DeepseekV3RotaryEmbedding(layer.config).to(device)(hidden, positions)

    exact = layer_output(in_float64(layer), hidden.double(), rotation)
    same = layer_output(layer, hidden, rotation)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().amax()
    budget = 2 * ((same - exact).abs().amax() + rounding).item()

    engine = Engine(layer, tokens, decode or mla_triton.decode)
    cuts = [0, prompt, *range(prompt + 1, prompt + single + 1), tokens]
    steps = []
    for begin, end in pairwise(cuts):
        now = slice(begin, end)
        got = engine.step(hidden[:, now], tuple(part[:, now] for part in rotation))
        error = (got - exact[:, now]).abs().amax().item()
        steps.append(Step(range(begin, end), error, budget))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    options = parser.parse_args()
    steps = run(options.device, options.dtype and getattr(torch, options.dtype))
    print(f"{'tokens':>8}  {'error':>9}  {'budget':>9}")
    for step in steps:
        name = f"{step.tokens.start}..{step.tokens.stop - 1}"
        verdict = "" if step.ok else "  too far"
        print(f"{name:>8}  {step.error:9.2e}  {step.budget:9.2e}{verdict}")
    return 0 if all(step.ok for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
