"""linear_dpo_loss: the battery, then what is particular to it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import DPOOptions, _head, dpo_loss, linear_dpo_loss, sequence_logprobs, testing, token_logprobs
from rlhf_kernels.ops import linear_dpo_loss as module
from rlhf_kernels.ops.dpo_loss import OVER_THE_BATCH, REFERENCE_FREE, TYPES


@battery("linear_dpo_loss")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


LENGTHS = torch.tensor([5, 0, 7, 4, 3, 6])  # sequences 0, 1, 2 chosen, 3, 4, 5 rejected
H, V = 8, 23


def _options(kind="sigmoid"):
    return DPOOptions(0.3, kind, {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1}.get(kind, 0.0))


def _inputs(packed=False, gaps=True, reference=True, shape=(6, 7)):
    """Right-padded, or the same tokens packed; gaps in both."""
    x = {
        "hidden": torch.randn(*shape, H, dtype=torch.float64), "weight": torch.randn(V, H, dtype=torch.float64) / 2,
        "token_ids": torch.randint(0, V, shape), "mask": torch.rand(shape) < (0.7 if gaps else 2),
    }  # fmt: skip
    inside = torch.arange(shape[1]) < LENGTHS[: shape[0], None]
    x["mask"] &= inside
    if reference:
        x["ref_logps"] = -20 * torch.rand(shape[0], dtype=torch.float64)
    if packed:
        x |= {name: x[name][inside] for name in ("hidden", "token_ids", "mask")}
        x["cu_seqlens"] = torch.cat([torch.zeros(1), LENGTHS[: shape[0]].cumsum(0)]).int()
    return x | {name: x[name].requires_grad_() for name in ("hidden", "weight")}


def _unfused(
    hidden,
    weight,
    token_ids,
    ref_logps=None,
    mask=None,
    cu_seqlens=None,
    bias=None,
    logit_scale=1.0,
    options=None,
    **how,
):
    logits = logit_scale * (hidden @ weight.T + (0 if bias is None else bias))
    logps = sequence_logprobs(token_logprobs(logits, token_ids, **how), mask, cu_seqlens=cu_seqlens)
    lengths = sequence_logprobs(torch.ones_like(mask, dtype=torch.float64), mask, cu_seqlens=cu_seqlens)
    refs = (None, None) if ref_logps is None else ref_logps.chunk(2)
    halves = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2)))
    return *dpo_loss(*logps.chunk(2), *refs, **halves, options=options), logps.detach()


def _same(ours, expected, learned, learned_there=None):
    for a, b in zip(ours, expected):
        a, b = getattr(a, "sums", a), getattr(b, "sums", b)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    there = torch.autograd.grad(expected[0], learned_there or learned)
    for a, b in zip(torch.autograd.grad(ours[0], learned, retain_graph=True), there):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 5, 12, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_equals_dpo_loss_on_log_probs(kind, packed, chunk):
    """Loss, statistics, sums and gradients, whatever the chunks cut; a sequence is empty."""
    x = _inputs(packed, reference=kind not in REFERENCE_FREE)
    ours = linear_dpo_loss(**x, options=_options(kind), chunk_size=chunk)
    _same(ours, _unfused(**x, options=_options(kind)), [x["hidden"], x["weight"]])
    assert not ours[2].requires_grad


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"temperature": torch.linspace(0.5, 1.5, 42).view(6, 7)},
        {"softcap": 3.0},
        {"logit_scale": 0.25},
        {},
    ],
    ids=["temperature", "temperatures", "softcap", "logit_scale", "bias"],
)
def test_head_options(how, chunk):
    x = {**_inputs(), "bias": torch.randn(V, dtype=torch.float64).requires_grad_(), "options": _options("orpo")}
    del x["ref_logps"]
    _same(linear_dpo_loss(**x, **how, chunk_size=chunk), _unfused(**x, **how), [x["hidden"], x["weight"], x["bias"]])


@pytest.mark.parametrize("kind", ["sigmoid", "aot", "orpo"])
def test_packed_equals_padded(kind):
    grads = []
    for packed in (False, True):
        torch.manual_seed(0)
        x = _inputs(packed, reference=kind not in REFERENCE_FREE)
        loss, stats, logps = linear_dpo_loss(**x, options=_options(kind))
        d_hidden, d_weight = torch.autograd.grad(loss, [x["hidden"], x["weight"]])
        inside = torch.arange(7) < LENGTHS[:, None]
        grads.append((loss, stats.sums, logps, d_hidden if packed else d_hidden[inside], d_weight))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in OVER_THE_BATCH])
def test_parts_of_a_step_add_up(kind, chunk):
    """Pair 1 and then pairs 0 and 2, with the step's denominators and the NLL term."""
    x, options = _inputs(reference=kind not in REFERENCE_FREE), replace(_options(kind), sft_coef=0.5)
    whole = 3, int(x["mask"][:3].sum())
    parts = []
    for rows in ([1, 4], [0, 2, 3, 5]):
        part = {name: v if name == "weight" else v[rows] for name, v in x.items()}
        parts.append(linear_dpo_loss(**part, options=options, denominators=whole, chunk_size=chunk)[0])
    _same([sum(parts)], _unfused(**x, options=options)[:1], [x["hidden"], x["weight"]])


