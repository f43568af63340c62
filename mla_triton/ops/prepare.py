"""What the operations on a cache's tokens need before a launch, found once and kept."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from mla_triton import configs
from mla_triton.device import Device
from mla_triton.ops.merge import Prepared
from mla_triton.ops.plan import launcher
from mla_triton.problem_cache import AppendProblem, CopyProblem, GatherProblem


@lru_cache(maxsize=1024)
def prepare(
    implementation: ModuleType,
    problem: AppendProblem | GatherProblem | CopyProblem,
    device: Device,
    index: int | None,
) -> Prepared:
    """The config that is looked up for a problem, and the launcher of its kernel."""
    config = configs.choose(implementation, problem, device, None).config
    variant = implementation.variant(problem, config, device)
    return Prepared(config, launcher(variant, device, index))
