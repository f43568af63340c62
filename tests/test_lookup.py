"""From a problem to its config: total, deterministic, the user's rows first, and it says why.

The tables are made up; those of the package play no part but where a test says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tables
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tables import CARD, header

from mla_triton import configs
from mla_triton import device as devices
from mla_triton.configs import lookup, shipped, store
from mla_triton.configs.table import Items, Row, Table
from mla_triton.device import KIB, Device
from mla_triton.kernels.portable import decode as portable
from mla_triton.kernels.portable import decode_config
from mla_triton.problem import DecodeProblem
from mla_triton.testing import compilation

INVENTED = tuple(
    Device(f"card {arch}", "cuda", arch, sm_count=sm_count, shared_memory=size * KIB)
    for arch, sm_count, size in (
        ("sm_88", 20, 99),
        ("sm_91", 144, 227),
        ("sm_103", 160, 227),
        ("sm_130", 200, 227),
        ("sm_135", 64, 99),
    )
)
CARDS = (*map(devices.from_label, devices.KNOWN), *INVENTED)
PLAIN = replace(compilation.problem(), max_kv_len=4096)
TUNED, OTHER = tables.config(16, 8, 1), tables.config(16, 4, 2)
"""Two configs that fit every card and that no heuristic chooses for `PLAIN`."""
UNFIT = tables.config(256, 8, 6)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path))
    configs.forget()
    yield
    configs.forget()


@contextmanager
def looking_in(
    own: Table | None = None, ships: dict[tuple[int, int], Table] | None = None
) -> Iterator[None]:
    """Look-up in these tables alone."""
    ships = ships or {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "load", lambda device: own)
        patch.setattr(shipped, "capabilities", lambda: tuple(sorted(ships)))
        patch.setattr(shipped, "load", lambda capability: ships[capability])
        configs.forget()
        yield
    configs.forget()


def row(
    values: Items = TUNED,
    problem: DecodeProblem = PLAIN,
    device: Device = CARD,
    batch: int | None = None,
    length: int | None = None,
    us: float | None = 10.0,
) -> Row:
    """Of the point that a problem is looked up by, or of another batch or length of its key."""
    key, own_batch, own_length = portable.tuning_point(problem, device)
    length = length or configs.length_bucket(own_length)
    return tables.row(batch or own_batch, length, values, us, key)


def choose(problem: DecodeProblem = PLAIN, device: Device = CARD) -> configs.Choice:
    return configs.choose(portable, problem, device)


def config(values: Items) -> portable.Config:
    return portable.Config(**dict(values))


def capability(device: Device) -> tuple[int, int]:
    assert device.capability is not None
    return device.capability


@st.composite
def problems(draw: st.DrawFn) -> DecodeProblem:
    dimensions = (*compilation.DIMENSIONS, compilation.ROPE_INSIDE, (512, 128, 512), (16, 16, 16))
    latent, rope, value_dim = draw(st.sampled_from(dimensions))
    batch = draw(st.integers(1, 4) | st.integers(1, 2000))
    s_q = draw(st.none() | st.integers(1, 9) | st.integers(1, 500))
    return DecodeProblem(
        dtype=draw(st.sampled_from(compilation.DTYPES)),
        batch=batch,
        s_q=s_q,
        queries=draw(st.integers(1, 5 * batch)) if s_q is None else batch * s_q,
        heads=draw(st.integers(1, 128)),
        latent=latent,
        rope=rope,
        value_dim=value_dim,
        page_size=draw(st.sampled_from((1, 5, 16, 32, 48, 64, 128))),
        csr=draw(st.booleans()),
        causal=draw(st.booleans()),
        fused=draw(st.booleans()),
        ckv_stride_slot=latent + rope,
        kpe_stride_slot=0,
        aligned=draw(st.sampled_from((True, True, False))),
        allow_tf32=draw(st.booleans()),
        max_kv_len=draw(st.integers(0, 300_000) | st.just(2**31 - 1)),
    )


VALUES = st.builds(
    tables.config,
    st.sampled_from((16, 32, 64, 128, 256, 48, 0)),
    st.sampled_from((4, 8, 3)),
    st.integers(0, 7),
)


@st.composite
def tables_of(draw: st.DrawFn, problem: DecodeProblem, device: Device) -> Table | None:
    """Rows of the problem's key, usable or not; None for no table."""
    if portable.tuning_point(problem, device) is None or draw(st.booleans()):
        return None
    powers = st.integers(0, 20).map(lambda power: 1 << power)
    made = draw(
        st.dictionaries(
            st.tuples(st.integers(1, 300), powers),
            st.tuples(VALUES, st.none() | st.just(12.5)),
            max_size=4,
        )
    )
    rows = [
        row(values, problem, device, batch, length, us)
        for (batch, length), (values, us) in made.items()
    ]
    return Table(header(device), tuple(rows))


