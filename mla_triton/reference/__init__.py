"""What every operation means, in plain PyTorch: slow, exact, on any device, without Triton."""

from mla_triton.reference.cache import (
    append,
    copy_pages,
    gather,
    last_of_each,
    normalised,
    rotated,
)
from mla_triton.reference.decode import decode, decode_same_precision
from mla_triton.reference.merge import merge, merge_same_precision
from mla_triton.reference.paging import gather_keys, visible_lengths
from mla_triton.reference.prefill import prefill, prefill_same_precision
from mla_triton.reference.unabsorbed import absorb_queries, attention, project_values

__all__ = [
    "absorb_queries",
    "append",
    "attention",
    "copy_pages",
    "decode",
    "decode_same_precision",
    "gather",
    "gather_keys",
    "last_of_each",
    "merge",
    "merge_same_precision",
    "normalised",
    "prefill",
    "prefill_same_precision",
    "project_values",
    "rotated",
    "visible_lengths",
]
