"""logits_kl: the battery, then what is particular to it."""

import math

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import logits_kl, testing
from rlhf_kernels.ops.logits_kl import DIRECTIONS, logits_kl_op

INF = float("inf")
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


@battery("logits_kl")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


@pytest.fixture(params=testing.available_backends("logits_kl"))
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


def _two(*shape, apart=0.5, dtype=torch.float32):
    ref = torch.randn(shape, dtype=dtype)
    return (ref + apart * torch.randn_like(ref)).requires_grad_(), ref


def _plain(logits, ref_logits, direction="reverse"):
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    a, b = (logp, logq) if direction == "reverse" else (logq, logp)
    return (a.exp() * (a - b)).sum(-1)


def _with_gradient(logits, *args, **options):
    """(kl, gradient of an upstream that differs from row to row and is never 1)."""
    leaf = logits.detach().requires_grad_()
    kl = logits_kl(leaf, *args, **options)
    upstream = torch.linspace(-2, 3, kl.numel(), dtype=kl.dtype).view_as(kl)
    return kl.detach(), torch.autograd.grad(kl, leaf, upstream)[0]


@pytest.mark.parametrize(
    ("direction", "kl", "slope"),
    [
        ("reverse", 0.75 * math.log(1.5) - 0.25 * math.log(2.0), 3 / 16 * math.log(3.0)),
        ("forward", 0.5 * math.log(4 / 3), 0.25),
    ],
)
def test_two_tokens_by_hand(backend, direction, kl, slope):
    """p = (3/4, 1/4) and q = (1/2, 1/2), whatever is added to all logits of a row."""
    logits = torch.tensor([math.log(3.0) + 7.0, 7.0], dtype=torch.float64, requires_grad=True)
    mine = logits_kl(logits, torch.tensor([-2.0, -2.0], dtype=torch.float64), direction=direction)
    mine.backward()
    assert mine.shape == () and mine.item() == pytest.approx(kl, rel=1e-13)
    assert logits.grad.tolist() == pytest.approx([slope, -slope], rel=1e-13)


def test_discrete_gaussians(backend):
    """On a grid much finer than their widths, the divergence of the normal distributions and its slope in the mean."""
    grid = torch.arange(-600, 601, dtype=torch.float64)
    mean = torch.tensor(15.0, dtype=torch.float64, requires_grad=True)
    policy, ref = -((grid - mean) ** 2) / (2 * 20**2), -((grid + 10) ** 2) / (2 * 30**2)
    kl = logits_kl(policy, ref)
    kl.backward()
    assert kl.item() == pytest.approx(math.log(30 / 20) + (20**2 + 25**2) / (2 * 30**2) - 0.5, rel=1e-12)
    assert mean.grad.item() == pytest.approx(25 / 30**2, rel=1e-10)
    other = logits_kl(policy.detach(), ref, direction="forward").item()
    assert other == pytest.approx(math.log(20 / 30) + (30**2 + 25**2) / (2 * 20**2) - 0.5, rel=1e-12)


@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_distributions_are_exactly_0_apart(backend, dtype, direction):
    logits = (torch.randn(5, 1000) * 10).to(dtype)
    logits[:, ::7] = -INF
    for options in ({}, {"temperature": 0.7, "softcap": 5.0}):
        kl, grad = _with_gradient(logits, logits.clone(), direction=direction, **options)
        assert not kl.any() and not grad.any()


def test_forward_is_reverse_of_the_swapped(backend):
    a, b = (x.detach() for x in _two(6, 1000, apart=3.0))
    torch.testing.assert_close(logits_kl(a, b, direction="forward"), logits_kl(b, a), rtol=1e-6, atol=0)
    assert (logits_kl(a, b) - logits_kl(b, a)).abs().min() > 1e-2


def _near(scale):
    ref = torch.randn(8, 5000) * scale
    return ref + 1e-4 * torch.randn_like(ref), ref


