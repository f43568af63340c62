"""Multi-head Latent Attention over a paged latent cache: right on every GPU, fast on the one in
front of you.

Functional, without autograd. `mla_triton.reference` defines every result; `mla_triton.testing`
says how close a kernel has to come to it.
"""

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.ops.append import append
from mla_triton.ops.copy_pages import copy_pages
from mla_triton.ops.decode import decode
from mla_triton.ops.gather import gather
from mla_triton.ops.merge import merge
from mla_triton.ops.plan import Plan, plan
from mla_triton.ops.prefill import prefill
from mla_triton.state import AttentionState
from mla_triton.tuning import tune, warmup

__version__ = "0.1.0"

__all__ = [
    "AttentionState",
    "CSRPageTable",
    "LatentCache",
    "Plan",
    "append",
    "copy_pages",
    "decode",
    "gather",
    "merge",
    "plan",
    "prefill",
    "tune",
    "warmup",
]
