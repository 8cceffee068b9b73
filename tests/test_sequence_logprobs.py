"""sequence_logprobs: the battery, then what is particular to it."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import sequence_logprobs, testing


@battery("sequence_logprobs")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


NAN = float("nan")
PADDED = torch.tensor([[NAN, -1.0, -2.0, -4.0], [-8.0, NAN, -16.0, NAN], [NAN] * 4])  # left padding, gaps, nothing
MASK = ~PADDED.isnan()
PACKED = torch.tensor([-1.0, -2.0, NAN, -4.0, NAN, -8.0, -16.0])  # the same sequences, their gaps elsewhere
BOUNDS = torch.tensor([0, 4, 7, 7], dtype=torch.int32)


@pytest.mark.parametrize(("average", "expected"), [(False, [-7.0, -24.0, 0.0]), (True, [-7 / 3, -12.0, 0.0])])
def test_by_hand(average, expected):
    """NaN stands under every mask; a sequence without a counted token gives 0, as a sum and as a mean."""
    expected = torch.tensor(expected)
    assert torch.equal(sequence_logprobs(PADDED, MASK, average=average), expected)
    packed = sequence_logprobs(PACKED, ~PACKED.isnan(), cu_seqlens=BOUNDS, average=average)
    assert torch.equal(packed, expected)


def test_without_a_mask_every_token_counts():
    expected = torch.tensor([-3.0, -7.0])
    x = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    assert torch.equal(sequence_logprobs(x), expected)
    assert torch.equal(sequence_logprobs(x, average=True), expected / 2)
    assert torch.equal(sequence_logprobs(x.flatten(), cu_seqlens=torch.tensor([0, 2, 4]).int()), expected)
    assert sequence_logprobs(x[:0]).shape == sequence_logprobs(x[0, :0], cu_seqlens=BOUNDS[:1]).shape == (0,)


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_by_hand(packed):
    """Of a mean: the upstream gradient over the count, exactly 0 under the mask, even where that holds NaN."""
    values, bounds = (PACKED, BOUNDS) if packed else (PADDED, None)
    x = values.clone().requires_grad_()
    sequence_logprobs(x, ~x.isnan(), cu_seqlens=bounds, average=True).backward(torch.tensor([3.0, 5.0, 7.0]))
    expected = torch.where(values >= -4, 1.0, 2.5)
    assert torch.equal(x.grad, expected.masked_fill(values.isnan(), 0))


def test_half_precision_sums_in_float32():
    """TRL#878: 4,096 tokens of -1 in bfloat16 stop at -256 when they are added in it."""
    sums = sequence_logprobs(torch.full((1, 4096), -1.0, dtype=torch.bfloat16))
    assert sums.dtype == torch.float32 and sums.item() == -4096
    assert sequence_logprobs(torch.zeros(1, 1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logprobs": [0.0]}, TypeError, "logprobs: expected a tensor, got list"),
        ({"logprobs": torch.zeros(2, 3).long()}, TypeError, "logprobs: expected float32, .* got torch.int64"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs: expected \(B, T\), got \(3,\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected bool"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask: expected the shape \(2, 3\) of logprobs"),
        ({"cu_seqlens": BOUNDS}, ValueError, r"logprobs: expected packed \(N,\) because cu_seqlens is given"),
        ({"logprobs": torch.zeros(5), "cu_seqlens": BOUNDS}, ValueError, "cu_seqlens: .* rise from 0 to 5"),
        ({"logprobs": torch.zeros(7), "cu_seqlens": BOUNDS.long()}, TypeError, "cu_seqlens: expected int32"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        sequence_logprobs(**{"logprobs": torch.zeros(2, 3), **change})
