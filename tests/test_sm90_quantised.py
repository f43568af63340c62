"""The Hopper kernel over e4m3 keys as far as a machine without one can see it."""

from __future__ import annotations

from dataclasses import replace

import ptxas
import pytest
import torch

from mla_triton import device as devices
from mla_triton import select
from mla_triton.cache import named
from mla_triton.cache.formats import E4M3
from mla_triton.kernels.common.launch import Variant, View
from mla_triton.kernels.common.tensors import DecodeTensors
from mla_triton.kernels.sm90 import decode, decode_config, quantised, quantised_groups
from mla_triton.kernels.sm90.decode import Config
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem, Storage
from mla_triton.testing import compilation
from mla_triton.tuning import workers
from mla_triton.tuning.workers import Job

CARD = devices.from_label("9.0")
ONE_SCALE = Storage(None, 0, torch.float32, 0)
TOKEN_SCALES = Storage(torch.bfloat16, 128, torch.float32, 164)


def problem(heads: int = 16, **changes: object) -> DecodeProblem:
    page_size = changes.pop("page_size", 64)
    dimensions = changes.pop("dimensions", (512, 64, 512))
    plain = compilation.problem(heads=heads, page_size=page_size, dimensions=dimensions)
    return replace(plain, **({"storage": ONE_SCALE} | changes))


def grouped(heads: int = 16, page_size: int = 64, **changes: object) -> DecodeProblem:
    """Over pages of 656 bytes a token."""
    plain = compilation.problem(heads=heads, page_size=page_size)
    return replace(named.over(plain, "fp8_ds_mla"), **changes)


PROBLEMS = {
    "16 rows": problem(),
    "32 rows": problem(32),
    "64 rows": problem(64),
    "float16": problem(dtype=torch.float16),
    "causal": problem(8, s_q=2, queries=128, causal=True),
    "ragged": problem(s_q=None, causal=True, csr=True),
    "pages of 16": problem(page_size=16),
    "pages of 128": problem(page_size=128),
    "without rotary keys": problem(dimensions=(512, 0, 512)),
    "64 rows without rotary keys": problem(64, dimensions=(512, 0, 512)),
    "groups": grouped(),
    "groups, 32 rows": grouped(32),
    "groups, causal": grouped(8, s_q=2, queries=128, causal=True),
    "groups, ragged": grouped(s_q=None, causal=True, csr=True, page_size=128),
    "groups, pages of 16": grouped(page_size=16),
    "groups, pages of 32": grouped(20, page_size=32),
    "groups, 64 rows": grouped(64),
    "groups, 40 of 64 rows": grouped(40, s_q=None, causal=True, csr=True, page_size=16),
}
WHOLE_SM = {"16 rows, a whole SM": problem(), "32 rows, a whole SM": problem(32)}
"""By plans that have one program for each."""
SPILLED = {
    "32 rows": 112,
    "64 rows": 384,
    "64 rows without rotary keys": 384,
    "groups, 32 rows": 160,
    "groups, causal": 80,
    "groups, ragged": 96,
    "groups, pages of 32": 160,
    "groups, 40 of 64 rows": 512,
    "groups, 64 rows": 512,
}
"""Bytes of stack a thread, where accumulators take more than half of its registers: most of it for
what is to be known of rows at the ends of a group."""
FEW_BYTES = 64


def variant(given: DecodeProblem, like: Geometry | None = None) -> Variant:
    return decode.variant(given, Config(1), decode.geometry(given, CARD, like=like), CARD)


def variant_named(name: str) -> Variant:
    if name in PROBLEMS:
        return variant(PROBLEMS[name])
    given = WHOLE_SM[name]
    return variant(given, replace(decode.geometry(given, CARD), parts=CARD.sm_count))


@pytest.fixture(scope="module")
def compiled() -> dict[str, workers.Compiled]:
    names = [*PROBLEMS, *WHOLE_SM]
    jobs = [Job(variant_named(name), CARD, with_spills=True) for name in names]
    return {names[number]: answer for number, answer in workers.run(jobs)}


def test_it_compiles_for_every_problem(compiled):
    assert len(compiled) == len(PROBLEMS) + len(WHOLE_SM)
    assert {name: answer.error for name, answer in compiled.items() if answer.error} == {}


