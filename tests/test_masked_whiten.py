"""masked_whiten: the battery, then its properties."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import masked_whiten, testing
from rlhf_kernels.ops.masked_whiten import masked_moments, merge_moments

BACKENDS = testing.available_backends("masked_whiten")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


@battery("masked_whiten")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def test_moments(backend):
    x, mask = torch.randn(9, 50) * 3 + 7, torch.rand(9, 50) < 0.5
    white = masked_whiten(x, mask)
    assert white[mask].mean().abs() < 1e-6 and abs(white[mask].var(unbiased=False) - 1) < 1e-5
    kept = masked_whiten(x, mask, shift_mean=False)
    assert abs(kept[mask].mean() - x[mask].mean()) < 1e-5


def test_offset_does_not_cancel(backend):
    """E[x^2] - E[x]^2 in float32 loses everything at an offset of 1e4."""
    x = torch.randn(4, 1000) + 1e4
    exact = (x.double() - x.double().mean()) / x.double().std(unbiased=False)
    assert (masked_whiten(x) - exact).abs().max() < 1e-5


def test_constant_and_single_elements(backend):
    assert not masked_whiten(torch.full((3, 4), 2.5)).any()
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[1, 1] = True
    assert not masked_whiten(torch.randn(2, 3), one, unbiased=True).any()


def test_moments_merge_exactly():
    """Statistics over two ranks equal those over both batches together."""
    a, b = torch.randn(40) + 100, torch.randn(25) * 5 - 3
    merged = merge_moments(torch.stack([masked_moments(a, None), masked_moments(b, None)]))
    torch.testing.assert_close(merged, masked_moments(torch.cat([a, b]), None), rtol=1e-12, atol=1e-9)


def test_bad_input():
    with pytest.raises(TypeError, match="x: expected float32"):
        masked_whiten(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask: expected the shape"):
        masked_whiten(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="eps: expected a number above 0"):
        masked_whiten(torch.zeros(3), eps=-1)
