"""linear_kl: the battery, then what is particular to it."""

from conftest import battery

import rlhf_kernels
from rlhf_kernels import testing


@battery("linear_kl")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")
