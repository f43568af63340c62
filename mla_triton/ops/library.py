"""The `torch.library` namespace of the package: the one handle operators are defined on."""

import torch

# `define` and `impl` rather than `custom_op`: the wrapper of the latter costs more than a launch.
LIBRARY = torch.library.Library("mla_triton", "DEF")
