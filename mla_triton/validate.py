"""Tensors and options -> Problem, or an error that names the argument, the rule and the value.

Only what the host knows is looked at: shapes, strides, dtypes and devices. So calls that are alike
in these make one problem, and the rules are gone through once for all of them: the layers of a
model, the steps of an engine. Values on the device (lengths, page ids) are kept harmless by the
kernels, and verified by `mla_triton.debug` on request.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.plan import fixed_pieces
from mla_triton.problem import DecodeProblem, RowSteps, Storage

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT32_MAX = 2**31 - 1
MAX_SCALE = torch.finfo(torch.float32).max / math.log2(math.e)
"""The kernels take exponentials to base 2, so the factor of logits is multiplied by log2(e)."""
ALIGNMENT = 16
"""What an address is a multiple of, in bytes, and a stride, in elements, where both are aligned."""
MAX_ROW_STEP = 2**24
"""Rows of a tile, at most 128, are that far apart within int32."""
LAST_DIMENSION = "have a contiguous last dimension (stride 1)"


def fail(error: type[Exception], argument: str, rule: str, value: object) -> NoReturn:
    raise error(f"{argument} must {rule}, got {value}")


# -- types of arguments


def check_tensor(argument: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        fail(TypeError, argument, "be a torch.Tensor", type(value).__name__)


def check_flag(argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(TypeError, argument, "be True or False", type(value).__name__)


def check_impl(impl: Any) -> None:
    if impl is not None and not isinstance(impl, str):
        fail(TypeError, "impl", "be a str or None", type(impl).__name__)


def integer(argument: str, value: Any) -> int:
    """The value as an int; a tensor is none, for its value would have to be waited for."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # an int to every rule
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
        fail(TypeError, argument, "be an integer", type(value).__name__)
    return operator.index(value)


def number(argument: str, value: Any) -> float:
    """The value as a float that is finite on the device, too."""
    if type(value) is not float and not isinstance(value, torch.SymFloat):
        if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__float__"):
            fail(TypeError, argument, "be a number", type(value).__name__)
        value = float(value)
    if not abs(value) <= MAX_SCALE:
        fail(ValueError, argument, "be finite in float32", value)
    return value


def unpack_cache(cache: Any, name: str = "cache") -> LatentCache:
    """The cache as a LatentCache: (latents, or latents and rotary keys in one; rotary keys of their
    own or None; scales or None)."""
    if isinstance(cache, torch.Tensor):
        return LatentCache(cache)
    if not isinstance(cache, LatentCache):
        fail(TypeError, name, "be a torch.Tensor or a LatentCache", type(cache).__name__)
    for part, tensor in zip(LatentCache._fields, cache, strict=True):
        if tensor is not None or part == "ckv":
            check_tensor(f"{name}.{part}", tensor)
    return cache


def unpack_page_table(page_table: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dense table or CSR indices, CSR indptr or None)."""
    if isinstance(page_table, torch.Tensor):
        return page_table, None
    if not isinstance(page_table, CSRPageTable):
        rule = "be a torch.Tensor or a CSRPageTable"
        fail(TypeError, "page_table", rule, type(page_table).__name__)
    check_tensor("page_table.indptr", page_table.indptr)
    check_tensor("page_table.indices", page_table.indices)
    return page_table.indices, page_table.indptr


def out_shape(
    q_nope: torch.Tensor, q_rope: torch.Tensor | None, value_dim: int | None
) -> tuple[int, ...]:
    """The shape of `out`; that of queries which break a rule is any."""
    if value_dim is None or q_nope.dim() == 0:
        return q_nope.shape
    rope = 0 if q_rope is None or q_rope.dim() == 0 else q_rope.shape[-1]
    return *q_nope.shape[:-1], check_value_dim(value_dim, q_nope.shape[-1], rope)


# -- what the host knows of a call


class Layout(NamedTuple):
    """What the host knows of a tensor."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"shape {tuple(self.shape)} and strides {tuple(self.strides)}"

    @property
    def last_is_contiguous(self) -> bool:
        return self.shape[-1] <= 1 or self.strides[-1] == 1

    @property
    def may_overlap(self) -> bool:
        """Whether two elements may share memory: a dimension does not step over those inside it."""
        inside = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and stride < inside:
                return True
            inside += (size - 1) * stride
        return False


