"""token_kl: the battery, then closed forms."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import testing, token_kl


@battery("token_kl")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def test_values_and_gradients():
    logprobs, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    expected = {"k1": (0.5, 1.0), "abs": (0.5, 1.0), "k2": (0.125, 0.5), "k3": (0.106531, 0.393469)}
    for name, (value, gradient) in expected.items():
        for estimator in (name, name + "+"):
            kl = token_kl(logprobs, ref, estimator)
            (grad,) = torch.autograd.grad(kl, logprobs)
            assert kl.item() == pytest.approx(value, abs=1e-6)
            assert grad.item() == pytest.approx(0.5 if estimator.endswith("+") else gradient, abs=1e-6)


def test_k3_keeps_small_differences():
    """exp(-x) - 1 + x cancels at x = 1e-4; it is x^2/2 there."""
    kl = token_kl(torch.tensor([-2.0]), torch.tensor([-2.0 - 2.0**-12]), "k3")
    assert kl.item() == pytest.approx(2.0**-25, rel=1e-2)


def test_estimators_are_unbiased():
    """The means of k1 and k3 over samples are the KL of two distributions."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).log().double(), torch.tensor([0.2, 0.5, 0.3]).log().double()
    for estimator in ("k1", "k3"):
        assert (p.exp() * token_kl(p, q, estimator)).sum().item() == pytest.approx(
            (p.exp() * (p - q)).sum().item(), abs=1e-12
        )


def test_bad_input():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"estimator: expected one of k1, abs, k2, k3, .* got 'k4'"):
        token_kl(x, x, "k4")
    with pytest.raises(ValueError, match=r"ref_logprobs: expected the shape \(3,\) of logprobs, got \(2,\)"):
        token_kl(x, torch.zeros(2))
    with pytest.raises(ValueError, match="clamp: expected a number above 0"):
        token_kl(x, x, clamp=0.0)
