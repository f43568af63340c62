"""Decode problems made to catch a kernel that reads, writes or computes what it must not.

Always: the pages of a request lie scattered over a larger cache, every cache slot that no request
owns holds NaN, and the page table past the used pages holds the largest int32. On request: strided
views, logits of about 900 either way, equal keys, one key that outweighs all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch

from mla_triton.cache import FP8_DS_MLA, FP8_V4, FP8_V41, CSRPageTable, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import E4M3_MAX, pack, quantise

UNUSED_PAGE = 2**31 - 1
LARGE_LOGIT = 900.0

Logits = Literal["normal", "large", "equal_keys", "dominant_key"]
Layout = Literal["fused", "pair"]
Table = Literal["dense", "csr"]
Stored = Literal["16bit", "fp8", "fp8_groups", "fp8_ds_mla", "fp8_v4", "fp8_v41"]
PACKED = {form.name: form for form in (FP8_DS_MLA, FP8_V4, FP8_V41)}
SERVED: dict[Stored, tuple[torch.dtype, ...]] = {
    "fp8": (torch.float16, torch.bfloat16),
    "fp8_groups": (torch.float16, torch.bfloat16),
    "fp8_ds_mla": (torch.bfloat16,),
    "fp8_v4": (torch.bfloat16,),
    "fp8_v41": (torch.float16, torch.bfloat16),
}
"""Dtypes of queries over a quantised cache."""


@dataclass(frozen=True, repr=False)
class DecodeInputs:
    """The arguments of one call of `mla_triton.decode`, and where they came from."""

    q_nope: torch.Tensor
    q_rope: torch.Tensor | None
    cache: torch.Tensor | LatentCache
    page_table: torch.Tensor | CSRPageTable
    kv_lens: torch.Tensor
    softmax_scale: float
    causal: bool = True
    cu_seqlens_q: torch.Tensor | None = None
    value_dim: int | None = None
    max_kv_len: int | None = None
    padding: int = 0
    """Columns between the rows of strided tensors."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The arguments of `decode_inputs` that made this problem."""

    @property
    def dtype(self) -> torch.dtype:
        return self.q_nope.dtype

    def call_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, for `mla_triton.decode` and for the reference."""
        positional = (self.q_nope, self.q_rope, self.cache, self.page_table, self.kv_lens)
        names = ("softmax_scale", "causal", "cu_seqlens_q", "value_dim", "max_kv_len")
        return positional, {name: getattr(self, name) for name in names}

    def output_buffers(self) -> dict[str, torch.Tensor]:
        """`out` and `lse` filled with NaN, strided where the inputs are."""
        rows, device = self.q_nope.shape[:-1], self.q_nope.device
        width = self.q_nope.shape[-1] if self.value_dim is None else self.value_dim
        out = torch.full((*rows, width), float("nan"), dtype=self.q_nope.dtype, device=device)
        lse = torch.full(rows, float("nan"), dtype=torch.float32, device=device)
        return {"out": padded(out, self.padding), "lse": padded(lse, self.padding)}

    def to(self, device: torch.device | str) -> DecodeInputs:
        """The same problem on another device, strides included."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device) for f in fields(self)})

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items())
        return f"decode_inputs({arguments})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How IPython and hypothesis print it, which would else spell out every tensor."""
        printer.text(repr(self))