# A plain tuple is made in half the time of a `Layout`, and a call makes ten of them.
Facts = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...]]


def facts(tensor: torch.Tensor) -> Facts:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class DecodeCall(NamedTuple):
    """All that the rules of decode look at."""

    q_nope: Facts
    q_rope: Facts | None
    ckv: Facts
    kpe: Facts | None
    scales: Facts | None
    pages: Facts
    indptr: Facts | None
    kv_lens: Facts
    cu_seqlens_q: Facts | None
    out: Facts
    lse: Facts
    causal: bool
    value_dim: int | None
    max_kv_len: int | None
    allow_tf32: bool
    batch_invariant: bool
    aligned: bool
    """Whether what the kernels read in wide loads begins at multiples of 16 bytes."""


# -- decode


def decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    value_dim: int | None,
    max_kv_len: int | None,
    allow_tf32: bool,
    batch_invariant: bool = False,
    has_memory: bool = True,
) -> DecodeProblem:
    """Checks one call of decode, as `mla_triton.decode` has unpacked it.

    Without `has_memory` (fake tensors of a compiler, the meta device) the rules are the same, and
    sizes may be symbolic.
    """
    if torch.is_grad_enabled():
        cache = "cache" if kpe is None and scales is None else "cache.ckv"
        values = {"q_nope": q_nope, "q_rope": q_rope, cache: ckv, "cache.kpe": kpe, "out": out}
        check_no_grad(values)
    number("softmax_scale", softmax_scale)
    address = 0
    if has_memory:
        address = q_nope.data_ptr() | ckv.data_ptr() | out.data_ptr()
        if q_rope is not None:
            address |= q_rope.data_ptr()
        if kpe is not None:
            address |= kpe.data_ptr()
        if scales is not None and scales.dim() > 1 and scales.dtype == torch.float32:
            address |= scales.data_ptr()
    call = DecodeCall(
        facts(q_nope),
        None if q_rope is None else facts(q_rope),
        facts(ckv),
        None if kpe is None else facts(kpe),
        None if scales is None else facts(scales),
        facts(pages),
        None if indptr is None else facts(indptr),
        facts(kv_lens),
        None if cu_seqlens_q is None else facts(cu_seqlens_q),
        facts(out),
        facts(lse),
        causal,
        value_dim,
        max_kv_len,
        allow_tf32,
        batch_invariant,
        address % ALIGNMENT == 0,
    )
    return known_problem(call) if has_memory else decode_problem(call)


def check_no_grad(values: dict[str, torch.Tensor | None]) -> None:
    for name, tensor in values.items():
        if tensor is not None and tensor.requires_grad:
            rule = "not require grad while grad is enabled (there is no backward)"
            way_out = "a tensor that does: call under torch.no_grad() or pass it detached"
            fail(ValueError, name, rule, way_out)


