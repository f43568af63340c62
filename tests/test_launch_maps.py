"""Launches of a kernel that reads through TMA descriptors, without a GPU: what stands for a map."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from test_launch import Compiled

from mla_triton import device as devices
from mla_triton.kernels.common.launch import (
    KNOWN_LAUNCHER,
    Described,
    Launcher,
    Recording,
    Variant,
    View,
)
from mla_triton.kernels.common.schedule import result_size
from mla_triton.kernels.common.tensors import DecodeTensors
from mla_triton.kernels.sm90 import decode as sm90
from mla_triton.testing import compilation

CARD = devices.from_label("9.0")
PAGES, BATCH, HEADS = 5, 64, 128
FUSED = compilation.problem(heads=HEADS)
PAIR = replace(FUSED, fused=False, ckv_stride_slot=512, kpe_stride_slot=64)
HEAD = (2, 66, 1, "stream of 0", "function", "packed", None, None, None)
BEFORE_ARGUMENTS = len(HEAD)


class Maker:
    """Stands in for what makes a descriptor: remembers each, and gives a handle and its sizes."""

    def __init__(self) -> None:
        self.made: list[tuple[int, tuple[int, ...], tuple[int, ...], str]] = []

    def __call__(self, described: Described, metadata: str) -> list[Any]:
        self.made.append((described.data_ptr(), described.shape, described.strides, metadata))
        handle = f"map {len(self.made)} of {metadata}"
        return [handle, *described.shape, *described.strides]


def wrapped(launcher: Any, *_: Any) -> Any:
    """As Triton 3.6 wraps the launcher of a kernel with maps: it makes them at every launch."""

    def inner(*arguments: Any) -> None:
        pytest.fail(f"descriptors are made anew, for {launcher}, {arguments}")

    return inner


class CompiledWithMaps(Compiled):
    """Triton's CompiledKernel of a kernel with two maps."""

    metadata = SimpleNamespace(tensordesc_meta=["latents", "rope"])

    def __init__(self, wrap: Any = wrapped) -> None:
        super().__init__()
        self.run.launch = wrap(self.run.launch)


@pytest.fixture
def maker(monkeypatch) -> Maker:
    made = Maker()
    monkeypatch.setattr(triton.backends.nvidia.driver, "make_tensordesc_arg", made)
    return made


