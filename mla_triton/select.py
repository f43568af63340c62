"""Which implementation computes a problem, and why none of the others does.

The first candidate without a reason against it is taken. There are two kinds of reasons: that an
implementation cannot run a problem, and that it can but the next one is to be preferred. Only the
first kind is one against an implementation that is asked for by name, which is taken or refused,
never replaced.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from mla_triton import reference
from mla_triton.device import Device
from mla_triton.kernels import sm90
from mla_triton.kernels.portable import append as portable_append
from mla_triton.kernels.portable import copy_pages as portable_copy
from mla_triton.kernels.portable import decode as portable_decode
from mla_triton.kernels.portable import decode_config as portable_config
from mla_triton.kernels.portable import gather as portable_gather
from mla_triton.kernels.portable import merge as portable_merge
from mla_triton.kernels.portable import prefill as portable_prefill
from mla_triton.kernels.portable import prefill_config
from mla_triton.kernels.sm90 import decode_config as sm90_config
from mla_triton.kernels.sm90 import prefill_config as sm90_prefill_config
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem, MergeProblem, PrefillProblem
from mla_triton.problem_cache import AppendProblem, CopyProblem, GatherProblem

CONFIGURED = {"sm90": sm90_config, "portable": portable_config}
"""How the kernels of decode are configured, which needs no compiler and no Gluon."""
PORTABLE = {"decode": portable_decode, "prefill": portable_prefill}
Reasons = tuple[tuple[str, str | None], ...]
"""(implementation, why it does not take the problem or None), best first."""


class Selection(NamedTuple):
    name: str
    module: ModuleType
    """`mla_triton.kernels.<name>.<operation>`, or `mla_triton.reference`."""
    reasons: Reasons


def _taken(operation: str, reasons: Reasons, device: Device, impl: str | None) -> str:
    """The implementation that is asked for, else the first without a reason against it."""
    if impl is not None:
        known = dict(reasons)
        if impl not in known:
            raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
        reason = known[impl]
        if reason is not None and impl != "reference":
            raise NotImplementedError(f"impl {impl!r} cannot run this {operation}: {reason}")
        return impl
    for name, reason in reasons:
        if reason is None:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    message = f"no implementation of {operation} can run on {device.label}: {listed}"
    raise NotImplementedError(message)


WAITS = "it synchronises and copies"


def why_not_reference(device: Device, cost: str = WAITS) -> str | None:
    """The reference copies, and of most operations reads lengths: never on a GPU by itself."""
    if device.backend in ("cuda", "hip"):
        return f"{cost}; on a GPU it runs only when asked for (impl='reference')"
    return None


def why_not_sm90(
    problem: DecodeProblem, device: Device, impl: str | None, like: Geometry | None
) -> str | None:
    """The first reason: what it cannot do, then why portable goes first, then that Gluon is not one
    that it knows. The last is asked last because importing Gluon takes a while.

    With a plan it is not asked which of the two is faster: the one that the plan was cut for runs.
    """
    reason = sm90_config.why_not(problem, device)
    if reason is None and impl is None:
        if like is None:
            reason = sm90_config.why_slower(problem, device)
        else:
            reason = sm90_config.why_not_cut(problem, like)
    return reason or sm90.why_not_loaded("decode")


def why_not_sm90_prefill(problem: PrefillProblem, device: Device, impl: str | None) -> str | None:
    """The same of prefill, which has no plans."""
    reason = sm90_prefill_config.why_not(problem, device)
    if reason is None and impl is None:
        reason = sm90_prefill_config.why_slower(problem, device)
    return reason or sm90.why_not_loaded("prefill")


def _module_of(operation: str, name: str) -> ModuleType:
    """The module of an implementation that no reason is known against."""
    if name == "sm90":
        module, reason = sm90.load(operation)
        assert module is not None, reason
        return module
    return PORTABLE[operation] if name == "portable" else reference


def name_decode(
    problem: DecodeProblem,
    device: Device,
    impl: str | None = None,
    like: Geometry | None = None,
) -> tuple[str, Reasons]:
    """(name, reasons) for a problem on a device; `like` is the geometry of a plan to be followed.

    A plan that none of the kernels can follow is refused by what is chosen, not here.

    Raises ValueError for an `impl` that does not exist, NotImplementedError with every reason where
    nothing can take the problem, or where `impl` cannot.
    """
    reasons = (
        ("sm90", why_not_sm90(problem, device, impl, like)),
        ("portable", portable_config.why_not(problem, device)),
        ("reference", why_not_reference(device)),
    )
    return _taken("decode", reasons, device, impl), reasons


def choose_decode(
    problem: DecodeProblem,
    device: Device,
    impl: str | None = None,
    like: Geometry | None = None,
) -> Selection:
    """The same with the module that runs, which is loaded for it."""
    name, reasons = name_decode(problem, device, impl, like)
    return Selection(name, _module_of("decode", name), reasons)


decode = lru_cache(maxsize=4096)(choose_decode)
"""The same, remembered."""


def choose_merge(problem: MergeProblem, device: Device, impl: str | None = None) -> Selection:
    """What merges states on a device; raises as `name_decode` does."""
    return _portable("merge", portable_merge, "it copies, in float64", problem, device, impl)


merge = lru_cache(maxsize=1024)(choose_merge)


def choose_append(problem: AppendProblem, device: Device, impl: str | None = None) -> Selection:
    """What writes tokens to a cache on a device; raises as `name_decode` does."""
    return _portable("append", portable_append, WAITS, problem, device, impl)


append = lru_cache(maxsize=1024)(choose_append)


def choose_gather(problem: GatherProblem, device: Device, impl: str | None = None) -> Selection:
    """What reads tokens of a cache into rows on a device; raises as `name_decode` does."""
    return _portable("gather", portable_gather, WAITS, problem, device, impl)


gather = lru_cache(maxsize=1024)(choose_gather)


def choose_copy_pages(problem: CopyProblem, device: Device, impl: str | None = None) -> Selection:
    """What copies pages on a device; raises as `name_decode` does."""
    return _portable("copy_pages", portable_copy, WAITS, problem, device, impl)


copy_pages = lru_cache(maxsize=1024)(choose_copy_pages)


def _portable(
    operation: str, module: ModuleType, cost: str, problem: Any, device: Device, impl: str | None
) -> Selection:
    """The choice where there are the portable kernel and the reference alone."""
    reasons = (
        ("portable", module.why_not(problem, device)),
        ("reference", why_not_reference(device, cost)),
    )
    name = _taken(operation, reasons, device, impl)
    return Selection(name, module if name == "portable" else reference, reasons)


def choose_prefill(problem: PrefillProblem, device: Device, impl: str | None = None) -> Selection:
    """What computes a prefill on a device, with the reasons.

    Raises ValueError for an `impl` that does not exist, NotImplementedError with every reason where
    nothing can take the problem, or where `impl` cannot.
    """
    reasons = (
        ("sm90", why_not_sm90_prefill(problem, device, impl)),
        ("portable", prefill_config.why_not(problem, device)),
        ("reference", why_not_reference(device)),
    )
    name = _taken("prefill", reasons, device, impl)
    return Selection(name, _module_of("prefill", name), reasons)


prefill = lru_cache(maxsize=4096)(choose_prefill)
"""The same, remembered."""