def decode_problem(call: DecodeCall) -> DecodeProblem:
    """The problem of a call that keeps all rules."""
    q_nope, ckv, pages, kv_lens, out, lse = (
        Layout(*known)
        for known in (call.q_nope, call.ckv, call.pages, call.kv_lens, call.out, call.lse)
    )
    q_rope, kpe, scales, indptr, cu_seqlens_q = (
        None if known is None else Layout(*known)
        for known in (call.q_rope, call.kpe, call.scales, call.indptr, call.cu_seqlens_q)
    )
    cache_name = "cache" if kpe is None and scales is None else "cache.ckv"
    table_name = "page_table" if indptr is None else "page_table.indices"
    values = {"q_nope": q_nope, "q_rope": q_rope, cache_name: ckv, "cache.kpe": kpe, "out": out}
    integers = {
        table_name: pages,
        "page_table.indptr": indptr,
        "kv_lens": kv_lens,
        "cu_seqlens_q": cu_seqlens_q,
    }
    _check_dtypes_and_devices(values, integers, {"lse": lse, "cache.scales": scales}, cache_name)
    heads, latent, rope, value = _check_queries(q_nope, q_rope, cu_seqlens_q, call.value_dim)
    _check_cache(cache_name, ckv, kpe, scales, latent, rope, value)
    storage = None if scales is None else _storage(q_nope, ckv, kpe, scales, value)

    batch = check_lengths(kv_lens, cu_seqlens_q)
    lead = q_nope.shape[:-2]
    if cu_seqlens_q is None and lead[0] != batch:
        fail(ValueError, "kv_lens", f"have q_nope's batch of {lead[0]}", f"{batch} entries")
    queries, s_q = (lead[0] * lead[1], lead[1]) if cu_seqlens_q is None else (lead[0], None)
    check_rows("q_nope", queries, heads)

    num_pages, page_size, _ = ckv.shape
    capacity = check_page_table(table_name, pages, indptr, batch, page_size)
    if call.max_kv_len is not None:
        check_least("max_kv_len", call.max_kv_len, 0)
        if call.max_kv_len > capacity:
            rule = f"reach max_kv_len {call.max_kv_len} with pages of {page_size}"
            entries = f"{capacity // page_size} entries ({capacity} keys)"
            fail(ValueError, table_name, rule, entries)
        capacity = call.max_kv_len
    capacity = INT32_MAX if exceeds_int32(capacity) else capacity
    check_results(out, lse, (*lead, heads), value)
    for name, tensor in values.items():
        if tensor is not None and not tensor.last_is_contiguous:
            fail(ValueError, name, LAST_DIMENSION, f"strides {tuple(tensor.strides)}")

    return DecodeProblem(
        dtype=q_nope.dtype,
        batch=batch,
        s_q=s_q,
        queries=queries,
        heads=heads,
        latent=latent,
        rope=rope,
        value_dim=value,
        page_size=page_size,
        csr=indptr is not None,
        # One query is the last one: it sees every key, causal or not.
        causal=call.causal and s_q != 1,
        fused=kpe is None,
        ckv_stride_slot=ckv.strides[1],
        kpe_stride_slot=0 if kpe is None else kpe.strides[1],
        aligned=call.aligned and _all_aligned(values, storage is not None),
        allow_tf32=call.allow_tf32 and q_nope.dtype == torch.float32,
        row_steps=RowSteps(
            q_nope=_row_step(q_nope, 1, lead[-1], heads),
            q_rope=_row_step(q_rope, 1, lead[-1], heads),
            out=_row_step(out, 1, lead[-1], heads),
            lse=_row_step(lse, 0, lead[-1], heads),
        ),
        storage=storage,
        page_slots=_page_slots(ckv, kpe, scales if storage is not None and storage.group else None),
        fixed_pieces=fixed_pieces(capacity) if call.batch_invariant else 0,
        max_kv_len=capacity,
        num_pages=INT32_MAX if exceeds_int32(num_pages) else num_pages,
    )


# An engine makes a few of these per step; the bound is for one that never repeats itself.
known_problem = lru_cache(maxsize=4096)(decode_problem)


