"""token_logprobs: the battery, then what is particular to it."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import testing, token_logprobs

BACKENDS = testing.available_backends("token_logprobs")
INF = float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


@battery("token_logprobs")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def test_closed_form(backend):
    """Uniform rows: log-probability -log V and entropy log V; a distribution written by hand."""
    logprobs, entropy = token_logprobs(torch.zeros(2, 8), torch.tensor([0, 7]), return_entropy=True)
    torch.testing.assert_close(logprobs, torch.full((2,), -(torch.tensor(8.0).log().item())))
    torch.testing.assert_close(entropy, torch.full((2,), torch.tensor(8.0).log().item()))
    p = torch.tensor([[0.5, 0.25, 0.25]])
    logprobs, entropy = token_logprobs(p.log(), torch.tensor([1]), return_entropy=True)
    torch.testing.assert_close(logprobs, torch.tensor([0.25]).log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))


def test_causal_shift_is_a_view(backend):
    """logits[:, :-1] needs no copy and equals the copy."""
    logits, ids = torch.randn(3, 7, 40), torch.randint(0, 40, (3, 7))
    shifted = token_logprobs(logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(shifted, token_logprobs(logits[:, :-1].contiguous(), ids[:, 1:]), rtol=0, atol=1e-6)
    torch.testing.assert_close(shifted, logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0])


def test_any_leading_strides(backend):
    """Transposed, expanded and four-dimensional leading dimensions, forward and backward."""
    base = torch.randn(2, 3, 4, 33)
    ids = torch.randint(0, 33, (4, 2, 3))
    transposed = base.permute(2, 0, 1, 3).requires_grad_()
    token_logprobs(transposed, ids).sum().backward()
    plain = base.permute(2, 0, 1, 3).contiguous().requires_grad_()
    token_logprobs(plain, ids).sum().backward()
    torch.testing.assert_close(transposed.grad, plain.grad)
    expanded = torch.randn(1, 33).expand(5, 33)
    ids = torch.arange(5)
    torch.testing.assert_close(token_logprobs(expanded, ids), expanded.log_softmax(-1).gather(-1, ids[:, None])[:, 0])


def test_common_offset_keeps_the_gradient(backend):
    """pytorch#195829: an offset of 1e4 on a whole row. One saved log-sum-exp would cost 5e-4 of the gradient."""
    logits = (torch.randn(4, 500) * 2).add_(1e4).requires_grad_()
    ids = torch.randint(0, 500, (4,))
    token_logprobs(logits, ids).sum().backward()
    exact = logits.detach().double().requires_grad_()
    exact.log_softmax(-1).gather(-1, ids[:, None]).sum().backward()
    assert (logits.grad - exact.grad).abs().max() / exact.grad.abs().max() < 2e-6


def test_minus_inf_logits(backend):
    """Top-k masks: VeOmni#720, axolotl: no 0 * inf; choosing a banned token gives -inf and no gradient to it."""
    logits = torch.tensor([[1.0, -INF, 2.0], [1.0, -INF, 2.0], [-INF, -INF, -INF]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1, 2]), return_entropy=True)
    two = torch.tensor([1.0, 2.0]).log_softmax(-1)
    torch.testing.assert_close(logprobs[0], two[0])
    torch.testing.assert_close(entropy[:2], -(two.exp() * two).sum().expand(2))
    assert logprobs[1] == -INF
    assert logprobs[2].isnan() and entropy[2].isnan()
    (logprobs[0] + entropy[0]).backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0].isfinite().all()
    assert not logits.grad[1].any()


def test_row_with_nan_is_nan(backend):
    logits = torch.randn(3, 200)
    logits[1, 150] = float("nan")
    logprobs, entropy = token_logprobs(logits, torch.tensor([5, 6, 7]), return_entropy=True)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_either_output_alone(backend):
    """TRL's chunked function drops the entropy gradient in silence; ours gives each alone and both together."""
    ids = torch.randint(0, 50, (6,))
    grads = []
    for pick in ((1, 0), (0, 1), (1, 1)):
        logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = token_logprobs(logits, ids, return_entropy=True)
        sum(o.sum() for o, wanted in zip(outputs, pick) if wanted).backward()
        grads.append(logits.grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=1e-5, atol=1e-7)


def test_positive_logprobs_never(backend):
    """verl#2656: fused log-probabilities above 0."""
    logits = torch.randn(64, 101) * 30
    assert (token_logprobs(logits, logits.argmax(-1)) <= 0).all()


def test_vocabulary_not_a_multiple_of_a_block(backend):
    """verl#2899, #5349: padded columns counted as logit 0. All logits far below 0 show it."""
    for vocab in (1, 3, 1023, 1025, 4095, 4097, 8191):
        logprobs = token_logprobs(torch.full((2, vocab), -50.0), torch.tensor([0, vocab - 1]))
        torch.testing.assert_close(
            logprobs, torch.full((2,), -float(torch.tensor(float(vocab)).log())), rtol=1e-6, atol=1e-6
        )


def test_wrong_id_names_its_position():
    ids = torch.tensor([[1, 2, 3], [4, 40, 5]])
    for name in BACKENDS:
        if name == "triton":
            continue  # a GPU kernel does not look: NaN instead
        with (
            rlhf_kernels.backend(name),
            pytest.raises(ValueError, match=r"token_ids: .*\[0, 40\).*got 40 at position \(1, 1\)"),
        ):
            token_logprobs(torch.randn(2, 3, 40), ids)
        with rlhf_kernels.backend(name), pytest.raises(ValueError, match=r"got -1 at position \(0, 2\)"):
            token_logprobs(torch.randn(2, 3, 40), torch.tensor([[1, 2, -1], [4, 3, 5]]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"logits": torch.randn(2, 4, 9)},
            ValueError,
            r"logits: expected logits \(2, 3, 'V'\).*got \(2, 4, 9\).*shift",
        ),
        ({"logits": torch.randn(2, 3, 0)}, ValueError, "logits: expected a vocabulary of at least one token"),
        ({"logits": torch.ones(2, 3, 9, dtype=torch.int64)}, TypeError, "logits: expected float32.*got torch.int64"),
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"token_ids": torch.zeros(2, 3)}, TypeError, "token_ids: expected int64 or int32, got torch.float32"),
        (
            {"token_ids": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            ValueError,
            "token_ids: expected device cpu",
        ),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite int or float"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: expected the shape \(2, 3\) of the tokens"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number above 0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"logits": torch.randn(2, 3, 9), "token_ids": torch.zeros(2, 3, dtype=torch.int64), **change}
    with pytest.raises(error, match=words):
        token_logprobs(arguments.pop("logits"), arguments.pop("token_ids"), **arguments)
