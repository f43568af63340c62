"""Decodes and prefills the shapes of real models, merges states of one, and holds each result
against the float64 reference; and what the operations of the cache leave, to the bit
(`mla_triton.check_cache`).

On a GPU the requests are long, of very different lengths, and what is right is timed as well. In
Triton's interpreter the same kernels run as Python: fewer heads and keys, no word about speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import mla_triton
from mla_triton import configs, select
from mla_triton import device as devices
from mla_triton.cache import LatentCache
from mla_triton.check_cache import CacheCase
from mla_triton.device import Device
from mla_triton.testing import (
    MODELS,
    DecodeInputs,
    MergeInputs,
    PrefillInputs,
    Report,
    cache_results,
    compare,
    compare_cache,
    decode_inputs,
    merge_inputs,
    plan_of,
    prefill_inputs,
    problem_of,
)
from mla_triton.testing.decode_changes import copied

LONG = (32768, 16384, *[2048] * 8, *[1024] * 12, *[512] * 8, 4097, 130, 65, 64, 63, 1, 0)
"""Keys of each request on a GPU: one holds a third of all, and one nothing."""
SHORT = (150, 33, 1, 0)
"""Keys of each request in the interpreter."""


CHOICES: dict[str, Callable[..., select.Selection]] = {
    "append": select.append,
    "gather": select.gather,
    "copy_pages": select.copy_pages,
}
"""What chooses an implementation of an operation on a cache."""


@dataclass(frozen=True)
class Case:
    """One decode problem: a model's shape on one of `ranks` GPUs, and how it is called."""

    model: str
    dtype: torch.dtype
    ranks: int = 1
    heads: int | None = None
    """Fewer heads than the rank has, where the interpreter would take too long."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further arguments of `decode_inputs`."""

    @property
    def rank_heads(self) -> int:
        return self.heads or MODELS[self.model].heads // self.ranks

    @property
    def shape(self) -> str:
        """ "DeepSeek-V3/8 h16 512+64": a rank of 8, its heads, latent and rope."""
        model = MODELS[self.model]
        ranks = f"/{self.ranks}" if self.ranks > 1 else ""
        return f"{self.model}{ranks} h{self.rank_heads} {model.latent}+{model.rope}"

    @property
    def call(self) -> str:
        """What is special: "s_q 2", "ragged", "csr, page 16"."""
        options = dict(self.options)
        s_q = options.get("s_q", 1)
        said = ["ragged"] if "q_lens" in options else [f"s_q {s_q}"] if s_q > 1 else []
        said += ["csr"] if options.get("table") == "csr" else []
        said += [f"page {options['page_size']}"] if "page_size" in options else []
        said += [options["stored"]] if "stored" in options else []
        return ", ".join(said) or "s_q 1"

    def recipe(self, kv_lens: Sequence[int]) -> dict[str, Any]:
        """Arguments of `decode_inputs`."""
        model = MODELS[self.model]
        return {
            "kv_lens": list(kv_lens),
            "heads": self.rank_heads,
            "latent": model.latent,
            "rope": model.rope,
            "value_dim": model.value_dim,
            "dtype": self.dtype,
            "softmax_scale": model.softmax_scale,
            **dict(self.options),
        }

    def inputs(self, kv_lens: Sequence[int], device: torch.device) -> DecodeInputs:
        return decode_inputs(**self.recipe(kv_lens), device=device)


@dataclass(frozen=True)
class PrefillCase:
    """One prefill: some heads of a model, and what its sequences have."""

    model: str
    dtype: torch.dtype
    heads: int
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    causal: bool = True

    @property
    def shape(self) -> str:
        """ "DeepSeek-V3 h16 192, 128": heads, and columns of keys and of values."""
        model = MODELS[self.model]
        return f"{self.model} h{self.heads} {model.nope + model.rope}, {model.v}"

    @property
    def call(self) -> str:
        return "prefill" if self.causal else "prefill full"

    def recipe(self) -> dict[str, Any]:
        """Arguments of `prefill_inputs`."""
        model = MODELS[self.model]
        return {
            "q_lens": list(self.q_lens),
            "k_lens": list(self.k_lens),
            "heads": self.heads,
            "qk": model.nope + model.rope,
            "v_dim": model.v,
            "rope": model.rope,
            "split_k": True,
            "dtype": self.dtype,
            "causal": self.causal,
        }

    def inputs(self, device: torch.device) -> PrefillInputs:
        return prefill_inputs(**self.recipe(), device=device)


