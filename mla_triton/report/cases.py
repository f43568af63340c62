"""The problems of a report: the shapes of real models, and each thing that a call may have besides.

A case is the arguments of a factory of `mla_triton.testing`: a line of Python makes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mla_triton import check, check_cache
from mla_triton.testing import decode_inputs, merge_inputs, prefill_inputs
from mla_triton.testing.budget import Inputs
from mla_triton.testing.cache_results import CacheInputs
from mla_triton.testing.caches import FORMS
from mla_triton.testing.problems import SERVED

FACTORIES: dict[str, Callable[..., Inputs | CacheInputs]] = {
    "decode": decode_inputs,
    "prefill": prefill_inputs,
    "merge": merge_inputs,
    **check_cache.FACTORIES,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = DTYPES[:2]


class Size(NamedTuple):
    """How large the problems are that no model gives a size."""

    kv_lens: tuple[int, ...]
    parts: tuple[int, ...]
    """Into how many a batch is cut where that is what is tried."""
    heads: int
    other_heads: tuple[int, ...]
    page_sizes: tuple[int, ...]
    s_q: tuple[int, ...]
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    """Of prefills."""
    tokens: int
    """Of merges."""
    cached: int
    """Tokens of appends and gathers."""


ON_GPU = Size(
    kv_lens=(9000, 2048, 777, 130, 65, 64, 63, 1, 0),
    parts=(1, 3, 132, 1000),
    heads=16,
    other_heads=(1, 2, 3, 5, 20, 33, 128),
    page_sizes=(1, 16, 32, 48, 128),
    s_q=(2, 3, 8),
    q_lens=(300, 129, 0, 3, 64, 7),
    k_lens=(300, 700, 64, 0, 65, 5),
    tokens=300,
    cached=2000,
)
INTERPRETED = Size(
    kv_lens=(97, 64, 1, 0),
    parts=(1, 9),
    heads=4,
    other_heads=(1, 5, 33),
    page_sizes=(1, 16, 48),
    s_q=(3,),
    q_lens=(33, 5, 0, 3, 7),
    k_lens=(33, 40, 4, 0, 5),
    tokens=5,
    cached=20,
)


@dataclass(frozen=True)
class Case:
    """One problem."""

    operation: str
    """A key of `FACTORIES`."""
    shape: str
    call: str
    """What is special about it."""
    options: Mapping[str, Any]
    """Arguments of the factory but for the device."""
    parts: tuple[int | None, ...] = (None,)
    """Into how many parts a decode is cut, one after another; None for what fills the device."""

    @property
    def dtype(self) -> str:
        return str(self.options["dtype"]).removeprefix("torch.")

    @property
    def label(self) -> str:
        """What `--only` looks in."""
        return f"{self.operation} {self.shape} {self.dtype} {self.call}"

    def inputs(self, device: torch.device) -> Inputs | CacheInputs:
        return FACTORIES[self.operation](**self.options, device=device)

    def code(self, device: torch.device) -> str:
        """The expression that makes the inputs."""
        words = [f"{name}={value!r}" for name, value in self.options.items()]
        factory = FACTORIES[self.operation].__name__
        return f"{factory}({', '.join(words)}, device='{device.type}')"


def cases(on_gpu: bool, seed: int = 0) -> list[Case]:
    """All problems, with values drawn from `seed`."""
    size = ON_GPU if on_gpu else INTERPRETED
    made = [*_models(on_gpu), *_decodes(size), *_prefills(size), *_merges(size)]
    made += [*_appends(size), *_gathers(size), *_copies()]
    return [
        Case(operation, shape, call, {**options, "seed": seed}, parts)
        for operation, shape, call, options, parts in made
    ]


Row = tuple[str, str, str, dict[str, Any], tuple[int | None, ...]]
"""The fields of a case."""
WHOLE: tuple[int | None, ...] = (None,)


def _models(on_gpu: bool) -> Iterator[Row]:
    """Those of `mla-triton check`."""
    kv_lens = check.LONG if on_gpu else check.SHORT
    for case in check.cases(on_gpu):
        yield "decode", case.shape, case.call, case.recipe(kv_lens), WHOLE
    for prefill in check.prefills(on_gpu):
        yield "prefill", prefill.shape, prefill.call, prefill.recipe(), WHOLE
    for merge in check.merges(on_gpu):
        yield "merge", merge.shape, merge.call, merge.recipe(), WHOLE
    for cached in check_cache.caches(on_gpu):
        # The operation stands before it.
        shape = cached.shape.removeprefix(f"{cached.operation} ")
        yield cached.operation, shape, cached.call, cached.recipe(), WHOLE


def _decodes(size: Size) -> Iterator[Row]:
    def row(
        call: str, dtype: torch.dtype, parts: tuple[int | None, ...] = WHOLE, **changes: Any
    ) -> Row:
        options = {"kv_lens": list(size.kv_lens), "heads": size.heads, "latent": 512, "rope": 64}
        options |= {"dtype": dtype, **changes}
        shape = f"h{options['heads']} {options['latent']}+{options['rope']}"
        return "decode", shape, call, options, parts

    batch = len(size.kv_lens)
    bfloat16, float16, float32 = DTYPES
    for dtype in DTYPES:
        yield row("splits", dtype, parts=size.parts)
        yield row("layout pair", dtype, layout="pair")
        yield row("logits large", dtype, logits="large")
    yield row("logits equal_keys", bfloat16, logits="equal_keys")
    yield row("logits equal_keys", float32, logits="equal_keys")
    yield row("logits dominant_key", bfloat16, logits="dominant_key")

    for stored, dtypes in SERVED.items():
        inside: dict[str, Any] = (
            {"latent": 448, "value_dim": 512} if stored in ("fp8_v4", "fp8_v41") else {}
        )
        for dtype in dtypes:
            yield row(stored, dtype, stored=stored, **inside)
    yield row("fp8, pair", bfloat16, stored="fp8", layout="pair")
    yield row("fp8, splits", bfloat16, parts=size.parts, stored="fp8")
    yield row("fp8_ds_mla, splits, s_q 2", bfloat16, size.parts, stored="fp8_ds_mla", s_q=2)

    # Several query tokens a request, more of them than some requests have keys.
    for s_q in size.s_q:
        yield row(f"s_q {s_q}", bfloat16, s_q=s_q)
    yield row("s_q 2, splits", float16, parts=size.parts, s_q=2)
    yield row("s_q 2, not causal", float16, s_q=2, causal=False)
    ragged = [(0, 3, 1, 4, 2)[n % 5] for n in range(batch)]
    yield row("ragged", bfloat16, q_lens=ragged)
    yield row("ragged, splits", float16, parts=size.parts, q_lens=ragged)
    yield row("ragged, csr, not causal", float16, q_lens=ragged, table="csr", causal=False)
    yield row("ragged, fp8", bfloat16, q_lens=ragged, stored="fp8")

    yield row("no keys at all", bfloat16, kv_lens=[0, 0, 0])
    yield row("no queries at all", bfloat16, q_lens=[0] * batch)
    yield row("one request", bfloat16, kv_lens=[size.kv_lens[0]])
    yield row("one key each", float16, kv_lens=[1] * batch)

    for page_size in size.page_sizes:
        yield row(f"page {page_size}", bfloat16, page_size=page_size)
    yield row("csr, page 16", float16, page_size=16, table="csr")
    yield row("fp8, page 1", bfloat16, page_size=1, stored="fp8")
    for strided, call in ((True, "strided"), (1, "misaligned")):
        yield row(call, bfloat16, strided=strided)
        yield row(f"{call}, s_q 2", float16, strided=strided, s_q=2)

    for heads in size.other_heads:
        yield row("heads", bfloat16, heads=heads, kv_lens=[size.kv_lens[0], 1, 0])
    widths: tuple[tuple[int, int], ...] = ((512, 0), (256, 64), (256, 32), (128, 32))
    for latent, rope in widths:
        yield row("widths", bfloat16, latent=latent, rope=rope)
        yield row("widths", float32, latent=latent, rope=rope)
    for dtype in DTYPES:
        yield row("rope in value", dtype, latent=448, value_dim=512)


def _prefills(size: Size) -> Iterator[Row]:
    def row(call: str, dtype: torch.dtype, **changes: Any) -> Row:
        options = {"q_lens": list(size.q_lens), "k_lens": list(size.k_lens), "heads": 4}
        options |= {"qk": 192, "v_dim": 128, "rope": 64, "dtype": dtype, **changes}
        shape = f"h{options['heads']} {options['qk']}, {options['v_dim']}"
        return "prefill", shape, call, options, WHOLE

    bfloat16, float16, float32 = DTYPES
    for dtype in DTYPES:
        yield row("causal", dtype)
        yield row("full, rope apart", dtype, causal=False, split_k=True, split_q=True)
    yield row("logits large", bfloat16, logits="large")
    yield row("logits large", float32, logits="large")
    yield row("logits equal_keys", float16, logits="equal_keys")
    yield row("values alike", bfloat16, constant_values=True)
    yield row("strided", bfloat16, strided=True, split_k=True)
    yield row("misaligned", float16, strided=1)
    yield row("kv heads 2", bfloat16, kv_heads=2)
    yield row("kv heads 1", float16, kv_heads=1)
    yield row("no keys at all", bfloat16, q_lens=[5, 33], k_lens=[0, 0])
    yield row("no queries at all", bfloat16, q_lens=[0, 0], k_lens=[5, 33])
    yield row("more queries than keys", float16, q_lens=[70, 40], k_lens=[33, 1])
    for qk, v_dim, rope in ((256, 256, 64), (128, 128, 64), (96, 64, 32)):
        for dtype in HALF:
            yield row("widths", dtype, qk=qk, v_dim=v_dim, rope=rope, split_k=True)


def _merges(size: Size) -> Iterator[Row]:
    def row(call: str, dtype: torch.dtype, **changes: Any) -> Row:
        options = {"states": 3, "tokens": (size.tokens,), "heads": 8, "value_dim": 512}
        options |= {"dtype": dtype, **changes}
        return "merge", f"h{options['heads']} {options['value_dim']}", call, options, WHOLE

    bfloat16, float16, float32 = DTYPES
    for dtype in DTYPES:
        yield row("3 states", dtype)
        yield row("2 states, far apart", dtype, states=2, spread="far")
    yield row("8 states", bfloat16, states=8)
    yield row("11 in a stack", float16, states=11, stacked=True)
    yield row("equal states", float32, spread="equal")
    yield row("lse about 900", float32, level=900.0)
    yield row("float32 first", bfloat16, first_dtype=float32)
    yield row("float32 result", bfloat16, out_dtype=float32)
    yield row("with a mask", bfloat16, masked=True)
    yield row("all empty", bfloat16, empty=1.0)
    yield row("strided", bfloat16, strided=True)
    yield row("7 columns", float16, value_dim=7)


def _appends(size: Size) -> Iterator[Row]:
    def row(call: str, form: str, **changes: Any) -> Row:
        tokens = changes.get("tokens", size.cached)
        options = {"form": form, "tokens": tokens, "pages": tokens // 16 + 3}
        options |= {"dtype": torch.bfloat16, **changes}
        return "append", f"t{tokens} {form}", call, options, WHOLE

    bfloat16, float16, float32 = DTYPES
    for form in FORMS:
        yield row("norm, rope interleaved", form, norm=bfloat16, rotation="interleaved")
        yield row("norm, rope half", form, norm=float32, rotation="half", angles=bfloat16)
        yield row("plain", form, dtype=float16, cache_dtype=bfloat16)
        yield row("plain", form, dtype=float32, cache_dtype=float32)
    for form in ("pair", "one", "fp8_ds_mla", "fp8_v41"):
        yield row("norm", form, norm=bfloat16)
        yield row("rope half", form, rotation="half")
        yield row("norm, rope half", form, dtype=float16, norm=float16, rotation="half")
    for form in ("groups", "fp8_ds_mla"):
        yield row("any float32 scales", form, power_of_two=False)
        yield row("norm, any float32 scales", form, power_of_two=False, norm=bfloat16)
    for form in ("fused", "one pair", "groups"):
        yield row("strided", form, strided=True)
        yield row("misaligned", form, strided=1, norm=bfloat16, rotation="interleaved")
    for form in ("fused", "one", "fp8_v4"):
        yield row("large numbers", form, scale=1000.0)
        yield row("one token, int32 slots", form, tokens=1, slot_dtype=torch.int32)
        yield row("no tokens", form, tokens=0)
    for form in ("pair", "fp8_v4"):
        yield row("page 1", form, page_size=1, pages=size.cached + 3)
        yield row("page 48", form, page_size=48)


def _gathers(size: Size) -> Iterator[Row]:
    lengths = (size.cached // 2, 0, size.cached // 3, 1)

    def row(call: str, form: str, dtype: torch.dtype, **changes: Any) -> Row:
        options = {"form": form, "lengths": lengths, "page_size": 16, "dtype": dtype, **changes}
        return "gather", f"t{sum(options['lengths'])} {form}", call, options, WHOLE

    bfloat16, float16, float32 = DTYPES
    for form in FORMS:
        yield row("in float32", form, float32)
    for form in ("pair", "one", "fp8_ds_mla", "fp8_v4"):
        yield row("csr, later keys", form, bfloat16, csr=True, starts=(3, 0, 16, 1))
        yield row("in float16", form, float16)
        yield row("page 1", form, bfloat16, page_size=1)
    for form in ("fused", "groups"):
        yield row("strided", form, bfloat16, strided=8)
        yield row("misaligned", form, float16, strided=1)
    yield row("no keys at all", "fp8_v41", bfloat16, lengths=(0, 0))


def _copies() -> Iterator[Row]:
    def row(call: str, form: str, **changes: Any) -> Row:
        options = {"form": form, "pages": 8, "page_size": 16, "dtype": torch.bfloat16, **changes}
        return "copy_pages", f"p{options['pages']} {form}", call, options, WHOLE

    for form in FORMS:
        yield row("to another cache", form, apart=True)
    for form in ("pair", "fp8_v4"):
        yield row("page 1, int32 numbers", form, page_size=1, page_dtype=torch.int32)
    yield row("one page", "fused", pages=1, apart=True)
