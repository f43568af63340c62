"""Writes the table of docs/cache.md that says what each format costs in accuracy.

    python docs/generate_cache_accuracy.py            computes it and writes it into the page
    python docs/generate_cache_accuracy.py --check    exits with 1 if the page says something else

Attention in float64 over latents as they are, and over the same as a format gives them back.
Needs no GPU; takes some seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mla_triton import reference
from mla_triton.cache import FP8_DS_MLA, FP8_V4, FP8_V41, CacheFormat, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import E4M3_MAX, dequantise, quantise

PAGE = Path(__file__).parent / "cache.md"
BEGIN, END = "<!-- accuracy of formats -->\n", "<!-- end of accuracy -->\n"
REQUESTS, HEADS, KEYS, KEY_DIM, ROPE = 4, 16, 1024, 576, 64
SEED = 0
OUTLIERS, FACTOR = 8, 30.0
"""Columns of latents that are so many times as large as the others."""
SCALE = 192**-0.5


class Form(NamedTuple):
    """A cache, by a line of the table."""

    text: str
    latent: int
    inside: bool
    """Whether the rotary key is in the value."""
    made: str | torch.dtype | CacheFormat


FORMS = (
    Form("bfloat16", 512, False, torch.bfloat16),
    Form("float16", 512, False, torch.float16),
    Form("e4m3, one scale for all latents and one for all keys", 512, False, "one"),
    Form("e4m3 by groups of 128 columns, float32 scales, keys bfloat16", 512, False, "groups"),
    Form("`FP8_DS_MLA`, scales powers of two", 512, False, FP8_DS_MLA),
    Form("`FP8_V4`", 448, True, FP8_V4),
    Form("`FP8_V41`", 448, True, FP8_V41),
)


def like(form: Form, latent: torch.Tensor, rope: torch.Tensor) -> LatentCache:
    """A token's tensors in a format; of a cache with two scales, those of the largest numbers."""
    made, width = form.made, latent.shape[-1]
    if isinstance(made, torch.dtype):
        return LatentCache(torch.empty(1, width, dtype=made), torch.empty(1, ROPE, dtype=made))
    if isinstance(made, CacheFormat):
        return made.views(torch.zeros(1, made.page_bytes(1), dtype=torch.uint8), 1)
    if made == "one":
        scales = torch.stack([latent.abs().amax(), rope.abs().amax()]) / E4M3_MAX
        return LatentCache(torch.empty(1, width).to(E4M3), torch.empty(1, ROPE).to(E4M3), scales)
    return LatentCache(
        torch.empty(1, width).to(E4M3), torch.empty(1, ROPE).bfloat16(), torch.ones(1, 1, 4)
    )


def output(query: torch.Tensor, keys: torch.Tensor, latent: int, inside: bool) -> torch.Tensor:
    """Float64 attention, `[requests, heads, value]`; every request is a page of its own."""
    table = torch.arange(REQUESTS, dtype=torch.int32)[:, None]
    lengths = torch.full((REQUESTS,), keys.shape[1], dtype=torch.int32)
    state = reference.decode(
        query[..., :latent], query[..., latent:], keys, table, lengths, softmax_scale=SCALE,
        value_dim=keys.shape[-1] if inside else None,
    )  # fmt: skip
    return state.out[:, 0]


def errors(form: Form) -> tuple[float, float, float]:
    """Relative errors of the output: N(0,1) latents; latents with columns of outliers, all columns
    of the output, and those without outliers."""
    generator = torch.Generator().manual_seed(SEED)
    columns = form.latent + ROPE
    query = torch.randn(REQUESTS, 1, HEADS, columns, generator=generator).double()
    values = torch.randn(REQUESTS, KEYS, columns, generator=generator)
    large = torch.randperm(form.latent, generator=generator)[:OUTLIERS]
    found = []
    for has_outliers in (False, True):
        tokens = values.clone()
        if has_outliers:
            tokens[..., large] *= FACTOR
        latent, rope = tokens[..., : form.latent], tokens[..., form.latent :]
        is_power = isinstance(form.made, CacheFormat)
        stored = quantise(latent, rope, like(form, latent, rope), is_power)
        parts = dequantise(stored, torch.float64, rope=ROPE)
        back = torch.cat([part for part in parts if part is not None], -1)
        exact = output(query, tokens.double(), form.latent, form.inside)
        error = output(query, back, form.latent, form.inside) - exact
        found.append(float(error.norm() / exact.norm()))
        if has_outliers:
            usual = torch.ones(exact.shape[-1], dtype=torch.bool)
            usual[large] = False
            found.append(float(error[..., usual].norm() / exact[..., usual].norm()))
    return found[0], found[1], found[2]


def table() -> str:
    lines = [
        "| format | N(0,1) | with outliers | with outliers, in the other columns |",
        "| --- | ---: | ---: | ---: |",
    ]
    for form in FORMS:
        cells = " | ".join(f"{100 * error:.2g} %" for error in errors(form))
        lines.append(f"| {form.text} | {cells} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page, with the table as it is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="What each format of a cache costs in accuracy.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is otherwise")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    made = with_table(page)
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    return int(check and made != page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
