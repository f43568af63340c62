"""Caches made to catch a kernel that writes what it must not, and tokens to be put into them.

Every tensor of a cache lies in a buffer of bytes that are all 0xa5: before its first page, behind
its last, and in every slot. What a kernel leaves there can be held, byte for byte, against what the
reference leaves in a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from mla_triton import reference
from mla_triton.cache import FP8_DS_MLA, FP8_V4, FP8_V41, CacheFormat, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import dequantise
from mla_triton.testing.problems import padded

CANARY = 0xA5
MARGIN = 256
"""Bytes before the first page, and behind the last."""
PACKED: dict[str, tuple[CacheFormat, int]] = {
    "fp8_ds_mla": (FP8_DS_MLA, 512),
    "fp8_v4": (FP8_V4, 448),
    "fp8_v41": (FP8_V41, 448),
}
"""Formats, and the latent's columns in each where the rotary key has 64."""
FORMS = ("fused", "pair", "one", "one pair", "groups", *PACKED)
"""A 16-bit or float32 cache in one tensor or two; e4m3 with two scales in one tensor or two; e4m3
with float32 scales of groups in a tensor of their own; the packed formats."""


class Part(NamedTuple):
    """A tensor of a cache, as a view of a buffer."""

    buffer: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    """Elements from the buffer's first byte."""

    def of(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = buffers[self.buffer].view(self.dtype)
        return whole.as_strided(self.shape, self.strides, self.first)


@dataclass(frozen=True, repr=False)
class CacheMemory:
    """A cache with canaries around it."""

    form: str
    buffers: tuple[torch.Tensor, ...]
    parts: tuple[Part, ...]
    """The cache's tensors: latents, and rotary keys and scales of their own where it has them."""
    has_keys: bool
    one_scale: torch.Tensor | None = None
    """Of all latents, and of all keys."""

    @property
    def cache(self) -> torch.Tensor | LatentCache:
        made = [part.of(self.buffers) for part in self.parts]
        if self.form == "fused":
            return made[0]
        keys = made[1] if self.has_keys else None
        scales = self.one_scale
        if scales is None and len(made) > 1 + self.has_keys:
            scales = made[-1]
        return LatentCache(made[0], keys, scales)

    @property
    def capacity(self) -> int:
        pages, page_size, _ = self.parts[0].shape
        return pages * page_size

    def copy(self) -> CacheMemory:
        return replace(self, buffers=tuple(buffer.clone() for buffer in self.buffers))

    def to(self, device: torch.device | str) -> CacheMemory:
        scale = self.one_scale
        return replace(
            self,
            buffers=tuple(buffer.to(device) for buffer in self.buffers),
            one_scale=None if scale is None else scale.to(device),
        )

    def differs(self, other: CacheMemory) -> int:
        """Bytes in which two are different, canaries included."""
        pairs = zip(self.buffers, other.buffers, strict=True)
        return sum(int((one != another).sum()) for one, another in pairs)

    def values(self, slots: torch.Tensor, rope: int) -> torch.Tensor:
        """`[tokens, latent + rope]` float64: what some slots hold."""
        cache = self.cache
        whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
        page, place = slots // whole.ckv.shape[1], slots % whole.ckv.shape[1]

        def chosen(stored: torch.Tensor | None) -> Any:
            if stored is None or stored.dim() == 1:
                return stored
            return _indexable(stored)[page, place].view(stored.dtype)

        found = dequantise(LatentCache(*map(chosen, whole)), torch.float64, rope=rope)
        return torch.cat([part for part in found if part is not None], -1)


def _indexable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == E4M3 else tensor


def cache_memory(
    form: str = "fused",
    *,
    pages: int = 5,
    page_size: int = 16,
    latent: int = 512,
    rope: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 128,
    strided: bool | int = False,
    device: torch.device | str = "cpu",
) -> CacheMemory:
    """A cache of one of `FORMS`, every byte of it 0xa5.

    `dtype` is that of caches that are not quantised; packed formats have widths of their own.
    `strided` leaves 16 bytes between slots, or as many columns as it says, where a form has no
    places of its own.
    """
    buffers: list[torch.Tensor] = []

    def buffer(size: int) -> int:
        made = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=device)
        buffers.append(made)
        return len(buffers) - 1

    def own(columns: int, kind: torch.dtype) -> Part:
        """A tensor in a buffer of its own, with a slot's worth of bytes between pages."""
        padding = 16 // kind.itemsize if strided is True else int(strided)
        step = columns + padding
        page = (page_size + 1) * step
        place = buffer(pages * page * kind.itemsize // 16 * 16 + 16)
        shape, strides = (pages, page_size, columns), (page, step, 1)
        return Part(place, kind, shape, strides, MARGIN // kind.itemsize)

    one_scale = None
    if form in PACKED:
        packed, _ = PACKED[form]
        size = packed.page_bytes(page_size)
        place = buffer(pages * size)
        views = packed.views(buffers[place][MARGIN:-MARGIN].view(pages, size), page_size)
        parts = [
            Part(place, t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()))
            for t in views
            if t is not None
        ]
        return CacheMemory(form, tuple(buffers), tuple(parts), packed.rope > 0)
    has_keys = form in ("pair", "one pair", "groups")
    kind = dtype if form in ("fused", "pair") else E4M3
    key_kind = torch.bfloat16 if form == "groups" else kind
    parts = [own(latent if has_keys else latent + rope, kind)]
    if has_keys:
        parts.append(own(rope, key_kind))
    if form == "groups":
        parts.append(own(latent // group, torch.float32))
    if form.startswith("one"):
        one_scale = torch.tensor([0.0123, 0.37], device=device)
    return CacheMemory(form, tuple(buffers), tuple(parts), has_keys, one_scale)


@dataclass(frozen=True, repr=False)
class AppendInputs:
    """The arguments of one call of `mla_triton.append`, and where they came from."""

    memory: CacheMemory
    latent: torch.Tensor
    rope: torch.Tensor | None
    slots: torch.Tensor
    options: dict[str, Any]
    """Norm, rotation and scales, by the names of `mla_triton.append`."""
    recipe: dict[str, Any] = field(default_factory=dict)

    def call_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, for `mla_triton.append` and for the reference."""
        return (self.memory.cache, self.latent, self.rope, self.slots), self.options

    def fresh(self) -> AppendInputs:
        """The same with a cache of its own."""
        return replace(self, memory=self.memory.copy())

    def expected(self, compute_dtype: torch.dtype = torch.float64) -> CacheMemory:
        """What the reference leaves in a copy of the cache."""
        made = self.fresh()
        arguments, options = made.call_arguments()
        reference.append(*arguments, **options, compute_dtype=compute_dtype)
        return made.memory

    @property
    def written(self) -> torch.Tensor:
        """Tokens that are in the cache afterwards."""
        return reference.last_of_each(self.slots.long(), self.memory.capacity)

    def exact(self) -> torch.Tensor:
        """`[tokens, latent + rope]` float64: the values of `written` before they are stored."""
        kept, options = self.written, self.options
        latent, rope = self.latent[kept].double(), self.rope
        if options.get("norm_weight") is not None:
            eps = options.get("norm_eps", 1e-6)
            latent = reference.normalised(latent, options["norm_weight"], eps, torch.float64)
        if rope is None:
            return latent
        rope, angles = rope[kept].double(), options.get("cos_sin")
        if angles is not None:
            place = options["positions"][kept].long().clamp(0, len(angles) - 1)
            style = options.get("rope_style", "interleaved")
            rope = reference.rotated(rope, angles[place], style, torch.float64)
        return torch.cat([latent, rope], -1)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items())
        return f"append_inputs({arguments})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How IPython and hypothesis print it, which would else spell out every tensor."""
        printer.text(repr(self))


def append_inputs(
    *,
    form: str = "fused",
    tokens: int = 20,
    pages: int = 5,
    page_size: int = 16,
    latent: int = 512,
    rope: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    slot_dtype: torch.dtype = torch.int64,
    norm: torch.dtype | None = None,
    rotation: str | None = None,
    angles: torch.dtype = torch.float32,
    power_of_two: bool = True,
    scale: float = 1.0,
    strided: bool | int = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AppendInputs:
    """Random tokens and slots; the same arguments give the same values on every device.

    Slots are different ones, some of them negative or behind the last, and there are none twice.
    `norm` and `rotation` fuse a norm with a weight of that dtype, and a rotation of that style;
    `scale` is the standard deviation of the tokens.
    """
    recipe = {name: value for name, value in locals().items() if name != "device"}
    generator = torch.Generator().manual_seed(seed)
    widths = {"latent": latent, "rope": rope}
    if form in PACKED:
        widths = {"latent": PACKED[form][1], "rope": 64}
    memory = cache_memory(
        form, pages=pages, page_size=page_size, **widths, dtype=cache_dtype or dtype,
        strided=strided, device=device,
    )  # fmt: skip
    padding = 16 // dtype.itemsize if strided is True else int(strided)

    def normal(width: int) -> torch.Tensor:
        values = torch.randn(tokens, width, generator=generator) * scale
        # Magnitudes of a few binades, and zeros.
        values *= torch.randn(tokens, 1, generator=generator).exp()
        values[torch.rand(tokens, width, generator=generator) < 0.02] = 0.0
        return padded(values.to(dtype), padding)

    latents = normal(widths["latent"])
    keys = normal(widths["rope"]) if widths["rope"] else None
    slots = torch.randperm(max(tokens, memory.capacity), generator=generator)[:tokens]
    wrong = torch.rand(tokens, generator=generator) < 0.2
    slots[wrong] = torch.tensor([-1, -(2**31), memory.capacity, 2**31 - 1])[slots[wrong] % 4]
    options: dict[str, Any] = {"power_of_two_scales": power_of_two}
    if norm is not None:
        weight = torch.randn(widths["latent"], generator=generator)
        options |= {"norm_weight": weight.to(device, norm), "norm_eps": 1e-5}
    if rotation is not None and keys is not None:
        turns = torch.randn(2 * tokens + 1, widths["rope"] // 2, generator=generator) * 10
        table = torch.cat([turns.cos(), turns.sin()], -1).to(angles)
        positions = torch.randint(-3, 2 * tokens + 4, (tokens,), generator=generator)
        options |= {
            "cos_sin": table.to(device),
            "positions": positions.to(device, slot_dtype),
            "rope_style": rotation,
        }
    return AppendInputs(
        memory,
        _moved(latents, device),
        None if keys is None else _moved(keys, device),
        slots.to(device, slot_dtype),
        options,
        recipe,
    )


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def append_errors(got: CacheMemory, inputs: AppendInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`[tokens, latent + rope]` each: how far every stored number is off, and how far it may be.

    The budget is twice the error of the same arithmetic in float32, and of one rounding to what
    the cache has; and, once, what another order of that arithmetic can change.
    """
    slots, exact = inputs.slots.long()[inputs.written], inputs.exact()
    if not len(slots):
        return exact, exact
    rope = 0 if inputs.rope is None else inputs.rope.shape[1]
    found = got.values(slots, rope)
    same = inputs.expected(torch.float32).values(slots, rope)
    allowed = 2 * ((same - exact).abs() + _roundings(got, exact, rope)) + _reordering(inputs, exact)
    return (found - exact).abs(), allowed


def append_excess(got: CacheMemory, inputs: AppendInputs) -> float:
    """How far past its budget the number furthest past it is; at most 0 where all are right."""
    error, allowed = append_errors(got, inputs)
    if not len(error):
        return 0.0
    return float((error - allowed).nan_to_num(float("inf")).amax())


def _reordering(inputs: AppendInputs, exact: torch.Tensor) -> torch.Tensor:
    """What the order of float32 operations can change of each number."""
    changed = torch.zeros_like(exact)
    unit = torch.finfo(torch.float32).eps / 2
    width = inputs.latent.shape[1]
    if inputs.options.get("norm_weight") is not None:
        # A sum of squares, in whatever order, is as many roundings off as it is deep, its root
        # half as many: at most 16 in a row and a tree over 32. Beside it root and products.
        changed[:, :width] = exact[:, :width].abs() * (unit * ((16 + 5) / 2 + 4))
    if inputs.options.get("cos_sin") is not None:
        # Two products that cancel each other, each no larger than its pair.
        changed[:, width:] = exact[:, width:].abs().amax(1, keepdim=True) * (2**0.5 * 2 * unit)
    return changed


def _roundings(memory: CacheMemory, exact: torch.Tensor, rope: int) -> torch.Tensor:
    """The largest error of one rounding of each number to what the cache has."""
    cache = memory.cache
    whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    rounding = torch.empty_like(exact)
    widths = (exact.shape[1] - rope, rope)
    kinds = (whole.ckv.dtype, whole.ckv.dtype if whole.kpe is None else whole.kpe.dtype)
    for part, kind, unit in zip(
        exact.split(widths, 1), kinds, rounding.split(widths, 1), strict=True
    ):
        if kind == E4M3:
            # Steps of the subnormal numbers are 2**-9 of a scale, that is the largest number's
            # 448th part at most: twice that for a power of two.
            largest = exact.abs().amax(1, keepdim=True) / 448 * 2
            if memory.one_scale is not None:
                largest = memory.one_scale.max().double()
            unit.copy_(torch.maximum(part.abs() * 2**-4, largest * 2**-10))
        else:
            unit.copy_(part.abs() * (torch.finfo(kind).eps / 2))
    return rounding
