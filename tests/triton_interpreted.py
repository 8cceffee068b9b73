"""The Triton kernels on the CPU: tests that run where TRITON_INTERPRET=1 is set; test_triton_interpret.py starts them.

The battery in full takes many minutes under the interpreter: `QUICK` runs in `make test`, the rest is marked slow.
"""

import importlib

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import gae, logits_kl, masked_whiten, ppo_advantages, ppo_loss, testing, token_logprobs
from rlhf_kernels.ops.adamw_bf16 import adamw_bf16_reference, mix64, random_bits, signed
from rlhf_kernels.ops.logits_kl import logits_kl_backward_into_reference, logits_kl_reference
from rlhf_kernels.ops.token_logprobs import token_logprobs_backward_reference, token_logprobs_reference
from rlhf_kernels.triton import KERNELS

QUICK = {
    "token_logprobs": (
        "entropy",
        "everything",
        "no_tokens",
        "vocab_1",
        "vocab_7_int32_ids",
        "minus_inf",
        "offset_minus",
    ),
    "gae": ("packed_gaps", "left_padded", "all_masked", "no_steps", "bootstrap_gaps_zero", "bootstrap_packed_zero"),
    "masked_whiten": ("gaps", "all_masked", "no_steps", "keep_mean", "unbiased", "offset"),
    "ppo_advantages": ("packed", "no_sequences", "whiten_both", "whiten_none_clip", "per_token_packed"),
    "ppo_loss": ("right_padded", "policy_alone", "dual_clip_weights", "seq_mean_denominator", "sum_gaps", "all_masked"),
    "logits_kl": (
        "reverse",
        "forward",
        "everything",
        "everything_forward",
        "no_tokens",
        "vocab_1",
        "minus_inf",
        "minus_inf_forward",
    ),
    # The products are torch's, the rows of a chunk Triton's: these cases alone.
    "linear_token_logprobs": ("everything", "logprobs_alone"),
    "linear_ppo_loss": ("everything", "packed_gaps"),
    "linear_dpo_loss": ("sigmoid_gaps", "four_products"),
    "linear_kl": ("reverse", "everything", "everything_forward"),
    "adamw_bf16_": ("bf16_grad", "scaled_fp32_grad", "first_step", "empty", "scalar", "seven", "aligned"),
}
QUICK_CHECKS = ("error_budget", "masked_nan", "poisoned_memory")
MANY_PROGRAMS = ("many", "large", "blocks")  # a minute for each check: values alone


def _battery():
    for op, quick in QUICK.items():
        for case in (c for c in testing.cases(op) if c.name in quick or not op.startswith("linear_")):
            for check in testing.checks_of(case) if case.name not in MANY_PROGRAMS else ("error_budget",):
                marks = [] if case.name in quick and check in QUICK_CHECKS else [pytest.mark.slow]
                yield pytest.param(case, check, id=f"{op}-{case.name}-{check}", marks=marks)


@pytest.fixture(autouse=True)
def triton_backend():
    with rlhf_kernels.backend("triton"):
        yield


@pytest.mark.parametrize(("case", "check"), list(_battery()))
def test_battery(case, check):
    testing.CHECKS[check](case, "cpu")