# -- every call gets a config


@settings(max_examples=300)
@given(st.data())
def test_every_problem_gets_a_valid_config_on_every_card(data):
    device = data.draw(st.sampled_from((*CARDS, devices.INTERPRETER, devices.CPU)))
    problem = data.draw(problems())
    assume(portable.why_not(problem, device) is None)
    own = data.draw(tables_of(problem, device))
    below = data.draw(tables_of(problem, device))
    ships = {} if below is None or device.capability is None else {device.capability: below}
    with looking_in(own, ships):
        first = choose(problem, device)
        configs.forget()
        assert choose(problem, device) == first, "the same again"
    tf32 = decode_config.precision(problem, device) == "tf32"
    valid, rule = portable.is_valid(first.config, replace(problem, allow_tf32=tf32), device)
    assert valid, rule
    assert (first.row is None) is (first.source == "heuristic")
    if first.row is None:
        assert first.config == portable.heuristic(problem, device)
        assert first.reason.startswith("heuristic: ")
    else:
        assert config(first.row.config) == first.config
        table = own if first.source == "user" else below
        assert first.row in table.rows


@given(problems(), st.sampled_from(CARDS))
def test_the_tables_of_the_package_serve_every_problem(problem, device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "load", lambda device: None)
        choice = choose(problem, device)
    tf32 = decode_config.precision(problem, device) == "tf32"
    assert portable.is_valid(choice.config, replace(problem, allow_tf32=tf32), device)[0]
    assert choice.source in ("tuned", "modelled", "heuristic")


@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float32}, {"aligned": False}],
    ids=["float32", "misaligned"],
)
def test_what_is_never_tuned_gets_the_heuristic(changes):
    problem = replace(PLAIN, **changes)
    with looking_in(tables.table(row()), {(9, 0): tables.table(row())}):
        choice = choose(problem)
    assert choice.source == "heuristic"
    expected, reason = portable.choose(problem, CARD)
    assert choice == (expected, "heuristic", f"heuristic: {reason}", None)


def test_the_interpreter_never_looks_into_a_table():
    with looking_in(tables.table(row()), {(9, 0): tables.table(row())}):
        choice = choose(device=devices.INTERPRETER)
        for device in (devices.INTERPRETER, devices.CPU):
            assert lookup.origins(device) == ()
    assert choice.source == "heuristic"
    assert "table" not in choice.reason


# -- whose rows


def test_the_users_rows_come_first():
    with looking_in(tables.table(row(TUNED)), {(9, 0): tables.table(row(OTHER, us=1.0))}):
        choice = choose()
    assert (choice.source, choice.config) == ("user", config(TUNED))


