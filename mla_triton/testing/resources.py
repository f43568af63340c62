"""What a compiled kernel takes of a GPU: read from its machine code, so that no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Resources:
    """Shared memory, registers and spills of one kernel."""

    shared_memory: int
    """Bytes a program."""
    registers: int
    """Registers a thread (vector registers on AMD)."""
    spilled: int
    """Bytes of stack a thread: what registers could not hold, anywhere in the kernel."""
    loop_spills: int
    """Stack accesses inside an innermost loop that multiplies matrices, paid at every step: of all
    such loops, that where they are most frequent."""
    loop_instructions: int
    """Instructions of that loop."""
    instructions: frozenset[str]
    """Families of matrix instructions found: mma.sync, wgmma, tcgen05, mfma, fma."""
    waits_first: bool = True
    """Whether the kernel waits for the one before it before it lets the one behind it begin, where
    it does either: what that one reads without waiting is there then."""


def read(compiled: Any) -> Resources:
    """Resources of a Triton CompiledKernel, for NVIDIA or AMD."""
    if "cubin" in compiled.asm:
        return _nvidia(compiled)
    return _amd(compiled)


def innermost_matrix_loops(
    lines: list[str], label: str, branch: str, matrix: str
) -> list[list[str]]:
    """The lines of every loop that holds a matrix instruction and no other such loop.

    A loop is a backward branch: `label` and `branch` are regular expressions whose first group is
    the label's name.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        if found := re.match(label, line):
            labels[found.group(1)] = number
        elif (found := re.search(branch, line)) and found.group(1) in labels:
            first = labels[found.group(1)]
            holds_matrix = any(re.search(matrix, inside) for inside in lines[first:number])
            # A loop ends before those around it do.
            if holds_matrix and not any(first <= start for start, _ in loops):
                loops.append((first, number))
    return [lines[first:last] for first, last in loops]


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def _most_spilling(loops: list[list[str]], access: str, instruction: str) -> tuple[int, int]:
    """(stack accesses, instructions) of the loop with the largest share of the former."""
    counts = [(_count(loop, access), _count(loop, instruction)) for loop in loops]
    return max(counts, key=lambda count: (count[0] / max(1, count[1]), count[1]), default=(0, 0))


def spilled(compiled: Any) -> int:
    """Bytes of stack a thread: `read(compiled).spilled`, without a look at the instructions."""
    if "cubin" in compiled.asm:
        return int(_usage(compiled)["STACK"])
    return _amd(compiled).spilled


def _usage(compiled: Any) -> dict[str, str]:
    return dict(re.findall(r"(REG|STACK):(\d+)", _tool(compiled, "cuobjdump", "-res-usage")))


def _tool(compiled: Any, name: str, *options: str) -> str:
    """What one of the tools that come with Triton says of machine code for NVIDIA."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [os.path.join(tools, name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(compiled: Any) -> Resources:
    usage = _usage(compiled)
    lines = _tool(compiled, "nvdisasm", "-c").splitlines()
    matrix = r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA)\b"
    loops = innermost_matrix_loops(lines, r"\s*(\.L_x_\d+):", r"BRA.*`\((\.L_x_\d+)\)", matrix)
    spills, instructions = _most_spilling(loops, r"\b(STL|LDL)\b", r";\s*$|;\s*/\*")
    ptx = compiled.asm["ptx"]
    families = {"mma.sync": "mma.sync", "wgmma.mma": "wgmma", "tcgen05.mma": "tcgen05"}
    found = frozenset(name for text, name in families.items() if text in ptx)
    return Resources(
        shared_memory=compiled.metadata.shared,
        registers=int(usage["REG"]),
        spilled=int(usage["STACK"]),
        loop_spills=spills,
        loop_instructions=instructions,
        instructions=found or frozenset({"fma"}),
        waits_first=waits_first(ptx),
    )


def waits_first(ptx: str) -> bool:
    """`Resources.waits_first`, from PTX: every signal has a wait right before it."""
    steps = re.findall(r"griddepcontrol\.(wait|launch_dependents)", ptx)
    pairs = zip(["", *steps], steps, strict=False)
    return all(before == "wait" for before, step in pairs if step == "launch_dependents")


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"amdgcn must state {name}, got none")
        return int(found.group(1))

    lines = text.splitlines()
    matrix = r"\bv_(mfma|fma|pk_fma|fmac)_"
    loops = innermost_matrix_loops(
        lines, r"(\.LBB\d+_\d+):", r"s_c?branch\w*\s+(\.LBB\d+_\d+)", matrix
    )
    spills, instructions = _most_spilling(
        loops, r"\bscratch_(load|store)", r"^\s+(s|v|ds|buffer|global|flat|scratch)_"
    )
    return Resources(
        shared_memory=compiled.metadata.shared,
        registers=field("vgpr_count"),
        spilled=field("private_segment_fixed_size"),
        loop_spills=spills,
        loop_instructions=instructions,
        instructions=frozenset({"mfma"} if "v_mfma" in text else {"fma"}),
    )
