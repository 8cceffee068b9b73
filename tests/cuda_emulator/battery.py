"""Puts one op of the emulated CUDA kernels through the battery: battery.py LIBRARY OP

In a process of its own, because a library that has registered its kernels stays.
"""

import ctypes
import sys

import long_sequences
import torch

from rlhf_kernels import testing

library, op = sys.argv[1:]
torch.ops.load_library(library)
CHECKS = {"error_budget", "strides", "masked_nan", "poisoned_memory", "purity"}
TOO_SLOW = ("large",)  # blocks run one after another

for case in testing.cases(op):
    for name in CHECKS.intersection(testing.checks_of(case)):
        if case.name not in TOO_SLOW:
            testing.CHECKS[name](case, "cpu")
for lengths in long_sequences.LENGTHS.values():
    for layout in long_sequences.LAYOUTS:
        long_sequences.check(op, lengths, layout, "cpu")
launches = ctypes.c_int64.in_dll(ctypes.CDLL(library), "emulated_launches").value
assert launches > 100, "the kernels under test did not run"
print(f"{launches} launches")