@pytest.fixture
def products(monkeypatch):
    """Multiplications of the head's products so far, in units of one product of all counted tokens."""
    monkeypatch.setattr(_head, "ONEDNN", False)
    done, accumulate = [], _head.accumulate

    def count(out, a, b, *args, **kwargs):
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        accumulate(out, a, b, *args, **kwargs)

    monkeypatch.setattr(_head, "accumulate", count)
    return lambda x: sum(done) / (int(x["mask"].sum()) * H * V)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "chunk", "expected"),
    [
        ("sigmoid", None, 3),
        ("orpo", 13, 3),
        ("sigmoid", 12, 4),
        ("ipo", 1, 4),
        ("aot", None, 4),
        ("aot_unpaired", 5, 4),
    ],
)
def test_products(products, kind, chunk, expected, packed):
    """Three where whole pairs fit a chunk (the longest has 13 tokens), several to a chunk or not; one under no_grad;
    none for a gradient that is not needed, and none in the backward."""
    x = _inputs(packed, gaps=False, reference=kind not in REFERENCE_FREE)
    run = lambda: linear_dpo_loss(**x, options=_options(kind), chunk_size=chunk)[0]  # noqa: E731
    run().backward()
    assert products(x) == expected
    with torch.no_grad():
        run()
    assert products(x) == expected + 1
    x["hidden"].requires_grad_(False)
    run()
    assert products(x) == 2 * expected


@pytest.mark.parametrize(("kind", "chunk"), [("sigmoid", 13), ("sigmoid", 3), ("aot", 13)])
def test_no_chunk_is_larger_than_asked(monkeypatch, kind, chunk):
    """Pairs of 9, 3 and 13 tokens: two chunks of whole pairs, or pieces of any."""
    sizes, logits = [], _head.Head.logits

    def record(self, *piece):
        out = logits(self, *piece)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(_head.Head, "logits", record)
    linear_dpo_loss(**_inputs(gaps=False), options=_options(kind), chunk_size=chunk)
    assert max(sizes) <= chunk * V and len(sizes) > 1


