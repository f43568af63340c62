"""What both decode kernels for Hopper are launched with: TMA views of a cache, strides, sizes."""

from __future__ import annotations

from typing import Any

from mla_triton.kernels.common.launch import View
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.common.tiles import LOG2_E
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem


def maps(problem: DecodeProblem, tensors: DecodeTensors) -> list[View]:
    """Latents and rotary keys, each as one row of slots, whatever page they are in."""
    last_page = tensors.ckv.shape[0] - 1
    rows = last_page * problem.page_slots + problem.page_size
    latents = View(tensors.ckv, (rows, problem.value_dim), (problem.ckv_stride_slot, 1))
    if tensors.kpe is None:
        return [latents, View(tensors.ckv, (rows, problem.key_dim), latents.strides)]
    return [latents, View(tensors.kpe, (rows, problem.rope), (problem.kpe_stride_slot, 1))]


def scale_map(problem: DecodeProblem, tensors: DecodeTensors) -> View:
    """The scales of groups, as one row of the same slots."""
    assert problem.storage is not None
    assert tensors.scales is not None
    pages, _, groups = tensors.scales.shape
    rows = (pages - 1) * problem.page_slots + problem.page_size
    return View(tensors.scales, (rows, groups), (problem.storage.scales_stride_slot, 1))


def row_strides(problem: DecodeProblem, tensors: DecodeTensors) -> list[int]:
    """(request, token, head) strides of queries and results."""
    rows = (tensors.q_nope, tensors.q_rope, tensors.out, tensors.lse)
    return [stride for tensor in rows for stride in strides(tensor, problem.ragged)]


def sizes(problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors) -> list[Any]:
    """From `batch` on, what is no stride."""
    t = tensors
    return [
        problem.batch,
        problem.s_q or 0,
        problem.queries,
        problem.heads,
        min(problem.max_kv_len, t.planned_kv_len),
        t.planned_kv_len,
        problem.num_pages,
        geometry.parts,
        t.softmax_scale * LOG2_E,
    ]