@dataclass(frozen=True)
class MergeCase:
    """One merge of states that a decode of DeepSeek-V3 leaves."""

    tokens: int
    heads: int
    states: int = 2
    dtype: torch.dtype = torch.bfloat16
    value_dim: int = 512

    @property
    def shape(self) -> str:
        return f"merge t{self.tokens} h{self.heads} {self.value_dim}"

    @property
    def call(self) -> str:
        return f"{self.states} states"

    def recipe(self) -> dict[str, Any]:
        """Arguments of `merge_inputs`."""
        return {
            "states": self.states,
            "tokens": (self.tokens,),
            "heads": self.heads,
            "value_dim": self.value_dim,
            "dtype": self.dtype,
        }

    def inputs(self, device: torch.device) -> MergeInputs:
        return merge_inputs(**self.recipe(), device=device)


@dataclass(frozen=True)
class Row:
    """What came of a case. Without a result that is right there is no speed."""

    shape: str
    dtype: str
    call: str
    implementation: str
    config: str
    ok: bool
    message: str
    error: float | None = None
    budget: float | None = None
    """Largest error of an output element, and what it may be, in the row closest to its budget."""
    us: float | None = None
    gbps: float | None = None
    bandwidth_percent: float | None = None


def cases(on_gpu: bool) -> list[Case]:
    return _gpu_cases() if on_gpu else _interpreter_cases()


def prefills(on_gpu: bool) -> list[PrefillCase]:
    """Each pair of widths: a prompt, a chunk behind a prefix, and sequences without one or both."""
    both = (torch.bfloat16, torch.float16)
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    if on_gpu:
        shapes = {"DeepSeek-V3": 16, "GLM-4.7-Flash": 5, "Mistral-Small-4": 8, "MiniCPM3-4B": 10}
        q_lens, k_lens = (1500, 512, 0, 7, 3), (1500, 2560, 64, 4096, 0)
    else:
        shapes = dict.fromkeys(
            ("DeepSeek-V3", "GLM-4.7-Flash", "Mistral-Small-4", "MiniCPM3-4B"), 2
        )
        q_lens, k_lens = (33, 5, 0, 3), (33, 40, 4, 0)
    made = [
        PrefillCase(model, dtype, heads, q_lens, k_lens)
        for model, heads in shapes.items()
        for dtype in (both if on_gpu or model == "DeepSeek-V3" else both[1:])
    ]
    full = PrefillCase("DeepSeek-V3", torch.bfloat16, 2, q_lens, k_lens, causal=False)
    return [*made, full]


def merges(on_gpu: bool) -> list[MergeCase]:
    return [MergeCase(512, 128)] if on_gpu else [MergeCase(5, 16)]


def _gpu_cases() -> list[Case]:
    ranks = [
        ("DeepSeek-V2-Lite", 1),
        ("DeepSeek-V3", 1),
        ("DeepSeek-V3", 8),
        ("DeepSeek-V3", 16),
        ("Kimi-K2", 1),
        ("Kimi-Linear-48B", 1),
        ("GLM-4.7-Flash", 1),
        ("GLM-4.7-Flash", 4),
        ("MiniCPM3-4B", 1),
        ("Mistral-Small-4", 1),
        ("DeepSeek-V4-Flash", 1),
    ]
    made = [Case(model, torch.bfloat16, n) for model, n in ranks]
    # The rest of float16 would be shapes that these have between them.
    skipped = {("Kimi-K2", 1), ("DeepSeek-V3", 8), ("Kimi-Linear-48B", 1), ("GLM-4.7-Flash", 1)}
    for model, n in ranks:
        if (model, n) not in skipped:
            made.append(Case(model, torch.float16, n, options=(("s_q", 2),)))
    ragged = (("q_lens", [1 + i % 5 for i in range(len(LONG))]),)
    return [
        *made,
        Case("DeepSeek-V3", torch.bfloat16, 8, options=ragged),
        Case("DeepSeek-V3", torch.bfloat16, 8, options=(("table", "csr"), ("page_size", 16))),
        Case("DeepSeek-V3", torch.bfloat16, 8, options=(("page_size", 1),)),
        Case("DeepSeek-V3", torch.bfloat16, 8, options=(("stored", "fp8"),)),
        Case("DeepSeek-V3", torch.bfloat16, 8, options=(("stored", "fp8_ds_mla"),)),
        Case("DeepSeek-V2-Lite", torch.float32),
    ]