def _check_dtypes_and_devices(
    values: dict[str, Layout | None],
    integers: dict[str, Layout | None],
    others: dict[str, Layout | None],
    cache_name: str,
) -> None:
    """`others` are lse and the scales of a quantised cache, whose parts have rules of their own."""
    q_nope = values["q_nope"]
    assert q_nope is not None
    if q_nope.dtype not in DTYPES:
        fail(TypeError, "q_nope", "be float16, bfloat16 or float32", q_nope.dtype)
    ckv, scales = values[cache_name], others["cache.scales"]
    assert ckv is not None
    is_quantised = scales is not None or ckv.dtype == E4M3
    if is_quantised:
        check_stored_dtypes(cache_name, ckv, values["cache.kpe"], scales)
        if q_nope.dtype == torch.float32:
            rule = "be float16 or bfloat16 where the cache is quantised"
            fail(TypeError, "q_nope", rule, q_nope.dtype)
    for name, tensor in values.items():
        if tensor is None or (is_quantised and tensor.dtype == E4M3 and name.startswith("cache")):
            continue
        if tensor.dtype != q_nope.dtype:
            fail(TypeError, name, f"have q_nope's dtype {q_nope.dtype}", tensor.dtype)
    for name, tensor in integers.items():
        if tensor is not None and tensor.dtype != torch.int32:
            fail(TypeError, name, "be int32", tensor.dtype)
    lse = others["lse"]
    if lse is not None and lse.dtype != torch.float32:
        fail(TypeError, "lse", "be float32", lse.dtype)
    for name, tensor in (values | integers | others).items():
        if tensor is not None and tensor.device != q_nope.device:
            fail(ValueError, name, f"be on q_nope's device {q_nope.device}", tensor.device)


def _check_queries(
    q_nope: Layout, q_rope: Layout | None, cu_seqlens_q: Layout | None, value_dim: int | None
) -> tuple[int, int, int, int]:
    """(heads, latent, rope, value) sizes."""
    if cu_seqlens_q is None and len(q_nope.shape) != 4:
        rule = "be [batch, s_q, heads, latent] without cu_seqlens_q"
        fail(ValueError, "q_nope", rule, shape(q_nope))
    if cu_seqlens_q is not None and len(q_nope.shape) != 3:
        fail(ValueError, "q_nope", "be [tokens, heads, latent] with cu_seqlens_q", shape(q_nope))
    *lead, latent = q_nope.shape
    heads = lead[-1]
    if heads < 1 or latent < 1:
        fail(ValueError, "q_nope", "have at least one head and one column", shape(q_nope))
    rope = 0
    if q_rope is not None:
        if q_rope.shape[:-1] != q_nope.shape[:-1]:
            rule = f"be [{', '.join(str(size) for size in lead)}, rope] like q_nope"
            fail(ValueError, "q_rope", rule, shape(q_rope))
        rope = q_rope.shape[-1]
    return heads, latent, rope, check_value_dim(value_dim, latent, rope)


def check_value_dim(value_dim: int | None, latent: int, rope: int) -> int:
    if value_dim is None:
        return latent
    if value_dim not in (latent, latent + rope):
        rule = f"be the latent's width {latent} or, with the rope part inside, {latent + rope}"
        fail(ValueError, "value_dim", rule, value_dim)
    return value_dim


def check_least(argument: str, value: int, least: int) -> None:
    if value < least:
        fail(ValueError, argument, f"be {least} or more", value)


def exceeds_int32(size: int | torch.SymInt) -> bool:
    """Of a symbolic size it is not asked: the answer would become a condition of compiled code."""
    return not isinstance(size, torch.SymInt) and size > INT32_MAX


def check_rows(argument: str, queries: int, heads: int) -> None:
    if exceeds_int32(queries * heads):
        rule = f"have at most {INT32_MAX} rows (query tokens x heads)"
        fail(ValueError, argument, rule, f"{queries} x {heads}")


def _check_cache(
    name: str,
    ckv: Layout,
    kpe: Layout | None,
    scales: Layout | None,
    latent: int,
    rope: int,
    value: int,
) -> None:
    if len(ckv.shape) != 3 or ckv.shape[0] < 1 or ckv.shape[1] < 1:
        rule = "be [pages, page_size, width] with at least one page of one token"
        fail(ValueError, name, rule, shape(ckv))
    *slots, width = ckv.shape
    if kpe is None:
        if width != latent + rope:
            rule = f"be {latent + rope} wide (latent {latent} + rope {rope} of the queries)"
            fail(ValueError, name, rule, f"width {width}")
    else:
        if value != latent and (scales is None or len(scales.shape) == 1):
            rule = f"be one tensor where value_dim {value} has the rope part inside"
            fail(ValueError, "cache", rule, "a LatentCache of two")
        if width != latent:
            fail(ValueError, name, f"be {latent} wide like q_nope", f"width {width}")
        if tuple(kpe.shape) != (*slots, rope):
            rule = f"be {(*slots, rope)} to go with cache.ckv and q_rope"
            fail(ValueError, "cache.kpe", rule, shape(kpe))