def decode_inputs(
    *,
    kv_lens: Sequence[int],
    s_q: int = 1,
    q_lens: Sequence[int] | None = None,
    heads: int = 16,
    latent: int = 512,
    rope: int = 64,
    value_dim: int | None = None,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    layout: Layout = "fused",
    stored: Stored = "16bit",
    table: Table = "dense",
    strided: bool | int = False,
    logits: Logits = "normal",
    softmax_scale: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> DecodeInputs:
    """A random decode problem; the same arguments give the same values on every device.

    `kv_lens` are the keys of each request, 0 allowed; every request has `s_q` queries or, ragged,
    `q_lens[b]`, and either may exceed its keys. `strided` leaves 16 bytes between the rows of
    queries, cache and outputs, or as many columns as it says: an odd number misaligns them. Then
    q_nope also lies head by head, as a batched product with `W_UK` leaves it. `stored` is how the
    cache is quantised: "fp8" has a scale for all latents and one for all rotary keys, "fp8_groups"
    one for each 128 columns of a latent, the others are packed formats of `mla_triton.cache`.
    `logits="large"` makes them about 900 either way; with `"equal_keys"` all keys of a request are
    one, with `"dominant_key"` a single key has nearly all of the weight. `softmax_scale` is by
    default that of a model whose `nope` is a quarter of `latent`.

    Raises ValueError for a `layout`, `stored`, `table` or `logits` that there is not.
    """
    recipe = {name: value for name, value in locals().items() if name != "device"}
    for name, kind in (
        ("layout", Layout),
        ("stored", Stored),
        ("table", Table),
        ("logits", Logits),
    ):
        if recipe[name] not in get_args(kind):
            choices = ", ".join(get_args(kind))
            raise ValueError(f"{name} must be one of {choices}, got {recipe[name]!r}")
    padding = 16 // dtype.itemsize if strided is True else int(strided)
    generator = torch.Generator().manual_seed(seed)
    s_q_of = [s_q] * len(kv_lens) if q_lens is None else list(q_lens)
    # DeepSeek's nope is a quarter of its latent.
    scale = (latent / 4 + rope) ** -0.5 if softmax_scale is None else softmax_scale

    query = torch.randn(sum(s_q_of), heads, latent + rope, generator=generator)
    if logits == "large":
        query *= LARGE_LOGIT / (3 * scale * (latent + rope) ** 0.5)
    keys = [torch.randn(n, latent + rope, generator=generator) for n in kv_lens]
    bounds = list(accumulate(s_q_of, initial=0))
    for request, key in enumerate(keys):
        shape_keys(key, query[bounds[request] : bounds[request + 1]], logits, generator)

    pages, table_of = _scatter_pages([-(-n // page_size) for n in kv_lens], generator)
    cache = _fill_cache(keys, table_of, pages, page_size, latent + rope)
    query = query.to(dtype)
    if q_lens is None:
        query = query.unflatten(0, (len(kv_lens), s_q))
    inputs = DecodeInputs(
        q_nope=head_major(query[..., :latent], padding),
        q_rope=padded(query[..., latent:], padding) if rope else None,
        cache=_stored(cache, latent, dtype, layout, stored, padding),
        page_table=_dense(table_of, padding) if table == "dense" else _csr(table_of),
        kv_lens=int32(kv_lens),
        softmax_scale=scale,
        causal=causal,
        cu_seqlens_q=None if q_lens is None else int32(bounds),
        value_dim=value_dim,
        padding=padding,
        recipe=recipe,
    )  # fmt: skip
    return inputs.to(device)


def query_blocks(inputs: DecodeInputs, size: int) -> Iterator[tuple[slice, DecodeInputs]]:
    """A ragged problem as problems of at most `size` query tokens of one request each.

    With each the tokens that it is of: under a bottom-right mask some of a request's queries are
    those of a request whose keys end where the last of them sees. The oracle of thousands of query
    tokens over thousands of keys does not fit into memory at once.
    """
    assert inputs.cu_seqlens_q is not None
    bounds, lengths = inputs.cu_seqlens_q.tolist(), inputs.kv_lens.tolist()
    for request, (first, last) in enumerate(pairwise(bounds)):
        table = inputs.page_table
        if isinstance(table, CSRPageTable):
            table = table._replace(indptr=table.indptr[request : request + 2])
        else:
            table = table[request : request + 1]
        for begin in range(first, last, size):
            end = min(begin + size, last)
            seen = lengths[request] - (last - end if inputs.causal else 0)
            part = replace(
                inputs,
                q_nope=inputs.q_nope[begin:end],
                q_rope=None if inputs.q_rope is None else inputs.q_rope[begin:end],
                page_table=table,
                kv_lens=int32([seen]).to(inputs.kv_lens.device),
                cu_seqlens_q=int32([0, end - begin]).to(inputs.kv_lens.device),
            )
            yield slice(begin, end), part


def untouched_padding(view: torch.Tensor) -> bool:
    """Whether what lies between the rows of a buffer from `output_buffers` is still NaN."""
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    whole = whole.clone()
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(whole.isnan().all())


def shape_keys(
    keys: torch.Tensor, query: torch.Tensor, logits: Logits, generator: torch.Generator
) -> None:
    """Turns the normal keys and queries of one request into what `logits` asks for, in place."""
    if not len(keys):
        return
    if logits == "equal_keys":
        keys[:] = keys[0].clone()
    if logits == "dominant_key":
        # All queries lean towards one direction, along which the chosen key lies.
        direction = torch.randn(keys.shape[-1], generator=generator)
        query *= 0.3
        query += direction
        keys[int(torch.randint(len(keys), (), generator=generator))] = direction


def _scatter_pages(
    used: Sequence[int], generator: torch.Generator
) -> tuple[int, list[torch.Tensor]]:
    """How many pages the cache has, and which of them each request owns, in order."""
    total = sum(used)
    count = total + total // 2 + 2
    return count, list(torch.randperm(count, generator=generator)[:total].split(list(used)))


def _fill_cache(
    keys: list[torch.Tensor], pages: list[torch.Tensor], count: int, page_size: int, width: int
) -> torch.Tensor:
    cache = torch.full((count * page_size, width), float("nan"))
    for key, page in zip(keys, pages, strict=True):
        slots = page[:, None] * page_size + torch.arange(page_size)
        cache[slots.flatten()[: len(key)]] = key
    return cache.view(count, page_size, width)


def _stored(
    cache: torch.Tensor, latent: int, dtype: torch.dtype, layout: str, stored: Stored, padding: int
) -> torch.Tensor | LatentCache:
    """float32 keys `[pages, page_size, latent + rope]` as a cache has them."""
    ckv, kpe = cache[..., :latent], cache[..., latent:] if cache.shape[-1] > latent else None
    if stored in PACKED:
        form = PACKED[stored]
        if kpe is not None and not form.rope:
            ckv, kpe = cache, None
        pages = pack(form, ckv, None if kpe is None else kpe.to(dtype).float())
        return form.views(pages, cache.shape[1])
    if stored == "16bit" and layout == "fused":
        return padded(cache.to(dtype), padding)
    if stored == "16bit":
        pair = LatentCache(ckv.to(dtype), None if kpe is None else kpe.to(dtype))
    else:
        pair = quantise(ckv, kpe, _empty(cache, latent, dtype, layout, stored), False)
    return pair._replace(
        ckv=padded(pair.ckv, padding), kpe=None if pair.kpe is None else padded(pair.kpe, padding)
    )


def _empty(
    cache: torch.Tensor, latent: int, dtype: torch.dtype, layout: str, stored: Stored
) -> LatentCache:
    """A cache like the one that keys are to be quantised for; a row of each of its parts."""
    rope = cache.shape[-1] - latent
    if stored == "fp8_groups":
        scales = torch.empty(1, 1, latent // min(128, latent))
        return LatentCache(
            torch.empty(1, 1, latent, dtype=E4M3), torch.empty(1, 1, rope, dtype=dtype), scales
        )
    parts = (cache[..., :latent], cache[..., latent:])
    largest = [
        part.nan_to_num().abs().amax() if part.numel() else torch.tensor(0.0) for part in parts
    ]
    scales = torch.stack(largest).clamp_min(2.0**-20) / E4M3_MAX
    if layout == "fused":
        return LatentCache(torch.empty(1, 1, latent + rope, dtype=E4M3), None, scales)
    ckv, kpe = torch.empty(1, 1, latent, dtype=E4M3), torch.empty(1, 1, rope, dtype=E4M3)
    return LatentCache(ckv, kpe if rope else None, scales)


def _dense(pages: list[torch.Tensor], padding: int) -> torch.Tensor:
    width = 1 + max((len(page) for page in pages), default=0)
    table = torch.full((len(pages), width + padding), UNUSED_PAGE, dtype=torch.int32)
    for row, page in zip(table, pages, strict=True):
        row[: len(page)] = page
    return table[:, :width]


def _csr(pages: list[torch.Tensor]) -> CSRPageTable:
    unused = torch.tensor([UNUSED_PAGE])
    indptr = accumulate((len(page) for page in pages), initial=0)
    return CSRPageTable(int32(list(indptr)), torch.cat([*pages, unused]).to(torch.int32))


def padded(tensor: torch.Tensor, padding: int) -> torch.Tensor:
    """The same values with `padding` columns of NaN after every row."""
    width = tensor.shape[-1]
    wider = tensor.new_full((*tensor.shape[:-1], width + padding), float("nan"))
    wider[..., :width] = tensor
    return wider[..., :width]


def head_major(query: torch.Tensor, padding: int) -> torch.Tensor:
    """`[..., heads, width]`, in memory one head after another where rows are padded."""
    if not padding:
        return query.contiguous()
    return padded(query.movedim(-2, 0), padding).movedim(0, -2)


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, (LatentCache, CSRPageTable)):
        return type(value)(*(moved(tensor, device) for tensor in value))
    if not isinstance(value, torch.Tensor) or value.device == torch.device(device):
        return value
    storage = torch.empty(0, dtype=value.dtype, device=value.device)
    storage = storage.set_(value.untyped_storage()).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())
