"""Older cards' code assembled for a later one: what can be seen of it without any card."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mla_triton import device as devices
from mla_triton.testing.foreign_code import Generated, assembled_for, code_of

ELF_FLAGS = 48
"""Byte offset of an ELF file's flags, whose lowest byte is the SM version in a cubin."""


def test_generated_code_tells_what_it_is():
    ptx = "//\n.target sm_89\n{\n@%p1 cp.async.cg.shared.global [ %r1 ];\n\tmma.sync.aligned\n}"
    kernel = Generated("k", ptx, 0)
    assert kernel.target == "sm_89"
    assert kernel.uses("mma.sync")
    assert kernel.uses("cp.async")
    assert not kernel.uses("cp.async.bulk")
    assert not kernel.uses("wgmma")
    assert not kernel.uses("sync")


@pytest.mark.parametrize("label", ["8.0", "8.9"])
def test_code_of_an_older_card_is_assembled_for_hopper(label):
    """In a process of its own: one in which Triton interprets cannot compile."""
    done = subprocess.run(
        [sys.executable, __file__, label],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["float16", "bfloat16"]


def test_code_of_needs_a_later_card():
    label = "12.1" if torch.cuda.is_available() else "8.9"
    with pytest.raises(ValueError, match="must be a capability before this card's"), code_of(label):
        pass
    with pytest.raises(ValueError, match="card must be an NVIDIA GPU, got cpu"):
        assembled_for(devices.CPU).__enter__()


def main(label: str) -> None:
    """Compiles as for `label`, assembles for 9.0, and looks at PTX and machine code."""
    from mla_triton.kernels.portable import decode
    from mla_triton.testing.compilation import problem

    card, hopper = devices.from_label(label), devices.from_label("9.0")
    for dtype in (torch.float16, torch.bfloat16):
        what = problem(dtype=dtype, heads=128)
        config, geometry = decode.heuristic(what, card), decode.geometry(what, card)
        with assembled_for(hopper) as kernels:
            compiled = decode.compile(what, config, geometry, card)
        (kernel,) = kernels
        assert kernel.name == "decode_kernel"
        assert kernel.target == card.arch
        assert kernel.shared <= card.shared_memory
        assert kernel.uses("mma.sync")
        assert kernel.uses("cp.async")
        assert not kernel.uses("wgmma")
        (flags,) = struct.unpack_from("<I", compiled.asm["cubin"], ELF_FLAGS)
        assert flags & 0xFF == 90
        with tempfile.TemporaryDirectory() as kept:
            for times in (1, 0):
                with assembled_for(hopper, Path(kept)) as kernels:
                    again = decode.compile(what, config, geometry, card)
                assert len(kernels) == times, "what is there was compiled again"
                assert again.asm["cubin"] == compiled.asm["cubin"]
        native = decode.compile(what, config, geometry, card)
        (flags,) = struct.unpack_from("<I", native.asm["cubin"], ELF_FLAGS)
        assert f"sm_{flags & 0xFF}" != "sm_90", "the change outlived its context"
        print(str(dtype).removeprefix("torch."))


if __name__ == "__main__":
    main(sys.argv[1])