@pytest.mark.parametrize("kind", ["sigmoid", "aot"])
def test_only_needed_gradients(kind):
    x = {**_inputs(), "bias": torch.randn(V, dtype=torch.float64), "options": _options(kind)}
    learned = {name: x[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    expected = dict(zip(learned, torch.autograd.grad(_unfused(**x)[0], learned.values())))
    for wanted in (["hidden"], ["weight"], ["bias"], ["hidden", "bias"]):
        for name, leaf in learned.items():
            leaf.requires_grad_(name in wanted)
        loss = linear_dpo_loss(**x)[0]
        for name, grad in zip(wanted, torch.autograd.grad(loss, [learned[name] for name in wanted])):
            torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("factor", [3.0, 0.0])
@pytest.mark.parametrize("kind", ["sigmoid", "aot"])
def test_upstream_gradient(kind, factor):
    """Liger#272: a gradient formed in the forward must still meet the upstream one, and a second backward too."""
    x = _inputs()
    loss, _, _ = linear_dpo_loss(**x, options=_options(kind))
    learned = [x["hidden"], x["weight"]]
    one = torch.autograd.grad(loss, learned, retain_graph=True)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(factor * loss, learned, retain_graph=True), one):
            torch.testing.assert_close(a, factor * b)
    with pytest.raises(RuntimeError, match="linear_dpo_loss is differentiable once"):
        torch.autograd.grad(loss, learned, create_graph=True)


def _rows_of_a_gpu(monkeypatch):
    """Counting would wait for the device there: rows under the mask stay, as zeros."""

    class Rows(_head.Rows):
        def __init__(self, counted, order=None):
            self.shape, self.index = counted.shape, order
            self.counted = counted.reshape(-1) if order is None else counted.reshape(-1)[order]

    class Pairs(module._Pairs):
        def __init__(self, counted, cu_seqlens):
            super().__init__(counted, cu_seqlens)
            sizes = torch.full((2 * self.count,), counted.shape[1]) if cu_seqlens is None else cu_seqlens.diff()
            self.sizes = sizes.view(2, -1).t().reshape(-1).tolist()

    monkeypatch.setattr(module, "Rows", Rows)
    monkeypatch.setattr(module, "_Pairs", Pairs)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 14, None])
def test_nan_under_the_mask_and_in_sight(monkeypatch, chunk, packed, gpu):
    """OpenRLHF#1240: NaN in a masked token changes nothing; in a counted one it shows in loss and gradient."""
    x = {**_inputs(packed), "options": _options()}
    expected, there, mask = _unfused(**x), [x["hidden"], x["weight"]], x["mask"]
    if gpu:
        _rows_of_a_gpu(monkeypatch)
    x["token_ids"] = x["token_ids"].masked_fill(~mask, -100)
    x["hidden"] = there[0].detach().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    learned = [x["hidden"], x["weight"]]
    ours = linear_dpo_loss(**x, chunk_size=chunk)
    _same(ours, expected, learned, there)
    assert not torch.autograd.grad(ours[0], x["hidden"])[0][~mask].any()
    with torch.no_grad():
        x["hidden"][tuple(mask.nonzero()[3])] = float("nan")
    loss, _, _ = linear_dpo_loss(**x, chunk_size=chunk)
    assert loss.isnan() and all(g.isnan().any() for g in torch.autograd.grad(loss, learned))


def test_orpo_of_certain_tokens():
    """Log-probabilities of exactly 0 have infinite log-odds; their gradient must not come out as NaN."""
    hidden, weight = torch.ones(2, 3, 1).requires_grad_(), torch.tensor([[200.0], [-200.0]]).requires_grad_()
    loss, _, logps = linear_dpo_loss(hidden, weight, torch.zeros(2, 3).long(), options=DPOOptions(loss_type="orpo"))
    assert not logps.any() and loss.item() == pytest.approx(0.1 * math.log(2))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [hidden, weight]))


def test_orpo_next_to_certainty_has_no_absurd_gradient():
    """50 tokens, a gap of 40: float32 rounds the rejected probability to 1, and 1e36 would erase all else."""
    hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8) * 0.1
    hidden[1], weight[0] = 0, 0
    hidden[1, :, 0], weight[0, 0] = 40.0, 1.0
    weight[1:, 0] = 0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, _, logps = linear_dpo_loss(*leaves, torch.zeros(2, 3).long(), options=DPOOptions(loss_type="orpo"))
    assert logps[1] == 0 and loss.isfinite()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, leaves)) < 10


def test_bounds_outside_the_tokens_read_nothing_else():
    """Compiled code looks at no bounds, as a GPU's does."""
    bounds = torch.tensor([0, 4, 3_000_000], dtype=torch.int32)
    x = torch.ones(10, requires_grad=True)
    sums = torch.compile(rlhf_kernels.sequence_logprobs, backend="aot_eager")(x, cu_seqlens=bounds)
    (grad,) = torch.autograd.grad(sums.sum(), x)
    assert sums.tolist() == [4.0, 6.0] and torch.equal(grad, torch.ones(10))


