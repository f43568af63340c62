"""Configs timed and kernels compiled before an engine serves: `tune` and `warmup`.

deployment.py  what an engine will ask of one GPU, and the problems that gives
tuner.py       enumerate, prune, compile, check, time, keep
decode.py      how a decode is tried out
warm.py        every kernel of a deployment, compiled and not launched
workers.py     compiling side by side; worker.py is one such process
progress.py    how far a long job is
"""

from mla_triton.tuning.tuner import tune
from mla_triton.tuning.warm import warmup

__all__ = ["tune", "warmup"]
