"""sequence_logprobs: the battery, then what is particular to it."""

from conftest import battery

import rlhf_kernels
from rlhf_kernels import testing


@battery("sequence_logprobs")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")
