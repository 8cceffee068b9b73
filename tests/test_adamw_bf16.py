"""adamw_bf16_: the battery, the random bits, the rounding, what it buys over rounding to nearest."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, battery

import rlhf_kernels
from rlhf_kernels import adamw_bf16_, testing
from rlhf_kernels.ops.adamw_bf16 import random_bits, round_stochastically, updated

BACKENDS = testing.available_backends("adamw_bf16_")
OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
HALF_EPS = torch.finfo(torch.bfloat16).eps / 2


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


@battery("adamw_bf16_")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def states(shape, scale=0.02):
    """param, grad, exp_avg, exp_avg_sq"""
    param, grad, exp_avg = (torch.randn(shape).mul(scale).bfloat16() for _ in range(3))
    return param, grad, exp_avg, exp_avg.float().square().bfloat16()


def run(inputs, **options):
    """The step on copies: the three results."""
    param, grad, exp_avg, exp_avg_sq = (x.clone() for x in inputs)
    adamw_bf16_(param, grad, exp_avg, exp_avg_sq, **{**OPTIONS, "step": 10, "seed": 1, **options})
    return param, exp_avg, exp_avg_sq


def exact(inputs, step=10, dtype=torch.float32, **options):
    options = {**OPTIONS, **options}
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    widened = (x.to(dtype) for x in inputs)
    return updated(*widened, torch.tensor(float(step)), None, *(options[name] for name in names))


# --- random bits ----------------------------------------------------------------------------------------------------


def _splitmix64(z):
    z = (z + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def _words(seed, step, position):
    """The bits of one element in unsigned Python integers."""
    key = _splitmix64((_splitmix64((_splitmix64(seed) + step) % 2**64) + (position >> 32)) % 2**64)
    x = (position + key) % 2**32
    x = ((x ^ (x >> 17)) * 0xED5AD4BB + (key >> 32)) % 2**32
    x = ((x ^ (x >> 11)) * 0xAC4C1B51) % 2**32
    x = ((x ^ (x >> 15)) * 0x31848BAB) % 2**32
    x ^= x >> 14
    return x >> 16, x % 2**16, ((x >> 16) + x % 2**16) % 2**16


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("step", [1, 1000, 2**24])
@pytest.mark.parametrize("first", [0, 2**31, 5 * 2**32 + 2**31 + 7])
def test_random_bits_are_those_of_unsigned_integers(seed, step, first):
    ours = torch.stack(random_bits(seed, torch.tensor(float(step)), first, 50), -1)
    assert ours.tolist() == [list(_words(seed, step, first + i)) for i in range(50)]


N_BITS = 2**19


def _streams(seed=0, step=1):
    return [x.double() for x in random_bits(seed, torch.tensor(float(step)), 0, N_BITS)]


@pytest.mark.parametrize("seed", [0, 1, 977])
def test_random_bits_are_uniform(seed):
    """Chi-squared over all 16 bits, over the upper 8 and over the lower 8; 5 standard deviations."""
    for stream in _streams(seed):
        words = stream.long()
        for cells, values in ((2**16, words), (256, words >> 8), (256, words & 255)):
            expected = N_BITS / cells
            chi = ((torch.bincount(values, minlength=cells) - expected) ** 2 / expected).sum().item()
            assert abs(chi - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5, (cells, chi)


def _signs(seed=0, step=1):
    """The 48 bits of every element as -1 and 1, float32."""
    words = random_bits(seed, torch.tensor(float(step)), 0, N_BITS)
    return torch.stack([((word >> bit) & 1).float() * 2 - 1 for word in words for bit in range(16)])


@pytest.fixture(scope="module")
def signs():
    return _signs()


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 16, 17, 768, 2048, 4096, 5120, 8192, 11008, 65536])
def test_random_bits_do_not_correlate(signs, lag):
    """Every bit with every bit of elements far and near, the three streams' too: 5.5 standard errors, as 2304 pairs a
    distance ask for. Distances that are powers of two are the weak ones of a hash with fewer rounds."""
    r = signs[:, lag:] @ signs[:, : N_BITS - lag].T / (N_BITS - lag)
    if not lag:
        r.fill_diagonal_(0)
    assert r.abs().max() < 5.5 / N_BITS**0.5


@pytest.mark.parametrize("other", [{"step": 2}, {"seed": 1}, {"seed": 1, "step": 2}, {"seed": 2**63, "step": 1}])
def test_random_bits_of_other_steps_and_seeds_do_not_correlate(signs, other):
    assert (signs @ _signs(**other).T / N_BITS).abs().max() < 5.5 / N_BITS**0.5


def test_random_bits_of_two_streams_fill_the_square():
    """Chi-squared over 64 x 64 cells of pairs: more than correlation sees."""
    a, b, c = (x.long() >> 10 for x in _streams())
    for pair in ((a, b), (a, c), (b, c), (a[1:], a[:-1]), (c[1:], c[:-1])):
        counts = torch.bincount(pair[0] * 64 + pair[1], minlength=4096)
        expected = len(pair[0]) / 4096
        chi = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi - 4095) < 5 * (2 * 4095) ** 0.5, chi


# --- rounding -------------------------------------------------------------------------------------------------------


def test_exact_values_inf_and_nan_stay():
    bits = torch.full((9,), 0xFFFF, dtype=torch.int32)
    inf = float("inf")
    values = torch.tensor([1.0, -1.5, 0.0, -0.0, 2.0**-130, inf, -inf, float("nan"), 3.3895313892515355e38])
    assert torch.equal(round_stochastically(values, bits).view(torch.int16), values.bfloat16().view(torch.int16))
    low_nan = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # would carry into inf and 0
    assert round_stochastically(low_nan, bits[:2]).isnan().all()


def test_results_are_neighbours_of_the_exact_value(backend):
    inputs = states((300, 7))
    for ours, true in zip(run(inputs), exact(inputs, dtype=torch.float64)):
        assert ((ours.double() - true).abs() <= true.abs() * 2 * HALF_EPS * (1 + 1e-4) + 1e-40).all()
        assert not torch.equal(ours, true.float().bfloat16())


def test_rounding_is_unbiased(backend):
    """The mean over seeds is the float32 value, to 4 standard errors."""
    inputs, n = states((40,)), 600
    total = [torch.zeros(40, dtype=torch.float64) for _ in range(3)]
    for seed in range(n):
        for mean, x in zip(total, run(inputs, seed=seed)):
            mean += x.double() / n
    for mean, true in zip(total, exact(inputs)):
        down = (true.view(torch.int32) & ~0xFFFF).view(torch.float32)
        unit = ((true.view(torch.int32) & ~0xFFFF) + 2**16).view(torch.float32).double() - down.double()
        share = (true.double() - down.double()) / unit
        error = unit.abs() * (share * (1 - share) / n).sqrt()
        assert (share > 0.01).any() and ((mean - true.double()).abs() <= 4 * error + unit.abs() / n).all()


def test_backends_agree(backend):
    """Random bits are the same; FMA may carry a value over its random threshold, in an element of some ten thousand,
    and keeps more of a first moment whose terms cancel."""
    inputs = states((40003,))
    ours = run(inputs, seed=2**64 - 1)
    with rlhf_kernels.backend("reference"):
        theirs = run(inputs, seed=2**64 - 1)
    for a, b in zip(ours, theirs):
        assert (a != b).float().mean() < 2.5e-4
        unit = torch.maximum(a, b).abs().float() * 2 * HALF_EPS
        assert ((a.float() - b.float()).abs() <= unit + 2**-24 * max(x.abs().max().item() for x in inputs)).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels were not built")
def test_without_fma_the_kernel_gives_the_bits_of_the_reference():
    code = (
        "import torch, rlhf_kernels\nfrom rlhf_kernels import adamw_bf16_\ntorch.manual_seed(0)\n"
        "p, g, m = (torch.randn(100003).mul(0.02).bfloat16() for _ in range(3))\nresults = []\n"
        "for name in ('cpu', 'reference'):\n"
        "    x = [p.clone(), m.clone(), m.square()]\n"
        "    with rlhf_kernels.backend(name):\n"
        "        for step in (1, 2, 1000):\n"
        "            adamw_bf16_(x[0], g, *x[1:], lr=1e-3, weight_decay=0.1, step=step, seed=7)\n"
        "    results.append(x)\n"
        "print(all(torch.equal(a, b) for a, b in zip(*results)), rlhf_kernels.backends().cpu_isa)"
    )
    environment = {**os.environ, "RLHF_KERNELS_CPU_ISA": "baseline"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.stdout.split() == ["True", "baseline"], done.stdout + done.stderr[-2000:]


def test_threads_and_neighbours_change_nothing(backend):
    inputs = states((200001,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    head = run([x[:777].contiguous() for x in inputs])
    assert all(torch.equal(a, b[:777]) for a, b in zip(head, results[0]))


def test_seed_and_step_choose_the_bits(backend):
    inputs = states((5000,))
    first, again, seed, step = (run(inputs, **o) for o in ({}, {}, {"seed": 2}, {"step": 11}))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (seed, step):
        assert all(0.2 < (a != b).float().mean() < 0.5 for a, b in zip(first, other))


# --- what it buys ---------------------------------------------------------------------------------------------------


def _rounded_to_nearest(inputs, step, **options):
    return tuple(x.bfloat16() for x in exact(inputs, step, **options))


@pytest.mark.parametrize("run_step", [run, _rounded_to_nearest], ids=["stochastic", "nearest"])
def test_small_updates_add_up(run_step):
    """200 steps at 3e-6: the mean weight follows AdamW in float64; rounded to nearest, 19 of 20 never move."""
    n, steps, lr = 20000, 200, 3e-6
    param, drift = (torch.randn(n) * 0.02).bfloat16(), torch.randn(n)
    true = [param.double(), torch.zeros(n).double(), torch.zeros(n).double()]
    ours = [param.clone(), torch.zeros_like(param), torch.zeros_like(param)]
    for step in range(1, steps + 1):
        grad = (drift + 0.5 * torch.randn(n)).bfloat16()
        options = {"lr": lr, "weight_decay": 0.0}
        true = exact((true[0], grad, *true[1:]), step, torch.float64, **options)
        ours = run_step((ours[0], grad, *ours[1:]), step=step, **options)
    moved = (ours[0] != param).float().mean().item()
    toward = torch.sign(true[0] - param.double())
    error = (ours[0].double() - true[0]) * toward
    expected, bound = ((true[0] - param.double()) * toward).mean(), 4 * error.std() / n**0.5
    assert expected > 3e-4
    if run_step is run:
        assert moved > 0.9 and error.mean().abs() < bound and bound < 0.02 * expected
    else:
        assert moved < 0.06 and error.mean() < -0.9 * expected


@pytest.mark.parametrize("run_step", [run, _rounded_to_nearest], ids=["stochastic", "nearest"])
def test_the_second_moment_falls(run_step):
    """It loses 1/1000 a step, less than bfloat16 can say."""
    n, steps = 4096, 250
    zeros, second = torch.zeros(n).bfloat16(), torch.full((n,), 1e-4).bfloat16()
    state = (zeros, zeros, second)
    for step in range(1, steps + 1):
        state = run_step((state[0], zeros, *state[1:]), step=step)
    if run_step is run:
        assert state[2].float().mean() == pytest.approx(second[0].item() * 0.999**steps, rel=0.01)
    else:
        assert torch.equal(state[2], second)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 2.0, float("nan")])
def test_found_inf_changes_nothing(backend, value):
    inputs = states((100,))
    inputs[1][3] = float("inf")
    for step in (5, torch.zeros(())):  # the count of a first step that was skipped
        results = run(inputs, step=step, found_inf=torch.tensor(value))
        assert all(torch.equal(a, b) for a, b in zip(results, (inputs[0], *inputs[2:])))
    inputs[1][3] = 0
    clean = run(inputs, found_inf=torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(clean, run(inputs)))


def test_grad_scale_divides(backend):
    inputs = list(states((500,)))
    plain, kept = run(inputs), inputs[1].clone()
    inputs[1] = inputs[1] * 1024
    scaled = run(inputs, grad_scale=torch.tensor(1024.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled)) and torch.equal(inputs[1], kept * 1024)


def test_nan_and_inf_stay_where_they_are(backend):
    inputs = states((64,))
    inputs[1][3], inputs[1][20], inputs[0][40] = float("nan"), float("inf"), float("-inf")
    clean = states((64,))
    for a, b in zip(clean, inputs):
        a.copy_(b)
    clean[1][3], clean[1][20], clean[0][40] = 0, 0, 0
    param, exp_avg, exp_avg_sq = run(inputs)
    assert param[3].isnan() and exp_avg[3].isnan() and exp_avg_sq[3].isnan()
    assert param[20].isnan() and exp_avg[20] == float("inf") and exp_avg_sq[20] == float("inf")  # as torch: inf / inf
    assert param[40] == float("-inf") and exp_avg[40].isfinite()
    rest = torch.ones(64, dtype=torch.bool)
    rest[[3, 20, 40]] = False
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip((param, exp_avg, exp_avg_sq), run(clean)))


@pytest.mark.parametrize("n", [1, 5, 8, 15, 16, 17, 31, 33, 100])
def test_writes_nothing_outside(backend, n):
    whole = states((n + 40,))
    before = [x.clone() for x in whole]
    param, grad, exp_avg, exp_avg_sq = (x[20 : 20 + n] for x in whole)
    adamw_bf16_(param, grad, exp_avg, exp_avg_sq, **OPTIONS, step=3, seed=0)
    for now, then in zip(whole, before):
        assert torch.equal(now[:20], then[:20]) and torch.equal(now[20 + n :], then[20 + n :])
    assert (param != before[0][20 : 20 + n]).any()


def test_step_as_an_int_or_a_tensor(backend):
    inputs = states((300,))
    for a, b in zip(run(inputs, step=12), run(inputs, step=torch.tensor(12.0))):
        assert torch.equal(a, b)


def test_autograd_knows_of_the_change(backend):
    """A backward through weights that were updated since is an error, not a wrong gradient."""
    inputs = states((4,))
    param = inputs[0].requires_grad_()
    loss = (param * param).sum()
    adamw_bf16_(param, *inputs[1:], **OPTIONS, step=1, seed=0)
    assert param.is_leaf and param.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


PARAM = torch.zeros(4, 6, dtype=torch.bfloat16)
BAD_INPUT = {
    "param dtype": ({"param": PARAM.float()}, TypeError, r"param: expected bfloat16, got torch.float32; .*fused"),
    "param layout": ({"param": PARAM.T}, ValueError, r"param: expected a contiguous tensor, .*\(1, 6\); .*contiguous"),
    "no tensor": ({"exp_avg": 3}, TypeError, "exp_avg: expected a tensor, got int"),
    "moment shape": ({"exp_avg_sq": PARAM[:2]}, ValueError, r"exp_avg_sq: expected the shape \(4, 6\) of param, got"),
    "moment layout": ({"exp_avg": PARAM.T.contiguous().T}, ValueError, "exp_avg: expected a contiguous tensor"),
    "moment dtype": ({"exp_avg": PARAM.float()}, TypeError, "exp_avg: expected bfloat16, got torch.float32"),
    "grad dtype": ({"grad": PARAM.half()}, TypeError, r"grad: expected .*, got torch.float16; .*\.float\(\)"),
    "no grad": ({"grad": None}, TypeError, "grad: expected bfloat16 or float32, got None"),
    "grad shape": ({"grad": PARAM[0]}, ValueError, r"grad: expected the shape \(4, 6\) of param, got \(6,\)"),
    "lr": ({"lr": -1.0}, ValueError, "lr: expected a number >= 0, got -1.0"),
    "lr tensor": ({"lr": torch.tensor(1.0)}, ValueError, "lr: expected a finite int or float"),
    "beta": ({"beta2": 1.0}, ValueError, "beta2: expected a number below 1, got 1.0"),
    "eps": ({"eps": 0.0}, ValueError, "eps: expected a number above 0, got 0.0"),
    "seed": ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^64\), got -1"),
    "step 0": ({"step": 0}, ValueError, r"step: expected an int in \[1, 16777216\], .* got 0"),
    "float step": ({"step": 3.0}, ValueError, r"step: expected an int in \[1, 16777216\], .* got 3.0"),
    "step dtype": ({"step": torch.tensor(3)}, TypeError, r"step: expected a float32 tensor of shape \(\), got .*int64"),
    "step shape": ({"step": torch.ones(1)}, TypeError, r"step: expected a float32 tensor of shape \(\), .*\(1,\);"),
    "step tensor 0": ({"step": torch.zeros(())}, ValueError, "step: expected a count of at least 1, .*, got 0"),
    "step tensor NaN": ({"step": torch.tensor(float("nan"))}, ValueError, "step: expected a count of at least 1"),
    "found_inf": ({"found_inf": True}, TypeError, "found_inf: expected a tensor, got bool"),
    "grad_scale": ({"grad_scale": torch.ones(2)}, TypeError, "grad_scale: expected a float32 tensor of shape"),
    "device": ({"exp_avg": PARAM.to("meta")}, ValueError, "exp_avg: expected device cpu, that of param, got meta"),
}


@pytest.mark.parametrize(("changed", "error", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton"])
def test_bad_input(name, changed, error, words):
    arguments = {"param": PARAM, "grad": PARAM, "exp_avg": PARAM, "exp_avg_sq": PARAM, "lr": 1e-3, "step": 1, "seed": 0}
    with rlhf_kernels.backend(name), pytest.raises(error, match=words):
        adamw_bf16_(**{**arguments, **changed})


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels were not built")
@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, PARAM.float(), "param: expected BFloat16, got Float"),
        (1, PARAM.half(), "grad: expected Float, got Half"),
        (2, PARAM.T.contiguous().T, "exp_avg: expected a contiguous tensor"),
        (3, PARAM[:2], r"exp_avg_sq: expected the shape \(4, 6\)"),
        (4, torch.ones(1), r"step: expected a 0-dim tensor, got \(1,\)"),
        (5, torch.ones((), dtype=torch.float64), "found_inf: expected Float, got Double"),
        (6, torch.ones((), dtype=torch.bool), "grad_scale: expected Float, got Bool"),
    ],
)
def test_direct_calls_that_a_pointer_would_misread(place, value, words):
    arguments = [PARAM, PARAM, PARAM, PARAM, torch.ones(()), None, None, 0, 1e-3, 0.9, 0.999, 1e-8, 0.0]
    arguments[place] = value
    with rlhf_kernels.backend("cpu"), pytest.raises(RuntimeError, match=words):
        torch.ops.rlhf_kernels.adamw_bf16_(*arguments)
