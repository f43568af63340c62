"""Baselines: other libraries' decode, run on our inputs in the same run as ours.

A baseline is a function

    def name(inputs: protocol.Inputs) -> list[Callable[[], torch.Tensor]]

that returns one call for each copy of the cache, `inputs.caches[i]`. A call decodes and returns the
result as `[batch, s_q, heads, 512]`; it is captured into a CUDA graph, so it neither waits for the
device nor plans. What a library makes once a step (metadata, `plan()`) is made before, outside the
calls. It raises NotImplementedError for a cell that the library does not run. Name one as
`--baseline peers:flashmla`, or from a file of your own as `--baseline path/to/file.py:function`.

The wrappers below follow the libraries' documented interfaces; each names the package it misses.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from protocol import Inputs

Call = Callable[[], torch.Tensor]
Baseline = Callable[["Inputs"], list[Call]]

WORKSPACE = 128 << 20
PAGE_ROW = 576


def load(name: str) -> Baseline:
    """`module:function` or `file.py:function`; ValueError says what is wrong with it."""
    place, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"baseline must be module:function or file.py:function, got {name!r}")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else None
        found = getattr(module or importlib.import_module(place), function, None)
    except ImportError as error:
        raise ValueError(f"baseline {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"baseline {name!r} must name a function, got {found!r}")
    return found


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _need(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f"baseline {name} needs the package {package.split('.')[0]!r}: {error}"
        raise ImportError(message) from error


def flashmla(inputs: Inputs) -> list[Call]:
    """FlashMLA; its schedule is made at the warm-up call and reused by every other."""
    library = _need("flash_mla", "flashmla")
    metadata, splits = library.get_mla_metadata()

    def call_on(cache: torch.Tensor) -> Call:
        pages = cache.unsqueeze(2)

        def call() -> torch.Tensor:
            out, _ = library.flash_mla_with_kvcache(
                inputs.q,
                pages,
                inputs.page_table,
                inputs.kv_lens,
                inputs.latent,
                metadata,
                splits,
                softmax_scale=inputs.softmax_scale,
                causal=True,
            )
            return out

        return call

    return [call_on(cache) for cache in inputs.caches]


def _flashinfer(inputs: Inputs, backend: str) -> list[Call]:
    library = _need("flashinfer.mla", f"flashinfer_{backend}")
    batch, s_q, heads, _ = inputs.q.shape
    device = inputs.q.device
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = library.BatchMLAPagedAttentionWrapper(workspace, backend=backend)
    table = inputs.page_table
    steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
    wrapper.plan(
        steps * s_q,
        steps * table.shape[1],
        table.flatten(),
        inputs.kv_lens,
        heads,
        inputs.latent,
        inputs.rope,
        inputs.caches.shape[2],
        True,
        inputs.softmax_scale,
        inputs.q.dtype,
        inputs.q.dtype,
    )
    q_nope, q_rope = (q.flatten(0, 1).contiguous() for q in (inputs.q_nope, inputs.q_rope))
    out = torch.empty_like(q_nope)

    def call_on(cache: torch.Tensor) -> Call:
        latents, ropes = cache[..., : inputs.latent], cache[..., inputs.latent :]

        def call() -> torch.Tensor:
            wrapper.run(q_nope, q_rope, latents, ropes, out=out)
            return out.view(batch, s_q, heads, inputs.latent)

        return call

    return [call_on(cache) for cache in inputs.caches]


def flashinfer_fa2(inputs: Inputs) -> list[Call]:
    return _flashinfer(inputs, "fa2")


def flashinfer_fa3(inputs: Inputs) -> list[Call]:
    return _flashinfer(inputs, "fa3")


def sglang(inputs: Inputs, splits: int = 16) -> list[Call]:
    """SGLang's Triton decode with one number of splits; `sglang_8` and `sglang_32` are others."""
    library = _need("sglang.srt.layers.attention.triton_ops.decode_attention", "sglang")
    batch, s_q, heads, _ = inputs.q.shape
    if s_q != 1:
        raise NotImplementedError("sglang decodes one query token a request")
    device, page = inputs.q.device, inputs.caches.shape[2]
    within = torch.arange(page, dtype=torch.int32, device=device)
    slots = (inputs.page_table[..., None] * page + within).flatten()
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    starts = starts * (inputs.page_table.shape[1] * page)
    counts = torch.full((batch,), splits, dtype=torch.int32, device=device)
    q = inputs.q.squeeze(1)
    out = torch.empty(batch, heads, inputs.latent, dtype=q.dtype, device=device)
    shape = (batch, heads, splits)
    logits = torch.empty(*shape, inputs.latent, dtype=torch.float32, device=device)
    lse = torch.empty(shape, dtype=torch.float32, device=device)

    def call_on(cache: torch.Tensor) -> Call:
        keys = cache.view(-1, 1, PAGE_ROW)
        values = keys[..., : inputs.latent]

        def call() -> torch.Tensor:
            library.decode_attention_fwd(
                q,
                keys,
                values,
                out,
                starts,
                slots,
                logits,
                lse,
                counts,
                splits,
                inputs.softmax_scale,
                1.0,
                1.0,
            )
            return out.unsqueeze(1)

        return call

    return [call_on(cache) for cache in inputs.caches]


def sglang_8(inputs: Inputs) -> list[Call]:
    return sglang(inputs, 8)


def sglang_32(inputs: Inputs) -> list[Call]:
    return sglang(inputs, 32)