def check_stored_dtypes(name: str, ckv: Layout, kpe: Layout | None, scales: Layout | None) -> None:
    """Raises where dtypes are not those of a cache, of whatever operation."""
    if ckv.dtype not in (*DTYPES, E4M3):
        fail(TypeError, name, "be float16, bfloat16, float32 or float8_e4m3fn", ckv.dtype)
    if (scales is not None) != (ckv.dtype == E4M3):
        rule = "be given if, and only if, cache.ckv is float8_e4m3fn"
        got = f"{'no' if scales is None else 'a'} tensor beside {ckv.dtype}"
        fail(ValueError, "cache.scales", rule, got)
    if scales is not None and scales.dtype not in (torch.float32, torch.uint8):
        fail(TypeError, "cache.scales", "be float32, or uint8 (e8m0) for groups", scales.dtype)
    if kpe is None:
        return
    if scales is None:
        if kpe.dtype != ckv.dtype:
            fail(TypeError, "cache.kpe", f"have cache.ckv's dtype {ckv.dtype}", kpe.dtype)
    elif len(scales.shape) == 1:
        if kpe.dtype != E4M3:
            rule = "be float8_e4m3fn, as cache.ckv, beside one scale for each"
            fail(TypeError, "cache.kpe", rule, kpe.dtype)
    elif kpe.dtype not in (torch.bfloat16, torch.float16):
        rule = "be bfloat16 or float16 beside scales of groups"
        fail(TypeError, "cache.kpe", rule, kpe.dtype)


def scaled_group(scales: Layout, ckv: Layout) -> int:
    """Columns of e4m3 `ckv` that share a scale, 0 where one is for all latents and one for all
    rotary keys; raises where scales are not of such a cache."""
    pages, page_size, columns = ckv.shape
    if len(scales.shape) == 1:
        if tuple(scales.shape) != (2,) or scales.dtype != torch.float32:
            rule = "be float32 [2], one for latents and one for rotary keys, or of groups"
            fail(ValueError, "cache.scales", rule, f"{scales.dtype} of {shape(scales)}")
    else:
        is_of_slots = len(scales.shape) == 3 and tuple(scales.shape[:2]) == (pages, page_size)
        if not is_of_slots or scales.shape[2] < 1 or columns % scales.shape[2]:
            rule = f"be [2], or [{pages}, {page_size}, groups] with a divisor of {columns} groups"
            fail(ValueError, "cache.scales", rule, shape(scales))
    if not scales.last_is_contiguous:
        fail(ValueError, "cache.scales", LAST_DIMENSION, f"strides {tuple(scales.strides)}")
    return columns // scales.shape[2] if len(scales.shape) == 3 else 0


def _storage(
    q_nope: Layout, ckv: Layout, kpe: Layout | None, scales: Layout, value: int
) -> Storage:
    """How a quantised cache holds the keys that are decoded."""
    group, rope = scaled_group(scales, ckv), None if kpe is None else kpe.dtype
    if not group:
        return Storage(rope, 0, torch.float32, 0)
    if kpe is None and value != ckv.shape[-1]:
        rule = "have rotary keys of their own, cache.kpe, where each token has scales"
        fail(ValueError, "cache", rule, "None")
    return Storage(rope, group, scales.dtype, scales.strides[1])


def check_lengths(kv_lens: Layout, cu_seqlens_q: Layout | None) -> int:
    """The batch."""
    if not is_list(kv_lens):
        fail(ValueError, "kv_lens", "be contiguous [batch]", kv_lens)
    batch = kv_lens.shape[0]
    if cu_seqlens_q is not None:
        _check_offsets("cu_seqlens_q", cu_seqlens_q, batch)
    return batch


