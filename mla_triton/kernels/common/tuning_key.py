"""The keys that tuned configs are found by: sizes in the steps in which code changes."""

from __future__ import annotations

from mla_triton.problem import LARGEST_TILE, DecodeProblem, PrefillProblem

Items = tuple[tuple[str, str | int], ...]
"""A key of tuned configs, sorted by name."""
MAX_S_Q_BUCKET = 4
PAGE_BUCKETS = (64, 16, 1)
SHORT_SEQUENCE = LARGEST_TILE // 2
"""Query tokens up to which the sequences of a prefill count as short."""


def tuning_key(problem: DecodeProblem, row_tile: int) -> Items:
    """Heads and query tokens count as the next power of two, a page as the largest of
    `PAGE_BUCKETS` that divides it: the same instructions, with other masks."""
    key: dict[str, str | int] = {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "format": "16bit" if problem.storage is None else problem.storage.name,
        "latent": problem.latent,
        "rope": problem.rope,
        "value_dim": problem.value_dim,
        "heads": bucket(problem.heads),
        "s_q": min(bucket(problem.mean_s_q), MAX_S_Q_BUCKET),
        "page_size": next(page for page in PAGE_BUCKETS if problem.page_size % page == 0),
        "row_tile": row_tile,
    }
    return tuple(sorted(key.items()))


def prefill_key(problem: PrefillProblem) -> Items:
    """Heads count as the next power of two. Sequences are short, half of a large tile at most, or
    long; `rope` are the columns of the one rotary key, 0 where every head has whole keys."""
    is_short = problem.usual_queries <= SHORT_SEQUENCE
    key: dict[str, str | int] = {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "qk": problem.qk_dim,
        "rope": problem.qk_dim - problem.k_nope,
        "value_dim": problem.value_dim,
        "heads": bucket(problem.heads),
        "s_q": SHORT_SEQUENCE if is_short else LARGEST_TILE,
        "causal": problem.causal,
    }
    return tuple(sorted(key.items()))


def bucket(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()