def test_as_many_programs_fit_an_sm_as_are_to_run_there(compiled):
    """Each has 1 KiB that nobody sees."""
    per_sm = CARD.shared_memory + 1024
    for name, answer in compiled.items():
        made = variant_named(name)
        assert (name in WHOLE_SM) <= (made.num_warps == 8)
        assert 8 // made.num_warps * (answer.shared_memory + 1024) <= per_sm, name
    for name, given in PROBLEMS.items():
        count = decode_config.programs(given, decode.geometry(given, CARD).row_tile)
        assert variant(given).num_warps == 8 // count, name


def test_a_program_is_of_two_warpgroups_where_a_plan_has_one_for_each_sm():
    for make, heads, rows in ((problem, 16, 16), (problem, 32, 32), (grouped, 16, 16)):
        given = make(heads)
        whole = decode.geometry(given, CARD)
        assert (whole.row_tile, whole.lanes * whole.parts) == (rows, 2 * CARD.sm_count)
        assert variant(given, whole).num_warps == 4
        one = replace(whole, parts=CARD.sm_count)
        assert variant(given, one).num_warps == 8
        fixed = replace(one, fixed=True)
        assert decode.variant(given, Config(1), fixed, CARD).num_warps == 4


@pytest.mark.parametrize(
    ("heads", "batch", "tile", "programs"),
    [
        (16, 8, 128, 132),
        (16, 9, 64, 264),
        (128, 2, 128, 132),
        (128, 3, 64, 264),
    ],
)
def test_few_requests_have_sms_to_themselves(heads, batch, tile, programs):
    """And blocks of 128 keys, so that no piece has half of one; but where a result must not depend
    on how many there are."""
    given = problem(heads, batch=batch, queries=batch)
    made = decode.geometry(given, CARD)
    assert (made.kv_tile, made.lanes * made.parts) == (tile, programs)
    assert variant(given).num_warps == tile // 16
    fixed = replace(given, fixed_pieces=3)
    assert decode.geometry(fixed, CARD).kv_tile == 64
    assert variant(fixed).num_warps == 4


