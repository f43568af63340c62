"""A failing example of a property prints one line that says how it is made again."""

from __future__ import annotations

import decodes
import torch
from executions import DEVICE, Execution, reproduction
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ways import Way

from mla_triton.testing import decode_changes as changes
from mla_triton.testing import decode_inputs

EXECUTION = Execution(Way("portable"))
SETTINGS = settings(
    max_examples=1,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_the_line_is_python_up_to_what_computed_it(capsys):
    @SETTINGS
    @given(st.data())
    def fails(data):
        inputs = data.draw(decodes.problems(decodes.SHAPES[0]))
        reproduction(inputs, "reordered(inputs, [1, 0])", EXECUTION)
        seen.append(inputs)
        raise AssertionError("as planned")

    seen = []
    try:
        fails()
    except AssertionError as error:
        printed = [*getattr(error, "__notes__", []), *capsys.readouterr().out.splitlines()]
    (line,) = {line for note in printed for line in note.splitlines() if "reordered" in line}
    made, change, by = line.split("; ")
    names = {"decode_inputs": decode_inputs, "torch": torch}
    exec(made, names)
    again = names["inputs"].to(DEVICE)
    assert repr(again) == repr(seen[-1])
    assert torch.equal(again.q_nope, seen[-1].q_nope)
    eval(change, vars(changes) | {"inputs": again})
    assert by == "by portable"