def _interpreter_cases() -> list[Case]:
    def case(model: str, dtype: torch.dtype, heads: int, **options: Any) -> Case:
        return Case(model, dtype, heads=heads, options=tuple(options.items()))

    return [
        case("DeepSeek-V2-Lite", torch.float16, 16),
        case("DeepSeek-V3", torch.bfloat16, 16),
        case("DeepSeek-V3", torch.float32, 5),
        case("DeepSeek-V3", torch.float16, 8, s_q=2),
        case("DeepSeek-V3", torch.float16, 8, q_lens=[3, 1, 0, 2]),
        case("Kimi-K2", torch.float16, 8, table="csr", page_size=16),
        case("GLM-4.7-Flash", torch.bfloat16, 20, page_size=1),
        case("MiniCPM3-4B", torch.float16, 40),
        case("MiniCPM3-4B", torch.float32, 10, page_size=48),
        case("Mistral-Small-4", torch.bfloat16, 32),
        case("DeepSeek-V3", torch.float16, 8, stored="fp8"),
        case("DeepSeek-V3", torch.bfloat16, 8, stored="fp8_ds_mla"),
        case("DeepSeek-V4-Flash", torch.bfloat16, 8),
        case("DeepSeek-V4-Flash", torch.float32, 8, s_q=2),
    ]


def run(
    todo: Iterable[Case | PrefillCase | MergeCase | CacheCase],
    kv_lens: Sequence[int],
    device: torch.device,
    bandwidth: float | None,
) -> Iterator[Row]:
    """Computes and judges each case; `bandwidth` is bytes per second, None where nothing is timed.

    A case that raises is a row that failed: one broken shape does not hide the others.
    """
    for case in todo:
        row = Row(
            case.shape, str(case.dtype).removeprefix("torch."), case.call, "-", "-", False, ""
        )
        try:
            if isinstance(case, CacheCase):
                yield _judged_cache(case, row, device)
            elif isinstance(case, MergeCase):
                yield _judged_merge(case, row, device, bandwidth)
            elif isinstance(case, PrefillCase):
                yield _judged_prefill(case, row, device, bandwidth is not None)
            else:
                yield _judged(case, row, kv_lens, device, bandwidth)
        except Exception as error:
            yield replace(row, message=f"{type(error).__name__}: {error}")


def _judged(
    case: Case, row: Row, kv_lens: Sequence[int], device: torch.device, bandwidth: float | None
) -> Row:
    inputs = case.inputs(kv_lens, device)
    implementation, config = _what_runs(inputs)
    row = replace(row, implementation=implementation, config=config)
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options)
    row = _with_report(row, compare(state, inputs))
    if not row.ok or bandwidth is None:
        return row
    moved = _bytes(inputs, state.out)
    return _with_time(row, _microseconds(inputs, moved), moved, bandwidth)


def _judged_prefill(case: PrefillCase, row: Row, device: torch.device, is_timed: bool) -> Row:
    inputs = case.inputs(device)
    (q, k, v), options = inputs.call_arguments()
    implementation, config = _chosen(select.prefill, problem_of(inputs), devices.of(device))
    row = replace(row, implementation=implementation, config=config)
    state = mla_triton.prefill(q, k, v, **options)
    row = _with_report(row, compare(state, inputs))
    if not row.ok or not is_timed:
        return row
    from mla_triton import timing

    # Bound by arithmetic: no word about bandwidth.
    copies = [
        [tensor.clone() for tensor in (q, k, v)]
        for _ in range(timing.cold_copies(q.nbytes + k.nbytes + v.nbytes))
    ]

    def call_on(copy: list[torch.Tensor]) -> Any:
        return lambda: mla_triton.prefill(*copy, **options, out=state.out, lse=state.lse)

    return replace(row, us=timing.microseconds([call_on(copy) for copy in copies]))


def _judged_merge(case: MergeCase, row: Row, device: torch.device, bandwidth: float | None) -> Row:
    inputs = case.inputs(device)
    (states,), _ = inputs.call_arguments()
    implementation, config = _chosen(select.merge, problem_of(inputs), devices.of(device))
    row = replace(row, implementation=implementation, config=config)
    state = mla_triton.merge(states)
    row = _with_report(row, compare(state, inputs))
    if not row.ok or bandwidth is None:
        return row
    from mla_triton import timing

    moved = sum(tensor.nbytes for each in (*states, state) for tensor in each)
    copies = [
        [mla_triton.AttentionState(*(t.clone() for t in each)) for each in (*states, state)]
        for _ in range(timing.cold_copies(moved))
    ]

    def call_on(copy: list[mla_triton.AttentionState]) -> Any:
        *given, result = copy
        return lambda: mla_triton.merge(given, out=result.out, lse=result.lse)

    us = timing.microseconds([call_on(copy) for copy in copies])
    return _with_time(row, us, moved, bandwidth)


def _judged_cache(case: CacheCase, row: Row, device: torch.device) -> Row:
    inputs = case.inputs(device)
    choose = CHOICES[case.operation]
    implementation, config = _chosen(choose, cache_results.problem_of(inputs), devices.of(device))
    report = compare_cache(cache_results.run(inputs), inputs)
    return replace(
        row, implementation=implementation, config=config, ok=report.ok, message=report.message
    )


def _with_report(row: Row, report: Report) -> Row:
    return replace(
        row,
        ok=report.ok,
        message=report.message,
        error=_number(report.out_error),
        budget=_number(report.out_budget),
    )