def use(monkeypatch, compiled: Compiled, version: str) -> Compiled:
    """Every variant compiles to this, on a GPU that is not there, under that Triton."""
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(Variant, "compile", lambda self, device: compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver = SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return compiled


def tensors(pair: bool = False, pages: int = PAGES) -> DecodeTensors:
    geometry = sm90.geometry(FUSED, CARD)
    q = torch.empty(BATCH, 1, HEADS, 576, dtype=torch.bfloat16)
    widths = (512, 64) if pair else (576,)
    ckv, *kpe = (torch.empty(pages, 64, width, dtype=torch.bfloat16) for width in widths)
    return DecodeTensors(
        q_nope=q[..., :512],
        q_rope=q[..., 512:],
        ckv=ckv,
        kpe=kpe[0] if pair else None,
        scales=None,
        pages=torch.zeros(BATCH, 7, dtype=torch.int32),
        indptr=None,
        kv_lens=torch.zeros(BATCH, dtype=torch.int32),
        cu_seqlens_q=None,
        schedule=torch.zeros(result_size(geometry), dtype=torch.int32),
        planned_kv_len=448,
        partial_out=torch.empty(geometry.partial_rows, 512),
        partial_lse=torch.empty(geometry.partial_rows),
        out=torch.empty(BATCH, 1, HEADS, 512, dtype=torch.bfloat16),
        lse=torch.empty(BATCH, 1, HEADS),
        softmax_scale=0.5,
    )


def hopper_launcher(problem: Any = FUSED) -> Launcher:
    geometry = sm90.geometry(problem, CARD)
    return Launcher(sm90.variant(problem, sm90.Config(2), geometry, CARD), CARD, 0)


def call(launcher: Any, given: DecodeTensors, problem: Any = FUSED) -> None:
    sm90.launch(launcher, problem, sm90.geometry(problem, CARD), given)


def by_name(launcher: Launcher, launch: tuple, of_a_map: int) -> dict[str, Any]:
    """The arguments of a launch by the kernel's names, of a map the values that stand for it."""
    values = list(launch[BEFORE_ARGUMENTS:])
    got = {}
    for name, kind in launcher.variant.types:
        count = of_a_map if kind.startswith("tensordesc") else 1
        got[name], values = values[:count] if count > 1 else values[0], values[count:]
    assert values == [None] * len(launcher.variant.constants)
    return got


# -- what a kernel is given


def test_maps_and_numbers_reach_the_kernel(monkeypatch, maker):
    compiled = use(monkeypatch, CompiledWithMaps(), "3.6.0")
    launcher, given = hopper_launcher(), tensors()
    assert (launcher.pointers, launcher.maps) == (13, 2)
    call(launcher, given)
    (launch,) = compiled.launches
    assert launch[:BEFORE_ARGUMENTS] == HEAD
    got = by_name(launcher, launch, 5)
    assert got["q_nope"] == given.q_nope.data_ptr()
    assert got["indptr"] is None
    assert got["lse"] == given.lse.data_ptr()
    assert (got["ckv"], got["kpe"]) == (given.ckv.data_ptr(), None)
    rows = PAGES * 64
    assert got["half_map"] == ["map 1 of latents", rows, 512, 576, 1]
    assert got["rope_map"] == ["map 2 of rope", rows, 576, 576, 1]
    assert (got["page_rows"], got["rope_column"]) == (64, 512)
    assert (got["q_nope_stride_b"], got["table_size"]) == (HEADS * 576, 7)
    assert (got["batch"], got["heads"], got["num_pages"]) == (BATCH, HEADS, FUSED.num_pages)
    assert got["scale_log2"] == pytest.approx(0.5 * 1.4426950408889634)
    address = given.ckv.data_ptr()
    assert maker.made == [
        (address, (rows, 512), (576, 1), "latents"),
        (address, (rows, 576), (576, 1), "rope"),
    ]


def test_a_pair_of_tensors_has_a_map_each(monkeypatch, maker):
    use(monkeypatch, CompiledWithMaps(), "3.6.0")
    given = tensors(pair=True)
    call(hopper_launcher(PAIR), given, PAIR)
    rows = PAGES * 64
    assert maker.made == [
        (given.ckv.data_ptr(), (rows, 512), (512, 1), "latents"),
        (given.kpe.data_ptr(), (rows, 64), (64, 1), "rope"),
    ]


def test_a_map_ends_with_the_last_page_where_pages_lie_apart():
    """Behind the last page of a layer may be the end of the allocation."""
    apart = replace(FUSED, page_slots=3 * 64)
    for view in sm90.maps(apart, tensors()):
        assert view.shape[0] == (PAGES - 1) * 3 * 64 + 64
    assert {view.shape[0] for view in sm90.maps(FUSED, tensors(pages=1))} == {64}


def test_a_descriptor_is_made_once_for_the_same_memory(monkeypatch, maker):
    compiled = use(monkeypatch, CompiledWithMaps(), "3.6.0")
    launcher, given = hopper_launcher(), tensors()
    for _ in range(3):
        call(launcher, given)
    assert len(maker.made) == 2
    assert compiled.launches[0] == compiled.launches[1] == compiled.launches[2]
    call(launcher, given._replace(q_nope=given.q_nope.clone()))
    assert len(maker.made) == 2, "of the cache alone"
    call(launcher, given._replace(ckv=tensors().ckv))
    assert len(maker.made) == 4, "another address"
    call(launcher, given._replace(ckv=given.ckv[:3]))
    assert len(maker.made) == 6, "fewer pages at the same address"
    call(launcher, given, replace(FUSED, ckv_stride_slot=640))
    assert len(maker.made) == 8, "other strides at the same address"
    call(launcher, given)
    assert len(maker.made) == 8


def test_each_launcher_has_descriptors_of_its_own(monkeypatch, maker):
    """Their boxes are those of its kernel."""
    use(monkeypatch, CompiledWithMaps(), "3.6.0")
    given = tensors()
    for _ in range(2):
        call(hopper_launcher(), given)
    assert len(maker.made) == 4


# -- a launcher of Triton's that is not known


def test_another_triton_makes_its_descriptors_itself(monkeypatch, maker):
    compiled = use(monkeypatch, CompiledWithMaps(), "3.9.0")
    launcher, given = hopper_launcher(), tensors()
    call(launcher, given)
    call(launcher, given)
    first, again = compiled.launches
    assert first[:BEFORE_ARGUMENTS] == HEAD
    got = by_name(launcher, first, 1)
    latents, rope = got["half_map"], got["rope_map"]
    assert latents == Described(given.ckv.data_ptr(), (PAGES * 64, 512), (576, 1))
    assert (rope.shape, rope.strides, rope.base, rope.padding) == (
        (PAGES * 64, 576), (576, 1), rope, "zero"
    )  # fmt: skip
    assert again == first
    assert maker.made == []


def test_a_kernel_with_scratch_memory_makes_its_descriptors_itself(monkeypatch, maker):
    compiled = CompiledWithMaps()
    compiled.run.global_scratch_size = 16
    use(monkeypatch, compiled, "3.6.0")
    launcher = hopper_launcher()
    call(launcher, tensors())
    assert isinstance(by_name(launcher, compiled.launches[0], 1)["half_map"], Described)
    assert maker.made == []


@pytest.mark.skipif(
    not triton.__version__.startswith(KNOWN_LAUNCHER), reason="another Triton has another launcher"
)
def test_tritons_own_wrapper_is_taken_off(monkeypatch, maker):
    """The name of its inner launcher is Triton's: a release that moves it is seen here."""

    def wrap(launch: Any) -> Any:
        signature = dict(hopper_launcher().variant.types)
        return triton.backends.nvidia.driver.wrap_handle_tensordesc(
            launch, signature, CompiledWithMaps.metadata.tensordesc_meta
        )

    compiled = use(monkeypatch, CompiledWithMaps(wrap), triton.__version__)
    launcher, given = hopper_launcher(), tensors()
    call(launcher, given)
    call(launcher, given)
    assert len(maker.made) == 2
    assert by_name(launcher, compiled.launches[1], 5)["half_map"][0] == "map 1 of latents"


# -- recordings


def order(given: DecodeTensors) -> list[torch.Tensor | None]:
    return [value for value in given if value is None or isinstance(value, torch.Tensor)]


def addresses(given: DecodeTensors) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in order(given)]


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
@pytest.mark.parametrize("pair", [False, True])
def test_a_recording_is_replayed_over_another_cache(monkeypatch, maker, version, pair):
    compiled = use(monkeypatch, CompiledWithMaps(), version)
    problem = PAIR if pair else FUSED
    launcher, first, other = hopper_launcher(problem), tensors(pair), tensors(pair)
    recording = Recording(order(first))
    call(recording.launching(launcher), first, problem)
    assert recording.is_replayable
    recording.replay(addresses(other))
    recording.replay(addresses(first))
    call(launcher, other, problem)
    once, moved, again, expected = compiled.launches
    assert again == once
    assert moved == expected != once
    if version == "3.6.0":
        caches = [(given.ckv, given.kpe if pair else given.ckv) for given in (first, other)]
        assert [made[0] for made in maker.made] == [t.data_ptr() for two in caches for t in two]


def test_arguments_are_split_by_kind():
    launcher, given = hopper_launcher(), tensors()
    arguments = sm90.arguments(FUSED, sm90.geometry(FUSED, CARD), given)
    pointed, rest = launcher.split(arguments)
    assert len(pointed) == launcher.pointers + launcher.maps
    assert pointed[-2] is pointed[-1] is given.ckv
    assert pointed[3] is None
    assert rest[:2] == [((PAGES * 64, 512), (576, 1)), ((PAGES * 64, 576), (576, 1))]
    assert len(pointed) + len(rest) == len(arguments) + launcher.maps
    assert not any(isinstance(value, (torch.Tensor, View)) for value in rest)


def test_variants_name_maps_between_pointers_and_numbers():
    variant = hopper_launcher().variant
    names = [name for name, _ in variant.types] + [name for name, _ in variant.constants]
    assert names == list(variant.function.arg_names)
    kinds = ["*" if k.startswith("*") else "t" if k.startswith("tensordesc") else "i"
             for _, k in variant.types]  # fmt: skip
    assert kinds == sorted(kinds, key="*ti".index)
