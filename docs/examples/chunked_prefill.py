"""Prompts in chunks: what came before from the paged latent cache, in two ways.

An engine computes a long prompt in chunks. Each chunk attends to itself and to all before it, whose
latents are in the cache:

* expanded: `mla_triton.prefill` for the chunk's own causal part, then the cached latents, gathered
  and multiplied out to keys and values for every head, some thousand keys at a time, and
  `mla_triton.merge` to join the parts;
* absorbed: `mla_triton.decode` with ragged queries, over the cache as it is.

The whole prompt in one go, in float64, is the truth. One go in the working precision, by the
reference, says what that precision can give; a prompt in chunks may be twice as far from the truth
as that and one rounding of the output.

    python docs/examples/chunked_prefill.py

Uses the GPU in bfloat16 if there is one, else small heads and short prompts on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

import mla_triton
from mla_triton import AttentionState, reference
from mla_triton.reference import absorb_queries, project_values

PAGE_SIZE = 16
WORKSPACE = 2048
"""Cached keys of a request that are expanded at a time: they take many times their latents."""
Span = tuple[int, int]
"""First token of a request, and the one behind its last."""


@dataclass(frozen=True)
class Widths:
    """Of a model's heads. By default DeepSeek-V3's on one of eight GPUs."""

    heads: int = 16
    latent: int = 512
    nope: int = 128
    rope: int = 64
    v: int = 128


SMALL = Widths(heads=2, latent=32, nope=16, rope=16, v=16)


@dataclass(frozen=True)
class Layer:
    """What attention needs of a layer: how its heads expand latents."""

    w_uk: torch.Tensor
    """`[heads, nope, latent]`"""
    w_uv: torch.Tensor
    """`[heads, v, latent]`"""
    scale: float

    @cached_property
    def w_ukv(self) -> torch.Tensor:
        """Both as one, `[heads * (nope + v), latent]`."""
        return torch.cat([self.w_uk, self.w_uv], dim=1).flatten(0, 1)

    def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, latent]` to keys without their rotary part, `[n, heads, nope]`, and values."""
        expanded = (latents @ self.w_ukv.T).unflatten(1, (len(self.w_uk), -1))
        k, v = expanded.split([self.w_uk.shape[1], self.w_uv.shape[1]], dim=-1)
        return k, v


@dataclass(frozen=True)
class Tokens:
    """Some tokens of every prompt, one request's behind another's."""

    q_nope: torch.Tensor
    """`[tokens, heads, nope]`"""
    q_rope: torch.Tensor
    """`[tokens, heads, rope]`, rotated."""
    keys: torch.Tensor
    """`[tokens, latent + rope]`: what goes into the cache, rotated."""

    def take(self, starts: Sequence[int], spans: Sequence[Span]) -> Tokens:
        """Those of some spans, of requests that begin at `starts`."""
        places = [range(start + a, start + b) for start, (a, b) in zip(starts, spans, strict=True)]
        index = torch.tensor([n for place in places for n in place], dtype=torch.long)
        index = index.to(self.keys.device)
        return Tokens(self.q_nope[index], self.q_rope[index], self.keys[index])