def _with_time(row: Row, us: float, moved: int, bandwidth: float) -> Row:
    percent = 100 * moved / (us * 1e-6) / bandwidth
    return replace(row, us=us, gbps=moved / us / 1e3, bandwidth_percent=percent)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _what_runs(inputs: DecodeInputs) -> tuple[str, str]:
    """Implementation and config that a call with these inputs gets."""
    return _chosen(select.decode, problem_of(inputs), devices.of(inputs.q_nope.device))


def _chosen(
    choose: Callable[..., select.Selection], problem: Any, device: Device
) -> tuple[str, str]:
    """Implementation and config of a problem, in words."""
    chosen = choose(problem, device)
    if chosen.name == "reference":
        return chosen.name, "-"
    config = str(configs.choose(chosen.module, problem, device).config)
    return chosen.name, config.removeprefix("Config(").removesuffix(")").replace("num_", "")


def _bytes(inputs: DecodeInputs, out: torch.Tensor) -> int:
    """Every key once, the queries and the result."""
    query = [inputs.q_nope, *([] if inputs.q_rope is None else [inputs.q_rope])]
    parts = _parts(inputs.cache)
    # Scales that are two for all tokens count as nothing.
    key_bytes = sum(part.shape[-1] * part.itemsize for part in parts if part.dim() == 3)
    keys = int(inputs.kv_lens.clamp_min(0).sum())
    return keys * key_bytes + sum(tensor.nbytes for tensor in (*query, out))


def _microseconds(inputs: DecodeInputs, moved: int) -> float:
    """Time of a call that finds its cache cold, with a plan made before and reused."""
    from mla_triton import timing

    arguments, options = inputs.call_arguments()
    q_nope, q_rope, cache, *rest = arguments
    plan = plan_of(inputs)
    copies = [copied(cache) for _ in range(timing.cold_copies(moved))]

    def call_on(copy: torch.Tensor | LatentCache) -> Any:
        return lambda: mla_triton.decode(q_nope, q_rope, copy, *rest, plan=plan, **options)

    return timing.microseconds([call_on(copy) for copy in copies])


def _parts(cache: torch.Tensor | LatentCache) -> list[torch.Tensor]:
    """The tensors of a cache."""
    whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    return [part for part in whole if part is not None]


def table(rows: Iterable[Row], timed: bool) -> Iterator[str]:
    """A heading, then one line a row as it comes, and below it what went wrong."""
    widths: tuple[int, ...] = (28, 8, 12, 9, 41, 8, 8)
    titles = ["shape", "dtype", "call", "runs", "config", "error", "budget"]
    if timed:
        widths, titles = (*widths, 7, 5, 4), [*titles, "us", "GB/s", "%"]

    def line(texts: Sequence[str]) -> str:
        cells = [
            text.rjust(width) if i >= 7 else text.ljust(width)
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return " ".join(cells).rstrip()

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    yield "       " + line(titles)
    for row in rows:
        texts = [row.shape, row.dtype, row.call, row.implementation, row.config]
        texts += [number(row.error, ".2e"), number(row.budget, ".2e")]
        if timed:
            texts.append(number(row.us, ".1f"))
            texts += [number(row.gbps, ".0f"), number(row.bandwidth_percent, ".0f")]
        yield ("ok     " if row.ok else "FAILED ") + line(texts)
        if not row.ok:
            yield f"       {row.message}"


def heading(device: str, kv_lens: Sequence[int], bandwidth: float | None) -> list[str]:
    """What ran where, in the first lines of the output."""
    batch = f"{len(kv_lens)} requests of {min(kv_lens)} to {max(kv_lens)} keys"
    if bandwidth is None:
        return [
            "Triton's interpreter runs the kernels as Python on the CPU. No GPU code was executed,",
            f"and nothing is said about speed. Each decode: {batch}.",
        ]
    return [
        device,
        f"Each decode: {batch}, {sum(kv_lens)} in all. us: attention and merge from a cold cache, "
        f"the plan made before;",
        f"%: of {bandwidth / 1e9:.0f} GB/s, measured just now by reading a large buffer.",
    ]


def verdict(rows: Sequence[Row]) -> str:
    wrong = sum(not row.ok for row in rows)
    if wrong:
        return f"{wrong} of {len(rows)} shapes FAILED"
    to_the_bit = sum(row.error is None for row in rows)
    said = f"{len(rows) - to_the_bit} shapes are within the error budget of the float64 reference"
    if to_the_bit:
        said += f", {to_the_bit} operations on a cache are the reference's to the bit"
    return f"all {said}"


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a large buffer, measured now."""
    from mla_triton import timing

    return timing.read_bandwidth(device)