@pytest.mark.parametrize(("heads", "batch"), [(128, 16), (64, 32), (33, 32), (96, 16)])
@pytest.mark.parametrize("make", [problem, grouped])
def test_tiles_of_64_rows_where_there_are_many(make, heads, batch):
    """Of which one has an SM, in three partitions; not where it depends on how many there are."""
    given = make(heads, batch=batch, queries=batch)
    made = decode.geometry(given, CARD)
    assert (made.row_tile, made.kv_tile, made.lanes) == (64, 64, -(-heads // 64))
    assert made.lanes * made.parts == CARD.sm_count
    constants = dict(variant(given).constants)
    assert constants["MAKER_REGISTERS"] > 0
    for other in (
        make(heads, batch=batch - 1, queries=batch - 1),
        replace(given, fixed_pieces=3),
    ):
        assert decode.geometry(other, CARD).row_tile == 32
        assert dict(variant(other).constants)["MAKER_REGISTERS"] == 0


def test_partitions_share_all_registers():
    """Sixteen warps: two warpgroups of output, one of weights, and the loader's."""
    for forms in (quantised.FORMS, quantised.GROUPED_FORMS):
        form = forms[64, 8]
        for_output = (16 * form.registers - 4 * (form.maker_registers + 24)) // 8
        assert 16 * 32 * form.registers <= 65536
        # Of which 128 are accumulators.
        assert for_output >= 168


def test_little_spills(compiled):
    for name, answer in compiled.items():
        assert answer.spilled <= SPILLED.get(name, FEW_BYTES), name


def remarks_on(name: str) -> str:
    return ptxas.with_remarks(lambda: variant_named(name).compile(CARD))[1]


def test_products_do_not_wait_for_each_other():
    """Serialised by ptxas, where registers are short, 32 heads took 490 us instead of 360."""
    names = [*PROBLEMS, *WHOLE_SM]
    for name, remarks in zip(names, compilation.side_by_side(remarks_on, names), strict=True):
        assert "ptxas info" in remarks
        assert "serialized" not in remarks, name


def ptx_of(name: str) -> str:
    return variant_named(name).compile(CARD).asm["ptx"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return compilation.side_by_side(ptx_of, ["16 rows", "groups", "64 rows", "groups, 64 rows"])


@pytest.fixture
def ptx(texts) -> str:
    return texts[0]


@pytest.fixture
def grouped_ptx(texts) -> str:
    return texts[1]


def test_bytes_become_operands_in_registers(ptx):
    """As many conversions as a block has pairs of numbers for a thread, once for each product, and
    no 16-bit tile on its way back to shared memory."""
    pairs = 128 * (512 + 64) // 256 // 2 + 128 * 512 // 256 // 2
    assert ptx.count("cvt.rn.f16x2.e4m3x2") == pairs
    first, last = ptx.index("cvt.rn.f16x2.e4m3x2"), ptx.rindex("cvt.rn.f16x2.e4m3x2")
    stores = [line for line in ptx[first:last].splitlines() if "st.shared.v4" in line]
    # What is cleared past the last key.
    assert len(stores) <= 8 * 4


def test_products_are_of_sixteen_queries(ptx):
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16") == 36 + 32
    assert ptx.count("wgmma.mma_async") == 36 + 32


def test_bytes_of_groups_become_operands_in_registers(grouped_ptx):
    """float16 of keys for scores, bfloat16 of latents for the output, whose bytes come by as few
    loads as there can be; rotary keys as they are."""
    pairs = 128 * 512 // 256 // 2
    assert grouped_ptx.count("cvt.rn.f16x2.e4m3x2") == pairs
    assert grouped_ptx.count("mul.rn.bf16x2") == pairs
    assert grouped_ptx.count("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16") == pairs * 2 // 16
    assert grouped_ptx.count("ldmatrix") == pairs * 2 // 16
    product = "wgmma.mma_async.sync.aligned.m64n16k16.f32"
    assert grouped_ptx.count(f"{product}.f16.f16") == 32
    assert grouped_ptx.count(f"{product}.bf16.bf16") == 4 + 32
    assert grouped_ptx.count("wgmma.mma_async") == 32 + 4 + 32


def test_of_64_rows_a_byte_is_converted_once_for_each_product(texts):
    """By the one warpgroup that makes weights, and by the two that make the output."""
    text = texts[2]
    assert text.count("cvt.rn.f16x2.e4m3x2") == (64 * 576 // 128 + 64 * 512 // 256) // 2
    product = "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"
    assert text.count(product) == 36 + 512 // 128 * 64 // 16
    assert text.count("wgmma.mma_async") == text.count(product)
    text = texts[3]
    assert text.count("cvt.rn.f16x2.e4m3x2") == 64 * 512 // 128 // 2
    assert text.count("mul.rn.bf16x2") == 64 * 512 // 256 // 2
    product = "wgmma.mma_async.sync.aligned.m64n64k16.f32"
    assert text.count(f"{product}.f16.f16") == 32
    assert text.count(f"{product}.bf16.bf16") == 4 + 16


def halves(words: torch.Tensor) -> torch.Tensor:
    """The bfloat16 numbers that 32-bit words, in int64, are two of: `[2, words]`, the low first."""
    bits = torch.stack([words & 0xFFFF, words >> 16])
    return (bits << 16).to(torch.uint32).view(torch.float32).bfloat16()


def computed(assembly: str, word: torch.Tensor) -> list[torch.Tensor]:
    """The two results of the few instructions that `PAIRS` is made of, over 32-bit words."""
    values = {"$2": word}

    def operand(name: str) -> torch.Tensor:
        return values[name] if name in values else torch.full_like(word, int(name, 16))

    for line in assembly.split(";")[1:-1]:
        name, *rest = line.replace(",", "").split()
        target, first, *others = rest
        if name == "prmt.b32":
            source, result = operand(first), torch.zeros_like(word)
            for place in range(4):
                choice = int(others[1], 16) >> 4 * place & 15
                byte = source >> 8 * (choice & 3) & 255
                byte = torch.where(byte > 127, 255, 0) if choice & 8 else byte
                result |= byte << 8 * place
        elif name == "shl.b32":
            result = operand(first) << int(others[0]) & 0xFFFFFFFF
        elif name == "and.b32":
            result = operand(first) & operand(others[0])
        elif name == "mov.b32":
            result = operand(first)
        else:
            assert name == "mul.rn.bf16x2"
            product = halves(operand(first)) * halves(operand(others[0]))
            low, high = product.view(torch.int16).long() & 0xFFFF
            result = low | high << 16
        values[target] = result
    return [values["$0"], values["$1"]]


def test_pairs_of_bytes_become_pairs_of_bfloat16():
    """Every byte in each of the four places; the two keys of a column are side by side."""
    byte = torch.arange(256)
    number = byte.to(torch.uint8).view(E4M3).float()
    is_number = ~number.isnan()
    for shift in (1, 100):
        others = [byte.roll(shift * place) for place in range(4)]
        word = sum(other << 8 * place for place, other in enumerate(others))
        even, odd = (halves(result) for result in computed(quantised_groups.PAIRS.value, word))
        for got, place in ((even[0], 0), (odd[0], 1), (even[1], 2), (odd[1], 3)):
            expected, known = number.roll(shift * place), is_number.roll(shift * place)
            assert torch.equal(got.float()[known], expected[known])
            assert (got.float()[~known].abs() == 480).all(), "finite, for 0 times it is to be 0"


# -- what it takes

REFUSED_SCALES = (
    "of quantised caches it reads those with one scale for all latents, or bfloat16 rotary keys "
    "and a float32 scale for each 128 of 512 columns"
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"storage": TOKEN_SCALES._replace(group=64)}, REFUSED_SCALES),
        ({"storage": TOKEN_SCALES._replace(scale=torch.uint8)}, REFUSED_SCALES),
        ({"storage": TOKEN_SCALES._replace(scales_stride_slot=6)}, REFUSED_SCALES),
        ({"storage": TOKEN_SCALES._replace(rope=torch.float16)}, REFUSED_SCALES),
        ({"storage": TOKEN_SCALES, "dtype": torch.float16}, REFUSED_SCALES),
        ({"storage": TOKEN_SCALES, "dimensions": (256, 64, 256)}, REFUSED_SCALES),
        ({"storage": TOKEN_SCALES, "dimensions": (512, 0, 512)}, REFUSED_SCALES),
        (
            {"storage": TOKEN_SCALES, "page_slots": 0},
            "e4m3 keys come by TMA, from evenly spaced pages of 16, 32 or a multiple of 64",
        ),
        (
            {"dimensions": (256, 64, 256)},
            "of e4m3 keys it reads latents of 512 columns, got 256",
        ),
        (
            {"page_size": 48},
            "e4m3 keys come by TMA, from evenly spaced pages of 16, 32 or a multiple of 64",
        ),
        (
            {"page_slots": 0},
            "e4m3 keys come by TMA, from evenly spaced pages of 16, 32 or a multiple of 64",
        ),
        (
            {"dimensions": (448, 64, 512)},
            "its queries come in one tensor where no key column is behind the value",
        ),
    ],
)
def test_what_it_does_not_take(changes, reason):
    given = problem(**changes)
    assert decode.why_not(given, CARD) == reason
    assert select.name_decode(given, CARD)[0] == "portable"


@pytest.mark.parametrize("make", [problem, grouped])
@pytest.mark.parametrize(("heads", "rows"), [(1, 16), (16, 16), (17, 32), (33, 64), (128, 64)])
def test_it_comes_first_with_a_tile_for_the_rows(heads, rows, make):
    given = make(heads)
    assert select.name_decode(given, CARD)[0] == "sm90"
    made = decode.geometry(given, CARD)
    assert (made.row_tile, made.lanes) == (rows, -(-heads // rows))
    assert dict(variant(given).constants)["ROWS"] == rows


@pytest.mark.parametrize("make", [problem, grouped])
@pytest.mark.parametrize("heads", [4, 16, 32, 128])
@pytest.mark.parametrize("impl", ["sm90", "portable"])
def test_it_follows_every_plan_that_knows_no_storage(impl, heads, make):
    given = make(heads)
    planned = replace(given, storage=None).as_planned()
    if impl == "portable":
        from mla_triton.kernels.portable import decode as other
    else:
        other = decode
    like = other.geometry(planned, CARD)
    assert select.name_decode(given, CARD, None, like)[0] == "sm90"
    followed = decode.geometry(given, CARD, like=like)
    assert (followed.kv_tile, followed.row_tile, followed.parts) == (
        like.kv_tile, like.row_tile, like.parts,
    )  # fmt: skip
    made = variant(given, like)
    assert dict(made.constants)["ROWS"] == like.row_tile
    assert dict(made.constants)["TILE"] == like.kv_tile
    assert programs(given, followed) == (like.lanes, like.parts, 1)


def tensors(given: DecodeProblem, pages: int = 5) -> DecodeTensors:
    """Of a call, without memory, over pages of 656 bytes a token or a fused cache."""

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if given.storage.group:
        packed = made(pages, 656 * given.page_size, dtype=torch.uint8)
        ckv, kpe, scales = named.parts("fp8_ds_mla", packed, given.page_size)
    else:
        ckv, kpe = made(pages, given.page_size, given.key_dim, dtype=E4M3), None
        scales = made(2, dtype=torch.float32)
    rows = (given.batch, given.s_q, given.heads)
    ints = made(given.batch, 7, dtype=torch.int32)
    partial = made(1, dtype=torch.float32)
    return DecodeTensors(
        made(*rows, given.latent), made(*rows, given.rope), ckv, kpe, scales, ints, None, ints,
        None, ints, 448, partial, partial, made(*rows, given.value_dim),
        made(*rows, dtype=torch.float32), 0.1,
    )  # fmt: skip


def launched(given: DecodeProblem, geometry: Geometry) -> tuple[tuple[int, ...], list]:
    calls = []
    decode.launch(lambda *call: calls.append(call), given, geometry, tensors(given))
    [(grid, arguments)] = calls
    return grid, arguments


def programs(given: DecodeProblem, geometry: Geometry) -> tuple[int, ...]:
    return launched(given, geometry)[0]


@pytest.mark.parametrize(("page_size", "apart"), [(64, 1), (16, 1), (128, 3)])
def test_latents_rotary_keys_and_scales_are_rows_of_the_same_slots(page_size, apart):
    given = grouped(page_size=page_size, page_slots=apart * page_size)
    arguments = launched(given, decode.geometry(given, CARD))[1]
    assert len(arguments) == len(variant(given).types)
    latents, rope, scales = (one for one in arguments if isinstance(one, View))
    rows = 4 * apart * page_size + page_size
    assert (latents.shape, latents.strides) == ((rows, 512), (656, 1))
    assert (rope.shape, rope.strides) == ((rows, 64), (328, 1))
    assert (scales.shape, scales.strides) == ((rows, 4), (164, 1))
    offsets = [
        view.tensor.storage_offset() * view.tensor.dtype.itemsize
        for view in (latents, scales, rope)
    ]
    assert offsets == [0, 512, 528]
    box = min(64, page_size)
    types = dict(variant(given).types)
    for name, numbers in (("latent", "fp8e4nv"), ("rope", "bf16"), ("scale", "fp32")):
        columns = {"latent": 512, "rope": 64, "scale": 4}[name]
        assert f"{numbers}[{box}, {columns}]" in types[f"{name}_map"]


def test_a_box_does_not_leave_the_tile_that_a_part_may_begin_at():
    planned = replace(problem(4), storage=None).as_planned()
    from mla_triton.kernels.portable import decode as other

    like = other.geometry(planned, CARD)
    assert like.kv_tile == 32
    types = dict(variant(problem(4), like).types)
    assert "fp8e4nv[32, 512]" in types["latent_map"]
    assert "fp8e4nv[64, 512]" in dict(variant(problem(4)).types)["latent_map"]


@pytest.mark.parametrize(
    ("config", "rows", "answer"),
    [
        (Config(1), None, (True, "two programs an SM")),
        (Config(1), 64, (True, "one program an SM")),
        (Config(1), 128, (False, "its tile has 16 or 32 or 64 rows, got 128")),
        (
            Config(2),
            None,
            (False, "of e4m3 keys all warps have one block in hand, blocks = 1"),
        ),
    ],
)
def test_which_configs_are_valid(config, rows, answer):
    assert decode.is_valid(config, problem(), CARD, rows) == answer


def test_how_many_programs_an_sm_has_is_said():
    together = "all warps of which take a block together"
    for given, rest in (
        (problem(32), f"two programs an SM, {together}"),
        (grouped(16), f"two programs an SM, {together}"),
        (grouped(17), f"one program an SM, {together}"),
        (
            problem(64),
            "one program an SM, one warpgroup of which makes weights while others make the output",
        ),
    ):
        assert decode_config.choose(given, CARD)[1] == f"e4m3 keys: {rest}"