@both_directions
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_small_divergences_keep_their_digits(backend, direction, scale):
    """A policy that has hardly left its reference: the plain sum in float32 has no digit of its KL of 5e-9."""
    logits, ref = _near(scale)
    x = logits.double().log_softmax(-1) - ref.double().log_softmax(-1)
    x, weights = (x, logits) if direction == "reverse" else (-x, ref)
    exact = (weights.double().softmax(-1) * (torch.expm1(-x) + x)).sum(-1)
    assert (logits_kl(logits, ref, direction=direction) / exact - 1).abs().max() < 1e-5
    assert (_plain(logits, ref, direction) / exact - 1).abs().max() > 10


@both_directions
def test_the_gradient_of_a_small_divergence_keeps_its_digits(backend, direction):
    logits, ref = _near(1.0)
    leaf = logits.double().requires_grad_()
    exact = torch.autograd.grad(_plain(leaf, ref.double(), direction).sum(), leaf)[0]
    leaf = logits.requires_grad_()
    ours = torch.autograd.grad(logits_kl(leaf, ref, direction=direction).sum(), leaf)[0]
    plain = torch.autograd.grad(_plain(leaf, ref, direction).sum(), leaf)[0]
    assert (ours - exact).abs().max() < 2e-6 * exact.abs().max()
    assert (plain - exact).abs().max() > 1e-3 * exact.abs().max()


@both_directions
def test_never_negative(backend, direction):
    for seed in range(30):
        torch.manual_seed(seed)
        apart, scale = 10.0 ** -(seed % 10), 10.0 ** (seed % 4 - 1)
        logits, ref = _two(16, 1 + 37 * (seed % 5), apart=apart)
        assert (logits_kl(logits * scale, ref * scale, temperature=0.3 + seed / 20, direction=direction) >= 0).all()


@both_directions
def test_gradcheck_of_everything(backend, direction):
    logits, ref = _two(2, 3, 11, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    options = {"temperature": temperature, "softcap": 2.0, "direction": direction}
    assert torch.autograd.gradcheck(lambda x: logits_kl(x, ref, mask, **options), logits)


def test_tokens_that_only_one_may_choose(backend):
    """By hand: p = (1/2, 1/2, 0) beside q = (1/4, 1/4, 1/2), and the other way round."""
    narrow, wide = torch.tensor([[0.0, 0.0, -INF]]), torch.tensor([[0.0, 0.0, math.log(2.0)]])
    kl, grad = _with_gradient(narrow, wide)
    torch.testing.assert_close(kl, torch.tensor([math.log(2.0)]))
    torch.testing.assert_close(grad, torch.zeros(1, 3))
    kl, grad = _with_gradient(wide, narrow, direction="forward")
    torch.testing.assert_close(kl, torch.tensor([math.log(2.0)]))
    torch.testing.assert_close(grad, -2 * torch.tensor([[-0.25, -0.25, 0.5]]))
    assert logits_kl(narrow, wide, direction="forward").item() == INF
    kl, grad = _with_gradient(wide, narrow)
    assert kl.item() == INF and not grad.isfinite().any()


@both_directions
def test_tokens_that_neither_may_choose_add_nothing(backend, direction):
    (logits, ref), banned = _two(4, 50), torch.rand(50) < 0.4
    holes = [x.detach().masked_fill(banned, -INF) for x in (logits, ref)]
    kl, grad = _with_gradient(*holes, direction=direction)
    expected, slope = _with_gradient(logits[:, ~banned], ref[:, ~banned], direction=direction)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, ~banned], slope, rtol=1e-5, atol=1e-7)
    assert not grad[:, banned].any()


@both_directions
def test_what_stands_under_the_mask_changes_no_bit(backend, direction):
    logits, ref = _two(3, 4, 33)
    mask = torch.rand(3, 4) < 0.6
    expected, slope = _with_gradient(logits, ref, direction=direction)
    for junk in (float("nan"), INF, -INF):
        dirty = [x.detach().masked_fill(~mask[..., None], junk) for x in (logits, ref)]
        kl, grad = _with_gradient(*dirty, mask, direction=direction)
        assert torch.equal(kl, expected * mask) and torch.equal(grad, slope * mask[..., None])