def test_the_rows_of_a_key_come_from_one_table():
    """A row of the user's far away comes before a shipped one that is exact."""
    own = tables.table(row(TUNED, batch=1, length=1))
    with looking_in(own, {(9, 0): tables.table(row(OTHER))}):
        choice = choose()
        assert (choice.source, choice.config) == ("user", config(TUNED))
        other_key = choose(replace(PLAIN, heads=5))
        assert other_key.source == "heuristic"
    more = tables.table(row(OTHER), row(OTHER, replace(PLAIN, heads=5)))
    with looking_in(own, {(9, 0): more}):
        assert choose().source == "user"
        assert choose(replace(PLAIN, heads=5)).source == "tuned", "the user has no rows of this key"


@pytest.mark.parametrize(("us", "source"), [(10.0, "tuned"), (None, "modelled")])
def test_shipped_rows_are_tuned_or_modelled(us, source):
    with looking_in(None, {(9, 0): tables.table(row(us=us))}):
        assert choose().source == source


# -- which row


SIZES = st.integers(1, 300)
POWERS = st.integers(0, 18).map(lambda power: 1 << power)


@given(
    st.lists(st.tuples(SIZES, POWERS), min_size=1, max_size=8, unique=True),
    SIZES,
    st.integers(0, 300_000),
)
def test_the_nearest_batch_then_the_nearest_length(tuned, batch, length):
    problem = replace(PLAIN, batch=batch, queries=batch, max_kv_len=length)
    own = tables.table(*(row(problem=problem, batch=b, length=n) for b, n in tuned))
    with looking_in(own):
        found = choose(problem).row.point
    batches = sorted(b for b, _ in tuned)
    near = next((b for b in batches if b >= batch), batches[-1])
    lengths = sorted(n for b, n in tuned if b == near)
    # A tuned length is a power of two: not below the length is not below its bucket.
    far = next((n for n in lengths if n >= length), lengths[-1])
    assert (found.batch, found.length) == (near, far)


@given(st.integers(0, 2**31 - 1))
def test_the_bucket_of_a_length(length):
    bucket = configs.length_bucket(length)
    assert bucket & (bucket - 1) == 0
    assert bucket // 2 < max(1, length) <= bucket


@pytest.mark.parametrize("length", [2049, 3000, 4096])
def test_lengths_of_a_bucket_are_one(length):
    own = tables.table(*(row(problem=PLAIN, length=n) for n in (2048, 4096, 8192)))
    with looking_in(own):
        choice = choose(replace(PLAIN, max_kv_len=length))
    assert choice.row.point.length == 4096
    assert choice.reason.startswith("row (batch 64, length 4096) of "), "exact in its bucket"


def test_heads_and_query_tokens_count_as_powers_of_two():
    with looking_in(tables.table(row(problem=replace(PLAIN, heads=16)))):
        for heads in range(9, 17):
            assert choose(replace(PLAIN, heads=heads)).source == "user", heads
        for heads in (8, 17):
            assert choose(replace(PLAIN, heads=heads)).source == "heuristic", heads
        for page_size in (64, 128, 192):
            assert choose(replace(PLAIN, page_size=page_size)).source == "user", page_size
        for page_size in (1, 16, 48):
            assert choose(replace(PLAIN, page_size=page_size)).source == "heuristic", page_size


# -- what does not fit


def test_a_row_that_does_not_fit_is_passed_over():
    valid, rule = portable.is_valid(config(UNFIT), PLAIN, CARD)
    assert not valid
    with looking_in(tables.table(row(UNFIT)), {(9, 0): tables.table(row(OTHER))}):
        choice = choose()
    assert (choice.source, choice.config) == ("tuned", config(OTHER))

    with looking_in(tables.table(row(UNFIT)), {(9, 0): tables.table(row(UNFIT))}):
        choice = choose()
    assert (choice.source, choice.row) == ("heuristic", None)
    assert choice.config == portable.heuristic(PLAIN, CARD)
    passed = f"passed over {dict(UNFIT)} of {store.path(CARD)}: {rule}"
    assert passed in choice.reason
    assert f"passed over {dict(UNFIT)} of the shipped sm90.json: {rule}" in choice.reason
    assert "no tuned row" not in choice.reason