class Cache:
    """Pages of keys anywhere in memory, as after some time of serving."""

    def __init__(self, prompts: Sequence[int], like: torch.Tensor) -> None:
        most = -(-max(1, *prompts) // PAGE_SIZE)
        count = len(prompts) * most
        self.pages = like.new_full((2 * count, PAGE_SIZE, like.shape[-1]), float("nan"))
        order = torch.randperm(2 * count)[:count].view(len(prompts), most)
        self.table = order.to(like.device, torch.int32)

    def slots(self, spans: Sequence[Span]) -> torch.Tensor:
        """Those of every token of some spans, a span for each request."""
        found = []
        for request, (begin, end) in enumerate(spans):
            position = torch.arange(begin, end, device=self.table.device)
            page = self.table[request, position // PAGE_SIZE]
            found.append(page * PAGE_SIZE + position % PAGE_SIZE)
        return torch.cat(found)

    def append(self, spans: Sequence[Span], keys: torch.Tensor) -> None:
        """Latents and rotary keys are side by side already: to the cache, they are one."""
        mla_triton.append(self.pages, keys, None, self.slots(spans))

    def gather(self, spans: Sequence[Span]) -> torch.Tensor:
        keys, _ = mla_triton.gather(
            self.pages,
            self.table,
            offsets(spans, self.table.device),
            rows=sum(end - begin for begin, end in spans),
            starts=torch.tensor([b for b, _ in spans], device=self.table.device).int(),
        )
        return keys


def offsets(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """Where each request's tokens begin, and the last one's end."""
    bounds = accumulate((end - begin for begin, end in spans), initial=0)
    return torch.tensor(list(bounds), dtype=torch.int32, device=device)


def expanded(layer: Layer, cache: Cache, chunk: Tokens, spans: Sequence[Span]) -> AttentionState:
    """A chunk's attention by keys and values for every head: out `[tokens, heads, v]` and lse."""
    latent, device = layer.w_uk.shape[-1], chunk.keys.device
    queries = offsets(spans, device)

    def attend(keys: torch.Tensor, places: Sequence[Span], causal: bool) -> AttentionState:
        k, v = layer.expand(keys[:, :latent])
        return mla_triton.prefill(
            chunk.q_nope,
            k,
            v,
            q_rope=chunk.q_rope,
            k_rope=keys[:, latent:],
            cu_seqlens_q=queries,
            cu_seqlens_k=offsets(places, device),
            softmax_scale=layer.scale,
            causal=causal,
        )

    own = attend(chunk.keys, spans, causal=True)
    # Joined in float32, so that many parts cost no more than one rounding, at the end. Parts that
    # are empty for a request, whose prefix is shorter, change nothing of it.
    state = AttentionState(own.out.float(), own.lse)
    for first in range(0, max(begin for begin, _ in spans), WORKSPACE):
        before = [(min(first, begin), min(first + WORKSPACE, begin)) for begin, _ in spans]
        part = attend(cache.gather(before), before, causal=False)
        mla_triton.merge([state, part], out=state.out, lse=state.lse)
    return AttentionState(state.out.to(own.out.dtype), state.lse)


def absorbed(layer: Layer, cache: Cache, chunk: Tokens, spans: Sequence[Span]) -> AttentionState:
    """The same over the latents themselves, the chunk's among them."""
    device = chunk.keys.device
    state = mla_triton.decode(
        absorb_queries(chunk.q_nope, layer.w_uk),
        chunk.q_rope,
        cache.pages,
        cache.table,
        torch.tensor([end for _, end in spans], dtype=torch.int32, device=device),
        softmax_scale=layer.scale,
        cu_seqlens_q=offsets(spans, device),
    )
    return AttentionState(project_values(state.out, layer.w_uv), state.lse)


FORMS: dict[str, Callable[[Layer, Cache, Tokens, Sequence[Span]], AttentionState]] = {
    "expanded": expanded,
    "absorbed": absorbed,
}


def in_chunks(
    form: str, layer: Layer, prompts: Sequence[int], tokens: Tokens, size: int
) -> AttentionState:
    """The prompts' attention, `size` tokens of each at a time; requests that are done have none."""
    starts = list(accumulate(prompts, initial=0))[:-1]
    cache = Cache(prompts, tokens.keys)
    heads, v = layer.w_uv.shape[:2]
    out = tokens.keys.new_full((sum(prompts), heads, v), float("nan"))
    lse = torch.full(out.shape[:-1], float("nan"), device=out.device)
    for spans in chunks(prompts, size):
        chunk = tokens.take(starts, spans)
        cache.append(spans, chunk.keys)
        state = FORMS[form](layer, cache, chunk, spans)
        done = 0
        for start, (begin, end) in zip(starts, spans, strict=True):
            rows, theirs = slice(start + begin, start + end), slice(done, done + end - begin)
            out[rows], lse[rows] = state.out[theirs], state.lse[theirs]
            done = theirs.stop
    return AttentionState(out, lse)


def chunks(prompts: Sequence[int], size: int) -> Iterator[list[Span]]:
    for begin in range(0, max(prompts), size):
        yield [(min(begin, length), min(begin + size, length)) for length in prompts]


# -- what it is held against


def in_one_go(form: str, layer: Layer, tokens: Tokens) -> AttentionState:
    """One whole prompt by the reference, with the roundings of the working precision.

    Where there are fewer queries than keys, they are the prompt's last.
    """
    latent, count = layer.w_uk.shape[-1], len(tokens.keys)
    queries, whole = (torch.tensor([0, n]) for n in (len(tokens.q_nope), count))
    if form == "expanded":
        k, v = layer.expand(tokens.keys[:, :latent])
        return reference.prefill_same_precision(
            tokens.q_nope,
            k,
            v,
            q_rope=tokens.q_rope,
            k_rope=tokens.keys[:, latent:],
            cu_seqlens_q=queries,
            cu_seqlens_k=whole,
            softmax_scale=layer.scale,
        )
    state = reference.decode_same_precision(
        absorb_queries(tokens.q_nope, layer.w_uk),
        tokens.q_rope,
        tokens.keys[None],
        torch.zeros(1, 1, dtype=torch.int32, device=tokens.keys.device),
        torch.tensor([count]),
        softmax_scale=layer.scale,
        cu_seqlens_q=queries,
    )
    return AttentionState(project_values(state.out, layer.w_uv), state.lse)


@dataclass(frozen=True)
class Report:
    """How far one prompt's result is from the truth, and how far it may be."""

    tokens: int
    error: float
    """Largest of an element of the output."""
    budget: float
    rms: float
    """Root mean square of the output's errors."""
    rms_budget: float
    lse_error: float
    lse_budget: float

    @property
    def ok(self) -> bool:
        # A NaN is in no budget.
        return (
            self.error <= self.budget
            and self.rms <= self.rms_budget
            and self.lse_error <= self.lse_budget
        )


def judge(form: str, layer: Layer, tokens: Tokens, state: AttentionState) -> Report:
    """Holds the attention of one prompt against its truth."""
    latent = layer.w_uk.shape[-1]
    exact = reference.attention(
        tokens.q_nope,
        tokens.q_rope,
        tokens.keys[:, :latent],
        tokens.keys[:, latent:],
        layer.w_uk,
        layer.w_uv,
        softmax_scale=layer.scale,
    )
    same = in_one_go(form, layer, tokens)

    def largest(one: torch.Tensor) -> float:
        return (one.double() - exact.out).abs().amax().item()

    def rms(one: torch.Tensor) -> float:
        return (one.double() - exact.out).square().mean().sqrt().item()

    unit = torch.finfo(tokens.keys.dtype).eps / 2
    size = exact.out.abs().amax().item(), exact.out.square().mean().sqrt().item()
    lse_unit = torch.finfo(torch.float32).eps / 2 * exact.lse.abs().amax().item()
    lse_errors = [(one.lse.double() - exact.lse).abs().amax().item() for one in (state, same)]
    return Report(
        len(tokens.q_nope),
        largest(state.out),
        2 * (largest(same.out) + unit * size[0]),
        rms(state.out),
        # Spread evenly, the mean square of a rounding is a third of the square of the largest.
        2 * (rms(same.out) + unit / 3**0.5 * size[1]),
        lse_errors[0],
        2 * (lse_errors[1] + lse_unit),
    )


def make(
    prompts: Sequence[int], widths: Widths, dtype: torch.dtype, device: torch.device
) -> tuple[Layer, Tokens]:
    """Random weights that keep the variance, and random tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype)

    heads, latent, count = widths.heads, widths.latent, sum(prompts)
    layer = Layer(
        normal(heads, widths.nope, latent, std=latent**-0.5),
        normal(heads, widths.v, latent, std=latent**-0.5),
        (widths.nope + widths.rope) ** -0.5,
    )
    query = normal(count, heads, widths.nope + widths.rope)
    q_nope, q_rope = query.split([widths.nope, widths.rope], dim=-1)
    return layer, Tokens(q_nope, q_rope, normal(count, latent + widths.rope))


@torch.no_grad()
def run(
    form: str,
    size: int,
    prompts: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    widths: Widths | None = None,
) -> list[Report]:
    """Computes prompts of these lengths in chunks of `size` tokens; a report for each of them."""
    device = torch.device(device)
    if widths is None:
        widths = SMALL if device.type == "cpu" else Widths()
    layer, tokens = make(prompts, widths, dtype, device)
    state = in_chunks(form, layer, prompts, tokens, size)
    starts = list(accumulate(prompts, initial=0))
    reports = []
    for start, length in zip(starts, prompts, strict=False):
        if length:
            rows = slice(start, start + length)
            theirs = Tokens(tokens.q_nope[rows], tokens.q_rope[rows], tokens.keys[rows])
            part = AttentionState(state.out[rows], state.lse[rows])
            reports.append(judge(form, layer, theirs, part))
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--chunks", type=int, nargs="+", help="tokens of a chunk")
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens of each prompt")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device != "cpu"
    prompts = options.prompts or ([9000, 4096, 300] if on_gpu else [70, 33])
    all_ok = True
    print(f"{'form':<9} {'chunk':>6} {'prompt':>6} {'error':>9} {'budget':>9}  rms: ", end="")
    print(f"{'error':>9} {'budget':>9}")
    for size in options.chunks or ([512, 4096] if on_gpu else [7, 32]):
        for form in FORMS:
            for report in run(form, size, prompts, device):
                all_ok &= report.ok
                print(
                    f"{form:<9} {size:6} {report.tokens:6} {report.error:9.2e} "
                    f"{report.budget:9.2e}       {report.rms:9.2e} {report.rms_budget:9.2e}"
                    f"{'' if report.ok else '  too far'}"
                )
    return 0 if all_ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
