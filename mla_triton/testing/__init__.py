"""What a test of an attention kernel needs: hostile problems, error budgets, argument checks.

`mla_triton.testing.strategies`, which draws problems for hypothesis, is imported by its own name.
"""

from mla_triton.models import MODELS, Model
from mla_triton.testing.budget import (
    Budget,
    budget_of,
    decode_budget,
    merge_budget,
    prefill_budget,
)
from mla_triton.testing.cache_results import CacheReport, compare_cache
from mla_triton.testing.caches import (
    AppendInputs,
    CacheMemory,
    append_excess,
    append_inputs,
    cache_memory,
)
from mla_triton.testing.calls import assert_correct, plan_of, problem_of, run
from mla_triton.testing.comparison import (
    Deviation,
    Report,
    State,
    assert_same_bits,
    assert_within_budget,
    compare,
    deviations,
    same_bits,
)
from mla_triton.testing.copies import CopyInputs, copy_inputs
from mla_triton.testing.gathers import GatherInputs, gather_inputs
from mla_triton.testing.inputs import (
    check_append_inputs,
    check_copy_inputs,
    check_gather_inputs,
    check_inputs,
    check_prefill_inputs,
)
from mla_triton.testing.merges import MergeInputs, merge_inputs
from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs
from mla_triton.testing.problems import (
    DecodeInputs,
    decode_inputs,
    query_blocks,
    untouched_padding,
)

__all__ = [
    "MODELS",
    "AppendInputs",
    "Budget",
    "CacheMemory",
    "CacheReport",
    "CopyInputs",
    "DecodeInputs",
    "Deviation",
    "GatherInputs",
    "MergeInputs",
    "Model",
    "PrefillInputs",
    "Report",
    "State",
    "append_excess",
    "append_inputs",
    "assert_correct",
    "assert_same_bits",
    "assert_within_budget",
    "budget_of",
    "cache_memory",
    "check_append_inputs",
    "check_copy_inputs",
    "check_gather_inputs",
    "check_inputs",
    "check_prefill_inputs",
    "compare",
    "compare_cache",
    "copy_inputs",
    "decode_budget",
    "decode_inputs",
    "deviations",
    "gather_inputs",
    "merge_budget",
    "merge_inputs",
    "plan_of",
    "prefill_budget",
    "prefill_inputs",
    "problem_of",
    "query_blocks",
    "run",
    "same_bits",
    "untouched_padding",
]