def _bounds(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _reference(function, *args, **options):
    with rlhf_kernels.backend("reference"):
        return function(*args, **options)


@pytest.mark.parametrize("gap", ["skip", "zero"])
@pytest.mark.parametrize("packed", [False, True])
def test_gae_cut_into_blocks(monkeypatch, gap, packed):
    """The strategy for few long sequences gives what the loop over a sequence gives."""
    module = importlib.import_module("rlhf_kernels.triton.gae")
    monkeypatch.setattr(module, "BLOCK", 128)
    monkeypatch.setattr(module, "LONG", 1)
    shape = (900,) if packed else (2, 450)
    rewards, values, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.7
    options = {"cu_seqlens": _bounds(0, 0, 700, 701, 900)} if packed else {}
    options |= {"gamma": 0.99, "lam": 0.97, "gap": gap, "bootstrap_values": torch.randn(4 if packed else 2)}
    ours, theirs = (run(gae, rewards, values, mask, **options) for run in (lambda f, *a, **o: f(*a, **o), _reference))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_gae_with_more_blocks_than_a_block_has_lanes(monkeypatch):
    """The maps of the later blocks are themselves composed block by block."""
    module = importlib.import_module("rlhf_kernels.triton.gae")
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "LONG", 1)
    rewards, values = torch.randn(1, 18 * 16 + 5), torch.randn(1, 18 * 16 + 5)
    ours = gae(rewards, values, gamma=1.0, lam=0.999)
    for a, b in zip(ours, _reference(gae, rewards.double(), values.double(), gamma=1.0, lam=0.999)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def test_bounds_out_of_range_are_clamped(monkeypatch):
    """On a GPU nobody looks at cu_seqlens: bounds beyond the tokens read no other memory."""
    module = importlib.import_module("rlhf_kernels.triton.gae")
    monkeypatch.setattr(module, "check_cu_seqlens", lambda *_: None)
    around = torch.full((40,), float("nan"))
    around[10:20] = torch.randn(10)
    tokens = around[10:20]
    wrong = KERNELS["gae"](tokens, tokens, None, _bounds(-5, 4, 40), None, 0.9, 0.9, False)
    right = KERNELS["gae"](tokens, tokens, None, _bounds(0, 4, 10), None, 0.9, 0.9, False)
    assert torch.equal(wrong[0], right[0]) and torch.equal(wrong[1], right[1])


def _row_inputs(dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(2, 3, vocab, generator=generator) * 3).to(dtype)
    return logits, torch.randint(0, vocab, (2, 3), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", ["whole", "shifted", "transposed"])
def test_rows_that_start_between_16_byte_boundaries(dtype, view):
    """9001 columns: the first block of a row is cut at its head, the second is whole, the third cut at its tail."""
    logits, ids = _row_inputs(dtype, 9001)
    if view == "shifted":
        logits, ids = logits[:, 1:], ids[:, 1:].contiguous()
    if view == "transposed":
        logits, ids = logits.transpose(0, 1), ids.T.contiguous()
    ids[0, 1] = -100
    options = (None, 0.8, None, -100)
    ours = KERNELS["token_logprobs"](logits, ids, *options, True)
    theirs = token_logprobs_reference(logits.double(), ids, *options, True)
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-6, atol=1e-6)
    upstream = torch.randn(ids.shape), torch.randn(ids.shape)
    grad = KERNELS["token_logprobs_backward"](*upstream, logits, ids, None, *ours[1:], 0.8, None, -100)
    double = [g.double() for g in upstream]
    exact = token_logprobs_backward_reference(*double, logits.double(), ids, None, *theirs[1:], 0.8, None, -100)
    assert grad.is_contiguous() and grad.dtype == dtype
    # The interpreter may cut off what a float32 loses in bfloat16, where a device rounds: one unit in the last place.
    tolerance = {"rtol": 2**-7, "atol": 1e-9} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(grad.double(), exact, **tolerance)


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize(("policy", "reference"), [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_two_models_whose_rows_start_between_16_byte_boundaries(policy, reference, direction):
    """Both alike, or one of them apart from the other; forward, and backward into a memory of its own and in place."""
    both = torch.randn(2, 2, 3, 9001) * 2
    logits, ref = (x[:, skip : skip + 2] for x, skip in zip(both, (policy, reference)))
    options = (None, None, 0.8, 5.0, direction)
    kl, saved = KERNELS["logits_kl"](logits, ref, *options)
    exact, exact_saved = logits_kl_reference(logits.double(), ref.double(), *options)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(saved.double(), exact_saved, rtol=1e-6, atol=1e-6)
    upstream, slope = torch.randn(kl.shape), torch.empty(logits.shape, dtype=torch.float64)
    rest = (*options[:2], exact_saved, *options[2:])
    logits_kl_backward_into_reference(slope, upstream.double(), logits.double(), ref.double(), *rest)
    apart, over = torch.full(logits.shape, float("nan")), logits.clone()
    KERNELS["logits_kl_backward_into"](apart, upstream, logits, ref, *options[:2], saved, *options[2:])
    KERNELS["logits_kl_backward_into"](over, upstream, None, ref, *options[:2], saved, *options[2:])
    for grad in (apart, over):
        torch.testing.assert_close(grad.double(), slope, rtol=2e-5, atol=1e-8)


def test_a_wrong_id_gives_nan_and_reads_nothing_else():
    logits, ids = _row_inputs(torch.float32, 33)
    ids[0, 0], ids[1, 2], ids[1, 0] = 33, -1, 2**40
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs(leaf, ids, return_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    bad = torch.tensor([[True, False, False], [True, False, True]])
    assert torch.equal(logprobs.isnan(), bad) and not entropy.isnan().any()
    assert torch.equal(leaf.grad.isnan().all(-1), bad) and torch.equal(leaf.grad.isnan().any(-1), bad)


LAYOUTS = {
    "no_leading_dimension": lambda x: x[0, 0, 0],
    "four": lambda x: x,
    "transposed": lambda x: x[0].transpose(0, 1),
    "sliced_and_transposed": lambda x: x[:, 1:, 2].transpose(0, 1),
    "expanded": lambda x: x[:1, 0, 0].expand(5, 33),
    "expanded_inside": lambda x: x[:, :1, 0].expand(2, 5, 33),
    "copied_permuted": lambda x: x.permute(2, 1, 0, 3),
    "copied_expanded": lambda x: x[0].transpose(0, 1).expand(5, 4, 3, 33),
    "copied_columns": lambda x: x[0].transpose(-1, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_strides(layout):
    """Two strides describe most layouts; the last three are copied once. Forward and backward, outputs contiguous."""
    logits = LAYOUTS[layout](torch.randn(2, 3, 4, 33))
    ids = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    options = (None, 1.0, None, -100)
    ours, theirs = (
        KERNELS["token_logprobs"](logits, ids, *options, True),
        token_logprobs_reference(logits, ids, *options, True),
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(ids.shape), torch.randn(()).expand(ids.shape)
    saved = (logits, ids, None, *theirs[1:], 1.0, None, -100)
    grad = KERNELS["token_logprobs_backward"](*upstream, *saved)
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, token_logprobs_backward_reference(*upstream, *saved), rtol=1e-5, atol=1e-7)


def test_logprobs_of_the_likeliest_token_are_never_positive():
    """Rounding of the maximum under a temperature must not give a probability above 1."""
    logits = torch.randn(40, 64) * 30 + 50
    assert (token_logprobs(logits, logits.argmax(-1), temperature=0.7) <= 0).all()


def test_softcap_keeps_the_digits_of_small_logits():
    """tanh by exp alone loses the digits of logits far below the cap."""
    logits = torch.randn(4, 200) * 1e-3
    ids = torch.randint(0, 200, (4,))
    ours = token_logprobs(logits, ids, softcap=30.0)
    exact = token_logprobs_reference(logits.double(), ids, None, 1.0, 30.0, -100, False)[0]
    torch.testing.assert_close(ours.double(), exact, rtol=2e-7, atol=0)


def test_small_divergences_keep_their_digits():
    """exp(-x) - 1 + x at x = 1e-4 is 5e-9: plain float32 has no digit of it."""
    logprobs = torch.full((1, 4), -1.0)
    ref = torch.tensor([[-1.0001, -0.9999, -1.01, -2.5]])
    options = rlhf_kernels.AdvantageOptions(kl_estimator="k3", whiten_advantages=False)
    kl = ppo_advantages(logprobs, ref, torch.zeros(1, 4), torch.zeros(1), options=options).kl
    x = logprobs.double() - ref.double()
    torch.testing.assert_close(kl.double(), torch.expm1(-x) + x, rtol=1e-6, atol=0)
    stats = ppo_loss(ref, logprobs, torch.zeros(1, 4))[1].as_dict()
    assert stats["approx_kl_k3"] == pytest.approx((torch.expm1(-x) + x).mean().item(), rel=1e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_small_divergences_over_the_vocabulary_keep_their_digits(direction):
    ref = torch.randn(3, 1000)
    logits = ref + 1e-4 * torch.randn_like(ref)
    x = logits.double().log_softmax(-1) - ref.double().log_softmax(-1)
    x, weights = (x, logits) if direction == "reverse" else (-x, ref)
    exact = (weights.double().softmax(-1) * (torch.expm1(-x) + x)).sum(-1)
    torch.testing.assert_close(logits_kl(logits, ref, direction=direction).double(), exact, rtol=1e-5, atol=0)


def test_counts_run_over_many_blocks():
    """More tokens than one part of the count, the pass and the whitening takes: 3 parts, a partial last one."""
    shape = (3, 900)
    logprobs, old, advantages, mask = (
        torch.randn(shape) * 0.1,
        torch.randn(shape) * 0.1,
        torch.randn(shape),
        torch.rand(shape) < 0.5,
    )
    loss, stats = ppo_loss(logprobs, old, advantages, mask)
    expected, expected_stats = _reference(ppo_loss, logprobs, old, advantages, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats.sums, expected_stats.sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked_whiten(logprobs, mask), _reference(masked_whiten, logprobs, mask))


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_gives_the_bits_of_the_reference(grad_dtype, seed, monkeypatch):
    """The interpreter fuses nothing: not a bit differs, over several blocks a program and a tail."""
    module = importlib.import_module("rlhf_kernels.triton.adamw_bf16")
    monkeypatch.setattr(module, "BLOCK", 256)
    monkeypatch.setattr(module, "PROGRAMS", 2)
    param, grad, exp_avg = (torch.randn(1613).mul(0.02).bfloat16() for _ in range(3))
    grad[5], grad[6], param[7] = float("nan"), float("inf"), -float("inf")
    scalars = (torch.tensor(999.0), torch.tensor(0.0), torch.tensor(8.0))
    options = (signed(seed), 1e-3, 0.9, 0.999, 1e-8, 0.01)
    ours, theirs = ([x.clone() for x in (param, exp_avg, exp_avg.square())] for _ in range(2))
    for run, (p, m, v) in ((KERNELS["adamw_bf16_"], ours), (adamw_bf16_reference, theirs)):
        run(p, grad.to(grad_dtype), m, v, *scalars, *options)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def test_adamw_counts_positions_in_64_bits():
    """A part of a tensor beyond 2^32 elements, as the launcher passes the last ones."""
    module = importlib.import_module("rlhf_kernels.triton.adamw_bf16")
    first, n = 3 * 2**32 + 2**31 + 16, 300
    param, exp_avg, exp_avg_sq = (torch.ones(n).bfloat16() for _ in range(3))
    step = torch.tensor(7.0)
    # Nothing moves but the first moment, by a third of a unit in its last place.
    rate = 2.0**-8 / 3
    module.launch(
        module._adamw_kernel, (1,), param, param, torch.zeros(n).bfloat16(), exp_avg, exp_avg_sq, step, None, None,
        n, signed(mix64(9)), first, 0.0, 0.9, 0.9, 1.0, rate, 1.0, 0.0, 1e-8, BLOCK=512,
    )  # fmt: skip
    bits = random_bits(9, step, first, n)[1]
    fallen = (torch.tensor(1.0) - torch.tensor(rate)).view(torch.int32) & 0xFFFF
    assert torch.equal(exp_avg == 1, bits + fallen >= 2**16)
    assert 50 < int((exp_avg == 1).sum()) < 250 and bool((param == 1).all()) and bool((exp_avg_sq == 1).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.double(), "grad: expected contiguous torch.bfloat16 or torch.float32"),
        (lambda x: x.T.contiguous().T, r"grad: .* with strides \(1, 3\)"),
        (lambda x: x[:, :4], r"grad: expected contiguous .* \(3, 5\) on cpu, got torch.bfloat16 \(3, 4\)"),
    ],
)
def test_direct_calls_of_adamw_with_a_gradient_that_a_pointer_would_misread(change, words):
    param = torch.zeros(3, 5).bfloat16()
    options = (torch.ones(()), None, None, 0, 1e-3, 0.9, 0.999, 1e-8, 0.0)
    with pytest.raises(ValueError, match=words):
        torch.ops.rlhf_kernels.adamw_bf16_(param, change(param), param.clone(), param.clone(), *options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.double(), "values: expected contiguous torch.float32"),
        (lambda x: x.T.contiguous().T, r"values: .* with strides \(1, 3\)"),
        (lambda x: x[:, :4], r"values: expected contiguous torch.float32 \(3, 5\) on cpu, got torch.float32 \(3, 4\)"),
    ],
)
def test_direct_calls_with_tensors_a_pointer_would_misread(change, words):
    rewards = torch.randn(3, 5)
    with pytest.raises(ValueError, match=words):
        torch.ops.rlhf_kernels.gae(rewards, change(rewards), None, None, None, 0.9, 0.9, False)
