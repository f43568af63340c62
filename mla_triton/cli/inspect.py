"""What is in this machine, what would run on a card, and whether it is right."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict, replace

import torch

from mla_triton import device as devices
from mla_triton import explain as explanation
from mla_triton import models
from mla_triton.cache import named
from mla_triton.cache.named import CACHE_FORMATS
from mla_triton.cli import deep
from mla_triton.cli.options import Commands, add_command, natural, positive, show
from mla_triton.device import Device
from mla_triton.explain import CacheProblem, device_facts, device_line
from mla_triton.models import Model
from mla_triton.plan import fixed_pieces
from mla_triton.problem import (
    LARGEST_TILE,
    DecodeProblem,
    MergeProblem,
    PrefillProblem,
    RowSteps,
    usual_queries,
)
from mla_triton.tuning import cache_calls
from mla_triton.tuning.deployment import DTYPES, MAX_HEADS, describe

CACHE_OPERATIONS = ("append", "gather", "copy_pages")


def add_commands(commands: Commands) -> None:
    for name, run, about in (
        ("info", info, "devices, versions and caches of this machine"),
        ("explain", explain, "what would run on a card, with which config, and why"),
        ("check", check, "compute the shapes of real models and compare with float64"),
    ):
        command = add_command(commands, name, run, about, json_file=name == "check")
        if name == "explain":
            _add_shape(command)
        if name == "check":
            deep.add_options(command)


def _add_shape(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--capability", metavar="LABEL", help='"8.9", "gfx942", "cpu"; default: what is here')
    add("--gpu", metavar="NAME", help="its name, for which there are tuned rows: 'NVIDIA H200'")
    add("--impl", metavar="NAME", help="ask for one implementation; never replaced by another")
    add("--model", metavar="NAME", help="take heads and widths from a model")
    add("--tp", type=positive, default=1, metavar="N", help="ranks that share the model's heads")
    add("--heads", type=positive, help="heads of one rank (default 128)")
    add("--latent", type=positive, help="default 512")
    add("--rope", type=natural, help="default 64")
    add("--value-dim", type=positive, help="default: latent; with --prefill the model's values")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--batch", type=positive, default=16)
    add("--s-q", type=positive, default=1, help="query tokens of a request")
    add("--kv-len", type=natural, default=4096, help="cached tokens of a request")
    add("--page-size", type=positive, default=64)
    add("--cache-format", choices=CACHE_FORMATS, default="16bit")
    add("--csr", action="store_true", help="page table in CSR form")
    add("--ragged", action="store_true", help="query tokens by cu_seqlens_q, --s-q on average")
    add("--no-causal", action="store_true")
    add("--batch-invariant", action="store_true", help="a result that no other request changes")
    add(
        "--prefill", action="store_true",
        help="instead, a prefill of --batch sequences, --s-q queries and --kv-len keys each",
    )  # fmt: skip
    add("--qk", type=positive, metavar="N", help="columns of its queries and keys, --rope of them")
    add(
        "--cache-operation", choices=CACHE_OPERATIONS,
        help="instead, an append of --batch x --s-q tokens, a gather of --batch x --kv-len, or a "
        "copy of the pages that hold as many",
    )  # fmt: skip
    add("--states", type=positive, metavar="N", help="a merge of N states that such a call leaves")


def info(arguments: argparse.Namespace) -> int:
    """What is in this machine, as the package sees it."""
    from mla_triton.report import environment

    facts = environment.facts()
    show(facts, arguments, environment.lines(facts))
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """What would run, on the card here or one that is described."""
    try:
        device = _card(arguments)
        if arguments.cache_operation is not None:
            facts = explanation.of_cache(_of_cache(arguments), device, arguments.impl)
            show(facts, arguments, explanation.cache_lines(facts))
            return 0
        problem = _prefill(arguments) if arguments.prefill else _decode(arguments)
        if arguments.states is not None:
            facts = explanation.merge(_merge(arguments.states, problem), device, arguments.impl)
            lines = explanation.merge_lines(facts)
        elif isinstance(problem, PrefillProblem):
            facts = explanation.prefill(problem, device, arguments.impl)
            lines = explanation.prefill_lines(facts)
        else:
            facts = explanation.decode(problem, device, arguments.kv_len, arguments.impl)
            lines = explanation.lines(facts)
    except (ValueError, NotImplementedError) as error:
        arguments.parser.error(str(error))
    show(facts, arguments, lines)
    return 0


def _card(arguments: argparse.Namespace) -> Device:
    label = arguments.capability
    if label is None:
        if arguments.gpu is not None:
            raise ValueError(f"gpu names the card of --capability, got {arguments.gpu!r} alone")
        return devices.current()
    card = devices.from_label(label)
    return card if arguments.gpu is None else replace(card, name=arguments.gpu)


def _rank(arguments: argparse.Namespace) -> tuple[Model, int]:
    """The model, and the heads of one of its ranks."""
    model = models.named(arguments.model or "DeepSeek-V3")
    return model, arguments.heads or models.rank_heads(model.heads, arguments.tp)


def _prefill(arguments: argparse.Namespace) -> PrefillProblem:
    """The prefill that the options describe; ValueError where they describe none."""
    model, heads = _rank(arguments)
    for name in ("latent", "csr", "ragged", "cache_format"):
        value = getattr(arguments, name)
        if value == "16bit":
            continue
        if value:
            raise ValueError(f"{name} must be left out with --prefill, got {value}")
    rope = model.rope if arguments.rope is None else arguments.rope
    width = arguments.qk or model.nope + rope
    if rope >= width:
        raise ValueError(f"rope must be less than qk, {width}, got {rope}")
    queries = arguments.batch * arguments.s_q
    return PrefillProblem(
        dtype=DTYPES[arguments.dtype],
        heads=heads,
        kv_heads=heads,
        qk_dim=width,
        value_dim=arguments.value_dim or model.v,
        q_nope=width,
        k_nope=width - rope,
        causal=not arguments.no_causal,
        usual_queries=(
            LARGEST_TILE if arguments.batch_invariant else usual_queries(queries, arguments.batch)
        ),
        batch_invariant=arguments.batch_invariant,
        batch=arguments.batch,
        queries=queries,
        keys=arguments.batch * arguments.kv_len,
    )


def _decode(arguments: argparse.Namespace) -> DecodeProblem:
    """The decode that the options describe; ValueError where they describe none."""
    model, heads = _rank(arguments)
    if arguments.qk is not None:
        raise ValueError(f"qk must be left out without --prefill, got {arguments.qk}")
    latent = arguments.latent or model.latent
    rope = model.rope if arguments.rope is None else arguments.rope
    same_widths = (latent, rope) == (model.latent, model.rope)
    value_dim = arguments.value_dim or (model.value_dim if same_widths else latent)
    if heads > MAX_HEADS:
        raise ValueError(f"heads must be at most {MAX_HEADS}, got {heads}")
    if value_dim not in (latent, latent + rope):
        raise ValueError(
            f"value-dim must be latent or latent + rope, {latent} or {latent + rope}, "
            f"got {value_dim}"
        )
    plain = DecodeProblem(
        dtype=DTYPES[arguments.dtype],
        batch=arguments.batch,
        s_q=None if arguments.ragged else arguments.s_q,
        queries=arguments.batch * arguments.s_q,
        heads=heads,
        latent=latent,
        rope=rope,
        value_dim=value_dim,
        page_size=arguments.page_size,
        csr=arguments.csr,
        # A single query sees every key, causal or not.
        causal=not arguments.no_causal and (arguments.ragged or arguments.s_q > 1),
        fused=True,
        ckv_stride_slot=latent + rope,
        kpe_stride_slot=0,
        page_slots=arguments.page_size,
        row_steps=RowSteps(latent + rope, latent + rope if rope else 0, value_dim, 1),
        fixed_pieces=fixed_pieces(arguments.kv_len) if arguments.batch_invariant else 0,
        max_kv_len=max(1, arguments.kv_len),
    )
    return named.over(plain, arguments.cache_format)


def _of_cache(arguments: argparse.Namespace) -> CacheProblem:
    """The operation on a cache that the options describe; ValueError where they describe none."""
    for name in ("qk", "prefill", "states", "ragged"):
        value = getattr(arguments, name)
        if value:
            raise ValueError(f"{name} must be left out with --cache-operation, got {value}")
    deployment = describe(
        model=arguments.model, tp=arguments.tp, heads=arguments.heads, latent=arguments.latent,
        rope=arguments.rope, value_dim=arguments.value_dim, dtype=arguments.dtype,
        page_size=arguments.page_size, cache_format=arguments.cache_format,
        table="csr" if arguments.csr else "dense",
    )  # fmt: skip
    if arguments.cache_operation == "append":
        return next(cache_calls.appends(deployment, [arguments.batch * arguments.s_q]))
    if arguments.cache_operation == "gather":
        return next(cache_calls.gathers(deployment, [arguments.batch * arguments.kv_len]))
    pages = arguments.batch * -(-arguments.kv_len // arguments.page_size)
    return replace(next(cache_calls.copies(deployment)), pages=pages)


def _merge(states: int, problem: DecodeProblem | PrefillProblem) -> MergeProblem:
    """The merge of so many states that a call left; ValueError for one alone."""
    if states < 2:
        raise ValueError(f"states must be two or more, got {states}")
    return MergeProblem(
        first_dtype=problem.dtype,
        other_dtype=problem.dtype,
        out_dtype=problem.dtype,
        states=states,
        value_dim=problem.value_dim,
        masked=False,
        rank=1,
        aligned=True,
        rows=problem.queries * problem.heads,
    )


def check(arguments: argparse.Namespace) -> int:
    """Computes the shapes of real models; 0 where all are right, else 1."""
    on_gpu = torch.cuda.is_available() and not devices.interpreting()
    if not on_gpu and not devices.interpreting():
        return _interpreted(arguments)
    if arguments.deep:
        return deep.check(arguments)
    from mla_triton import check as engine
    from mla_triton.check_cache import CacheCase, caches

    device = torch.device("cuda" if on_gpu else "cpu")
    bandwidth = engine.read_bandwidth(device) if on_gpu else None
    kv_lens = engine.LONG if on_gpu else engine.SHORT
    here = device_facts(devices.of(device))
    rows: list[engine.Row] = []

    def keep(row: engine.Row) -> engine.Row:
        rows.append(row)
        return row

    todo: list[engine.Case | engine.PrefillCase | engine.MergeCase | CacheCase] = [
        *engine.cases(on_gpu),
        *engine.prefills(on_gpu),
        *engine.merges(on_gpu),
        *caches(on_gpu),
    ]
    found = map(keep, engine.run(todo, kv_lens, device, bandwidth))
    if arguments.json is not None:
        list(found)
        facts = {
            "device": here,
            "gpu_code_executed": on_gpu,
            "bandwidth_gbps": None if bandwidth is None else bandwidth / 1e9,
            "kv_lens": kv_lens,
            "rows": [asdict(row) for row in rows],
            "ok": all(row.ok for row in rows),
        }
        deep.write_json(facts, arguments.json)
    else:
        print("\n".join(engine.heading(device_line(here), kv_lens, bandwidth)))
        for line in engine.table(found, timed=on_gpu):
            print(line, flush=True)
        print(engine.verdict(rows))
    return 0 if all(row.ok for row in rows) else 1


def _interpreted(arguments: argparse.Namespace) -> int:
    """The same command in a child whose Triton interprets: it decides that when it is imported."""
    command = [sys.executable, "-m", "mla_triton", "check", *deep.words(arguments)]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