@pytest.mark.parametrize("kind", TYPES)
def test_no_token_and_no_pair(kind):
    """Masked throughout: the loss of log-probabilities 0, no gradient. Without a pair: 0."""
    x = {**_inputs(reference=kind not in REFERENCE_FREE), "options": _options(kind)}
    x["mask"] = torch.zeros_like(x["mask"])
    loss, _, logps = linear_dpo_loss(**x)
    torch.testing.assert_close(loss, _unfused(**x)[0], rtol=1e-14, atol=0)
    assert loss != 0 and not logps.any()
    assert not any(g.any() for g in torch.autograd.grad(loss, [x["hidden"], x["weight"]]))
    for packed in (False, True):
        x = _inputs(packed, reference=kind not in REFERENCE_FREE, shape=(0, 7))
        loss, stats, logps = linear_dpo_loss(**x, options=_options(kind))
        assert loss == 0 and logps.shape == (0,) and not stats.sums.any()
        assert not any(g.any() for g in torch.autograd.grad(loss, [x["hidden"], x["weight"]]))


def test_training_prefers_the_chosen():
    """Plain gradient descent on the head raises the margins of every pair that has tokens."""
    x = {**{k: v.detach() for k, v in _inputs(gaps=False).items()}, "options": DPOOptions(beta=1.0)}
    x["ref_logps"] = linear_dpo_loss(**x)[2]
    weight = x.pop("weight").requires_grad_()
    first = linear_dpo_loss(weight=weight, **x)[1].as_dict()
    for _ in range(20):
        (grad,) = torch.autograd.grad(linear_dpo_loss(weight=weight, **x)[0], weight)
        weight = (weight - 0.1 * grad).detach().requires_grad_()
    last = linear_dpo_loss(weight=weight, **x)[1].as_dict()
    assert first["margins"] == first["accuracy"] == 0 and last["margins"] > 1 and last["accuracy"] == 1


PACKED_IDS = {"hidden": torch.zeros(9, H), "token_ids": torch.zeros(9).long(), "mask": None}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(3, 7, H), "token_ids": torch.zeros(3, 7).long()}, ValueError, "2B sequences, .* got 3"),
        ({**PACKED_IDS, "cu_seqlens": torch.tensor([0, 9]).int()}, ValueError, "token_ids: expected 2B .* got 1"),
        ({**PACKED_IDS, "cu_seqlens": torch.tensor([0, 9, 4, 6, 7, 8, 9]).int()}, ValueError, "cu_seqlens: .* rise"),
        ({**PACKED_IDS, "cu_seqlens": torch.tensor([0, 4, 9])}, TypeError, "cu_seqlens: expected int32"),
        (PACKED_IDS, ValueError, r"token_ids: expected \(B, T\), got \(9,\); packed"),
        (
            {"ref_logps": torch.zeros(3)},
            ValueError,
            r"ref_logps: expected the shape \(6,\) of the sequences, got \(3,\)",
        ),
        ({"ref_logps": torch.zeros(6).int()}, TypeError, "ref_logps: expected float32"),
        ({"ref_logps": torch.zeros(6, device="meta")}, ValueError, "ref_logps: expected device cpu"),
        ({"ref_logps": None}, ValueError, "ref_logps: expected a tensor with loss_type='sigmoid', got None"),
        ({"options": DPOOptions(loss_type="simpo")}, ValueError, "ref_logps: expected None with loss_type='simpo'"),
        ({"mask": torch.ones(6, 7)}, TypeError, "mask: expected bool"),
        ({"mask": torch.ones(6, 6).bool()}, ValueError, r"mask: expected the shape \(6, 7\) of token_ids"),
        ({"token_ids": torch.full((6, 7), V)}, ValueError, r"token_ids: expected ids in \[0, 23\), got 23 at position"),
        ({"weight": torch.zeros(V, 3)}, ValueError, r"hidden: expected \(\.\.\., 3\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected the shape \(23,\) of the vocabulary"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected"),
    ],
)
def test_bad_input(change, error, words):
    x = {k: v.detach() for k, v in _inputs().items()}
    with pytest.raises(error, match=words):
        linear_dpo_loss(**{**x, **change})