@pytest.mark.parametrize(
    "values",
    [
        (),
        TUNED[:2],
        (*TUNED, ("num_ctas", 1)),
        (("block_m", 16), *TUNED[1:]),
        (("block_n", "16"), *TUNED[1:]),
        (("block_n", True), *TUNED[1:]),
    ],
)
def test_a_config_of_other_fields_is_passed_over(values):
    with looking_in(tables.table(row(values))):
        choice = choose()
    assert choice.source == "heuristic"
    assert "a config has the integers block_n, num_stages, num_warps" in choice.reason


# -- which shipped table


SHIPPED = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize(
    ("arch", "serves"),
    [
        ("sm_80", (8, 0)),
        ("sm_86", (8, 6)),
        ("sm_87", (8, 6)),
        ("sm_88", (8, 6)),
        ("sm_89", (8, 9)),
        ("sm_90", (9, 0)),
        ("sm_91", (9, 0)),
        ("sm_100", (10, 0)),
        ("sm_103", (10, 0)),
        ("sm_110", None),
        ("sm_120", (12, 0)),
        ("sm_121", (12, 0)),
        ("sm_130", None),
        ("sm_75", None),
    ],
)
def test_the_nearest_lower_table_of_a_family_serves(arch, serves):
    device = replace(CARD, arch=arch)
    made = {
        at: Table(replace(header(), capability=f"{at[0]}.{at[1]}"), (row(device=device),))
        for at in SHIPPED
    }
    with looking_in(None, made):
        assert shipped.nearest(device) == serves
        if capability(device) < (8, 0):
            return
        choice = choose(device=device)
    if serves is None:
        assert choice.source == "heuristic"
        assert choice.reason.endswith(f"; no tuned row: {device.label} has no table")
        return
    assert choice.source == "tuned"
    assert f"of the shipped sm{serves[0]}{serves[1]}.json" in choice.reason
    note = f"{device.label} has no table, the nearest lower one serves"
    assert (note in choice.reason) is (serves != capability(device))


def test_the_lowest_of_a_family_has_none_below():
    with looking_in(None, {(8, 6): tables.table(row())}):
        assert shipped.nearest(replace(CARD, arch="sm_80")) is None


def test_amd_has_no_shipped_table_and_the_users_serves():
    amd = devices.from_label("gfx942")
    with looking_in(None, {(9, 0): tables.table(row())}):
        assert choose(device=amd).reason.endswith("no tuned row: gfx942 has no table")
    with looking_in(Table(header(amd), (row(tables.config(16, 4, 1), device=amd),))):
        choice = choose(device=amd)
        assert (choice.source, choice.config) == ("user", portable.Config(16, 4, 1))


def test_shipped_tables_are_what_their_names_say():
    """Those that the package has."""
    for at in shipped.capabilities():
        table = shipped.load(at)
        assert table.header.capability == f"{at[0]}.{at[1]}"
        assert table.rows
    assert shipped.stem(CARD) == "sm90"
    assert shipped.stem(devices.from_label("gfx942")) == "gfx942"


# -- the reason


def test_the_reason_says_where_from():
    rule = portable.is_valid(config(TUNED), PLAIN, CARD)[1]
    exact, near = row(us=12.34), row(batch=100, length=8192, us=None)
    faster = replace(exact, heuristic_us=15.0)
    h200 = Table(replace(header(), gpu="NVIDIA H200"), (exact,))
    for own, ships, reason in (
        (
            tables.table(faster),
            None,
            f"row (batch 64, length 4096) of {store.path(CARD)}, timed on {CARD.name}, 12.3 us "
            f"(heuristic 15.0); {rule}",
        ),
        (
            None,
            h200,
            "row (batch 64, length 4096) of the shipped sm90.json, timed on NVIDIA H200, 12.3 us "
            f"(heuristic 12.3); {rule}",
        ),
        (
            None,
            tables.table(near),
            "nearest row (batch 100, length 8192) of the shipped sm90.json, modelled: never timed; "
            f"{rule}",
        ),
    ):
        with looking_in(own, ships and {(9, 0): ships}):
            assert choose().reason == reason