@both_directions
def test_temperature_and_softcap_are_those_of_both_models(backend, direction):
    logits, ref = _two(2, 3, 40, apart=2.0, dtype=torch.float64)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.7, 1.3, 4.0]], dtype=torch.float64)
    shaped = [3.0 * torch.tanh(x / 3.0) / temperature[..., None] for x in (logits, ref)]
    expected = _plain(*shaped, direction)
    kl = logits_kl(logits, ref, temperature=temperature, softcap=3.0, direction=direction)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (kl, expected)))
    row = logits_kl(logits[0, 2], ref[0, 2], temperature=2.0, softcap=3.0, direction=direction)
    torch.testing.assert_close(row, kl[0, 2])


@pytest.mark.parametrize(
    ("pair", "result"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_mixed_dtypes(backend, pair, result):
    logits, ref = (x.detach().to(dtype) for x, dtype in zip(_two(3, 100), pair))
    kl, grad = _with_gradient(logits, ref)
    exact, slope = _with_gradient(logits.double(), ref.double())
    assert (kl.dtype, grad.dtype) == (result, pair[0])
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), slope, rtol=torch.finfo(pair[0]).eps, atol=1e-6)


@both_directions
def test_the_reference_is_a_constant(backend, direction):
    logits, ref = _two(3, 9)
    ref.requires_grad_()
    assert torch.autograd.grad(logits_kl(logits, ref, direction=direction).sum(), ref, allow_unused=True) == (None,)
    assert not logits_kl(logits.detach(), ref, direction=direction).requires_grad


VIEWS = {
    "columns_first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "rows_swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part_of_wider": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]],
    "not_the_first_row": lambda x: torch.cat([x + 1, x], 1)[:, x.shape[1] :],
    "every_other_column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(backend, view):
    logits, ref = _two(3, 4, 33)
    expected, slope = _with_gradient(logits, ref)
    for a, b in ((logits, VIEWS[view](ref)), (VIEWS[view](logits), ref), (VIEWS[view](logits), VIEWS[view](ref))):
        assert not (a.is_contiguous() and b.is_contiguous())
        kl, grad = _with_gradient(a, b)
        assert torch.equal(kl, expected) and torch.equal(grad, slope)
    same = logits_kl(logits, ref[:1, :1].expand_as(ref))
    torch.testing.assert_close(same, _plain(logits, ref[:1, :1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "logits: expected float32, .* got torch.int64"),
        ({"ref_logits": [1.0]}, TypeError, "ref_logits: expected a tensor, got list"),
        ({"ref_logits": torch.ones(2, 4)}, ValueError, r"ref_logits: expected the shape \(2, 3\) of logits, got"),
        ({"ref_logits": torch.ones(2, 3, device="meta")}, ValueError, "ref_logits: expected device cpu, .* got meta"),
        ({"logits": torch.tensor(1.0), "ref_logits": torch.tensor(1.0)}, ValueError, r"logits: expected \(\.\.\., V\)"),
        ({"logits": torch.ones(2, 0), "ref_logits": torch.ones(2, 0)}, ValueError, "logits: .* at least one token"),
        ({"mask": torch.ones(2)}, TypeError, "mask: expected bool, .* got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: expected the shape \(2,\) of the rows of logi"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected the shape \(2,\) of the tokens, got"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number above 0, got -1.0"),
        ({"direction": "k1"}, ValueError, "direction: expected one of reverse, forward, got 'k1'"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        logits_kl(**{"logits": torch.ones(2, 3), "ref_logits": torch.ones(2, 3), **change})


def test_create_graph_is_refused(backend):
    logits, ref = _two(3, 9)
    with pytest.raises(RuntimeError, match="logits_kl is differentiable once"):
        torch.autograd.grad(logits_kl(logits, ref).sum(), logits, create_graph=True)


def test_schema_is_stable():
    assert str(logits_kl_op._schema).startswith("rlhf_kernels::logits_kl(Tensor logits, Tensor ref_logits, Tensor? ma")