def _check_offsets(name: str, offsets: Layout, batch: int) -> None:
    if not is_list(offsets) or offsets.shape[0] != batch + 1:
        fail(ValueError, name, f"be contiguous [batch + 1] = [{batch + 1}]", offsets)


def check_page_table(
    name: str, pages: Layout, indptr: Layout | None, batch: int, page_size: int
) -> int:
    """The most keys a request may have, as far as the table's shape tells."""
    if indptr is not None:
        _check_offsets("page_table.indptr", indptr, batch)
        if not is_list(pages):
            fail(ValueError, name, "be contiguous [pages in use]", pages)
        return pages.shape[0] * page_size
    if len(pages.shape) != 2 or pages.shape[0] != batch or pages.shape[1] < 1:
        rule = f"be [batch, max_pages] = [{batch}, 1 or more]"
        fail(ValueError, name, rule, shape(pages))
    if not pages.last_is_contiguous:
        fail(ValueError, name, LAST_DIMENSION, f"strides {tuple(pages.strides)}")
    return pages.shape[1] * page_size


def check_results(out: Layout, lse: Layout, rows: tuple[int, ...], value: int) -> None:
    for name, tensor, expected in (("out", out, (*rows, value)), ("lse", lse, rows)):
        if tuple(tensor.shape) != expected:
            fail(ValueError, name, f"be {expected}", shape(tensor))
        if tensor.may_overlap:
            rule = "be laid out without overlap"
            fail(ValueError, name, rule, f"strides {tuple(tensor.strides)}")


def is_list(tensor: Layout) -> bool:
    return len(tensor.shape) == 1 and tensor.last_is_contiguous


def rows_aligned(tensor: Layout, step: int = ALIGNMENT) -> bool:
    """Whether every row begins at a multiple of 16 elements from the first, and provably so."""
    rows = zip(tensor.shape[:-1], tensor.strides[:-1], strict=True)
    return all(stride % step == 0 for size, stride in rows if size > 1)


def _all_aligned(values: dict[str, Layout | None], is_quantised: bool) -> bool:
    """Of a quantised cache's 16-bit rotary keys, which may lie between its bytes, every row begins
    at a multiple of 16 bytes."""
    return all(
        rows_aligned(tensor, ALIGNMENT // 2 if is_quantised and name == "cache.kpe" else ALIGNMENT)
        for name, tensor in values.items()
        if tensor is not None
    )


def _row_step(tensor: Layout | None, columns: int, tokens: int, heads: int) -> int:
    """Elements from one (query token, head) row to the next; 0 where it varies or is unknown.

    `columns` is the number of dimensions behind the heads. A step that is as long as the batch is
    large, as a batched product with `W_UK` leaves it, counts as varying: kernels are compiled for
    a step, and a batch must never ask for one of its own.
    """
    if tensor is None:
        return 0
    outer = len(tensor.strides) - columns - 2
    token_step, head_step = tensor.strides[outer : outer + 2]
    sizes = (tokens, heads, token_step, head_step, tensor.shape[0], tensor.strides[0])
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return 0
    if outer and tensor.shape[0] != 1 and tensor.strides[0] < head_step:
        return 0
    if heads == 1:
        step = ALIGNMENT if tokens == 1 else token_step
    else:
        step = head_step if tokens == 1 or token_step == heads * head_step else 0
    return step if step < MAX_ROW_STEP else 0


def _page_slots(*parts: Layout | None) -> int:
    """Token slots from page to page of all parts of a cache, 0 where pages are not one row of slots
    or it is unknown."""
    ckv, steps = parts[0], set()
    assert ckv is not None
    for tensor in (part for part in parts if part is not None):
        page_step, slot_step, _ = tensor.strides
        if any(isinstance(step, torch.SymInt) for step in (page_step, slot_step)):
            return 0
        whole = slot_step >= tensor.shape[2] and page_step % slot_step == 0
        steps.add(page_step // slot_step if whole else 0)
    slots = steps.pop()
    return slots if not steps and ckv.shape[1] <= slots <= INT32_MAX else 0


def shape(tensor: Layout) -> str:
    return f"shape {tuple(tensor.shape)}"