def test_the_reason_says_why_there_is_no_row():
    because = portable.choose(PLAIN, CARD)[1]
    with looking_in():
        assert choose().reason == f"heuristic: {because}; no tuned row: 9.0 has no table"
    with looking_in(tables.table(row(problem=replace(PLAIN, heads=64)))):
        assert choose().reason == (
            f"heuristic: {because}; no tuned row: "
            "no table has its key (implementation, dtype, format, heads, latent, page_size, rope, "
            "row_tile, s_q, value_dim)"
        )


# -- how often


def test_tables_are_read_once_until_forgotten(monkeypatch):
    reads = []
    monkeypatch.setattr(shipped, "capabilities", lambda: ())
    monkeypatch.setattr(store, "load", reads.append)
    for heads in (8, 16, 16):
        choose(replace(PLAIN, heads=heads))
    assert reads == [CARD]
    choose(device=replace(CARD, name="another card"))
    assert len(reads) == 2
    configs.forget()
    choose()
    assert len(reads) == 3


def test_a_call_asks_once_for_a_bucket_of_lengths(monkeypatch):
    """Equal problems may differ in their longest request; one config is found for its bucket."""
    from mla_triton.ops import decode

    asked, right = [], configs.choose

    def counts(implementation, problem, device, row_tile):
        asked.append(configs.length_bucket(problem.max_kv_len))
        return right(implementation, problem, device, row_tile)

    def prepare(max_kv_len: int):
        problem = replace(PLAIN, max_kv_len=max_kv_len)
        bucket = configs.length_bucket(max_kv_len)
        return decode.prepare(portable, problem, CARD, 0, None, bucket)

    monkeypatch.setattr(configs, "choose", counts)
    own = tables.table(row(TUNED, length=4096), row(OTHER, length=8192))
    decode.prepare.cache_clear()
    try:
        with looking_in(own):
            middle = [prepare(length) for length in (4096, 2049, 3000, 4096)]
            longer = [prepare(length) for length in (8192, 4097)]
            middle += [prepare(2500)]
    finally:
        decode.prepare.cache_clear()
    assert asked == [4096, 8192]
    assert all(ready is middle[0] for ready in middle)
    assert all(ready is longer[0] for ready in longer)
    stages = [dict(ready.kernel.variant.constants)["STAGES"] for ready in (middle[0], longer[0])]
    assert stages == [1, 2], "each bucket runs its own row's config"


def test_calls_of_one_bucket_ask_once(monkeypatch, device):
    """The same through the operation itself."""
    import mla_triton
    from mla_triton.ops import decode

    asked, right = [], configs.choose

    def counts(implementation, problem, device, row_tile):
        asked.append(configs.length_bucket(problem.max_kv_len))
        return right(implementation, problem, device, row_tile)

    monkeypatch.setattr(configs, "choose", counts)
    decode.prepare.cache_clear()
    q_nope = torch.randn(1, 1, 16, 128, device=device, dtype=torch.float16)
    q_rope = torch.randn(1, 1, 16, 32, device=device, dtype=torch.float16)
    cache = torch.randn(4, 16, 160, device=device, dtype=torch.float16)
    pages = torch.arange(4, dtype=torch.int32, device=device)[None]
    for length in (33, 64, 40, 32, 64):
        lengths = torch.tensor([length], dtype=torch.int32, device=device)
        mla_triton.decode(
            q_nope, q_rope, cache, pages, lengths,
            softmax_scale=0.1, max_kv_len=length, impl="portable",
        )  # fmt: skip
    decode.prepare.cache_clear()
    assert asked == [64, 32]


def test_nothing_is_said_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in CARDS:
            choose(device=device)
