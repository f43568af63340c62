"""The key that tuned configs of a decode are found by: sizes in the steps in which code changes."""

from __future__ import annotations

from mla_triton.problem import DecodeProblem

Items = tuple[tuple[str, str | int], ...]
"""A key of tuned configs, sorted by name."""
MAX_S_Q_BUCKET = 4
PAGE_BUCKETS = (64, 16, 1)


def tuning_key(problem: DecodeProblem, row_tile: int) -> Items:
    """Heads and query tokens count as the next power of two, a page as the largest of
    `PAGE_BUCKETS` that divides it: the same instructions, with other masks."""
    key: dict[str, str | int] = {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "format": "16bit",
        "latent": problem.latent,
        "rope": problem.rope,
        "value_dim": problem.value_dim,
        "heads": bucket(problem.heads),
        "s_q": min(bucket(problem.mean_s_q), MAX_S_Q_BUCKET),
        "page_size": next(page for page in PAGE_BUCKETS if problem.page_size % page == 0),
        "row_tile": row_tile,
    }
    return tuple(sorted(key.items()))


def bucket(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()
