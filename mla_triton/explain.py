"""What would run an operation on a card, how, and why nothing else runs it."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch

from mla_triton import configs, select
from mla_triton.device import Device
from mla_triton.plan import Geometry, cdiv, fixed_piece, schedule
from mla_triton.problem import DecodeProblem, MergeProblem, PrefillProblem, Storage
from mla_triton.problem_cache import AppendProblem, CopyProblem, GatherProblem

CacheProblem = AppendProblem | CopyProblem | GatherProblem


def device_facts(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "label": device.label,
        "backend": device.backend,
        "sm_count": device.sm_count,
        "shared_memory": device.shared_memory,
        "present": not device.modelled,
        "features": device.features(),
        "tables": configs.tables(device),
    }


def decode(
    problem: DecodeProblem, device: Device, kv_len: int, impl: str | None = None
) -> dict[str, Any]:
    """The facts as plain values, ready for JSON; `kv_len` is the length of every request.

    Raises NotImplementedError, with the reason, for an `impl` that cannot run.
    """
    selection = select.decode(problem, device, impl)
    facts = _facts(_problem_facts(problem, kv_len), device, selection, impl)
    facts |= {"geometry": None, "schedule": None}
    if selection.name != "reference":
        choice = configs.choose(selection.module, problem, device)
        geometry = selection.module.geometry(problem, device)
        facts["config"] = _config_facts(choice)
        facts["geometry"] = asdict(geometry) | {"programs": geometry.lanes * geometry.parts}
        facts["schedule"] = _schedule_facts(problem, geometry, kv_len)
    return facts


def prefill(problem: PrefillProblem, device: Device, impl: str | None = None) -> dict[str, Any]:
    """The same of a prefill."""
    return _configured(problem, device, select.prefill(problem, device, impl), impl)


def merge(problem: MergeProblem, device: Device, impl: str | None = None) -> dict[str, Any]:
    """The same of a merge."""
    return _configured(problem, device, select.merge(problem, device, impl), impl)


def of_cache(problem: CacheProblem, device: Device, impl: str | None = None) -> dict[str, Any]:
    """The same of an append, a gather or a copy of pages."""
    if isinstance(problem, AppendProblem):
        selection = select.append(problem, device, impl)
    elif isinstance(problem, GatherProblem):
        selection = select.gather(problem, device, impl)
    else:
        selection = select.copy_pages(problem, device, impl)
    return _configured(problem, device, selection, impl)


def _configured(
    problem: PrefillProblem | MergeProblem | CacheProblem,
    device: Device,
    selection: select.Selection,
    impl: str | None,
) -> dict[str, Any]:
    """The facts of what has a config and no schedule."""
    facts = _facts(_values(problem), device, selection, impl)
    if selection.name != "reference":
        facts["config"] = _config_facts(configs.choose(selection.module, problem, device))
    return facts


def _facts(
    problem: dict[str, Any], device: Device, selection: select.Selection, impl: str | None
) -> dict[str, Any]:
    return {
        "problem": problem,
        "device": device_facts(device),
        "implementation": selection.name,
        "asked_for": impl,
        "candidates": [{"name": name, "why_not": reason} for name, reason in selection.reasons],
        "config": None,
    }


def _config_facts(choice: configs.Choice) -> dict[str, Any]:
    return {
        "text": str(choice.config),
        "source": choice.source,
        "reason": choice.reason,
        **asdict(choice.config),
    }


def _values(problem: Any) -> dict[str, Any]:
    """The fields of a problem, dtypes by their names."""
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return _values(value) if is_dataclass(value) else value


def _problem_facts(problem: DecodeProblem, kv_len: int) -> dict[str, Any]:
    values = _values(problem) | {"kv_len": kv_len}
    storage = problem.storage
    values["storage"] = None if storage is None else _storage_facts(storage)
    return {name: value for name, value in values.items() if name != "num_pages"}


def _storage_facts(storage: Storage) -> dict[str, Any]:
    """The fields of a quantised cache, and its name as tuned rows have it."""
    plain = {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in storage._asdict().items()
    }
    return {"name": storage.name, **plain}


def _schedule_facts(problem: DecodeProblem, geometry: Geometry, kv_len: int) -> dict[str, Any]:
    lengths = [kv_len] * problem.batch
    made = schedule(lengths, [problem.mean_s_q] * problem.batch, problem.heads, geometry)
    used = sum((p.first_group, p.first_tile) != (p.last_group, p.last_tile) for p in made.parts)
    splits = [group.splits for group in made.groups]
    tile = geometry.kv_tile
    return {
        "groups": len(made.groups),
        "splits": max(splits, default=0),
        "fixed_piece": tile * fixed_piece(cdiv(kv_len, tile), tile) if geometry.fixed else None,
        "parts_used": used,
        "merged_groups": sum(n > 1 for n in splits),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of a decode for a reader."""
    problem = facts["problem"]
    page_table = "CSR" if problem["csr"] else "dense"
    queries = "ragged, about" if problem["s_q"] is None else "s_q"
    s_q = problem["s_q"] or -(-problem["queries"] // problem["batch"])
    mask = ", causal" if problem["causal"] else ""
    mask += ", batch-invariant" if problem["fixed_pieces"] else ""
    text = [
        f"problem   {problem['heads']} heads, latent {problem['latent']} + rope {problem['rope']}, "
        f"value {problem['value_dim']}, {problem['dtype']}",
        f"          batch {problem['batch']}, {queries} {s_q}, kv_len {problem['kv_len']}, "
        f"page {problem['page_size']} in a {page_table} table{mask}",
        *_storage_lines(problem["storage"]),
        *_what_runs(facts),
    ]
    if facts["config"] is not None:
        geometry, made = facts["geometry"], facts["schedule"]
        pieces = f"{made['splits']} pieces"
        if made["fixed_piece"]:
            pieces += f" of {made['fixed_piece']} keys, whatever the batch"
        text += [
            f"geometry  tiles of {geometry['kv_tile']} keys x {geometry['row_tile']} rows; "
            f"{geometry['parts']} parts x {geometry['lanes']} lanes = "
            f"{geometry['programs']} programs",
            f"schedule  {made['groups']} groups of rows, each in up to {pieces}: "
            f"{made['parts_used']} parts have work, {made['merged_groups']} groups are merged",
        ]
    return text + _others(facts)


def _storage_lines(storage: dict[str, Any] | None) -> list[str]:
    """How keys are stored, where they are quantised."""
    if storage is None:
        return []
    if not storage["group"]:
        return ["cache     e4m3, one scale for all latents and one for all rotary keys (fp8)"]
    kind = "an e8m0" if storage["scale"] == "uint8" else f"a {storage['scale']}"
    rope = f", {storage['rope']} rotary keys apart" if storage["rope"] else ""
    return [
        f"cache     e4m3, {kind} scale for every {storage['group']} columns{rope} "
        f"({storage['name']})"
    ]


def prefill_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of a prefill for a reader."""
    problem = facts["problem"]
    shared = problem["qk_dim"] - problem["k_nope"]
    mask = ", causal" if problem["causal"] else ""
    mask += ", batch-invariant" if problem["batch_invariant"] else ""
    text = [
        f"problem   prefill, {problem['heads']} heads, qk {problem['qk_dim']} ({shared} of a key "
        f"shared), value {problem['value_dim']}, {problem['dtype']}",
        f"          {problem['batch']} sequences, {problem['queries']} queries and "
        f"{problem['keys']} keys in all{mask}",
    ]
    return text + _what_runs(facts) + _others(facts)


def merge_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of a merge for a reader."""
    problem = facts["problem"]
    text = [
        f"problem   merge of {problem['states']} states, {problem['rows']} rows of "
        f"{problem['value_dim']}, {problem['first_dtype']}"
    ]
    return text + _what_runs(facts) + _others(facts)


def cache_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of an append, a gather or a copy of pages for a reader."""
    problem = facts["problem"]
    if "words" in problem:
        page = sum(problem["words"]) * problem["word_bytes"]
        text = [f"problem   copy of {problem['pages']} pages of {page} bytes"]
    else:
        stored = problem["stored"]
        count = f"append of {problem['tokens']}" if "tokens" in problem else "gather of "
        count += "" if "tokens" in problem else str(problem["rows"])
        scales = "" if stored["scaling"] == "none" else ", scales: one for all"
        if stored["group"]:
            scales = f", scales: {stored['scale_dtype']} for every {stored['group']} columns"
        text = [
            f"problem   {count} tokens, latent {stored['latent']} + rope {stored['rope']}, "
            f"{problem['dtype']}",
            f"cache     latents {stored['latent_dtype']}, rotary keys {stored['rope_dtype']}, "
            f"page {stored['page_size']}{scales}",
        ]
    return text + _what_runs(facts) + _others(facts)


def _what_runs(facts: dict[str, Any]) -> list[str]:
    """The card, the implementation and its config."""
    text = [f"device    {device_line(facts['device'])}", f"runs      {facts['implementation']}"]
    config = facts["config"]
    if config is not None:
        text += [f"config    {config['text']}", f"because   {config['reason']}"]
    return text


def _others(facts: dict[str, Any]) -> list[str]:
    """A line for each implementation that does not run."""
    text = []
    rest = [c for c in facts["candidates"] if c["name"] != facts["implementation"]]
    asked_for = facts["asked_for"]
    preferred = f"{asked_for} was asked for" if asked_for else "the one above comes first"
    for candidate in rest:
        text.append(f"not       {candidate['name']}: {candidate['why_not'] or preferred}")
    return text


def device_line(device: dict[str, Any]) -> str:
    present = "" if device["present"] else ", not in this machine"
    if device["backend"] in ("cpu", "interpreter"):
        return device["name"] + present
    has = ", ".join(name for name, there in device["features"].items() if there) or "none"
    return (
        f"{device['name']} ({device['label']}{present}): {device['sm_count']} SMs, "
        f"{device['shared_memory'] // 1024} KiB shared memory a program; features: {has}"
    )
