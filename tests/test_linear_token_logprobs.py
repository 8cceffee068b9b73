"""linear_token_logprobs: the battery, then what is particular to it."""

import subprocess
import sys

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import Chunking, _head, linear_token_logprobs, testing, token_logprobs
from rlhf_kernels.ops.linear_token_logprobs import linear_token_logprobs_op


@battery("linear_token_logprobs")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def _inputs(n=13, h=16, v=37, dtype=torch.float32):
    hidden, weight = torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, v, (n,))


def _gradients(hidden, weight, ids, **options):
    logprobs, entropy = linear_token_logprobs(hidden, weight, ids, return_entropy=True, **options)
    upstream = torch.linspace(-1, 1, logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    return (
        logprobs,
        entropy,
        *torch.autograd.grad((logprobs * upstream + entropy * upstream**2).sum(), [hidden, weight]),
    )


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 1000])
def test_chunks_change_no_result(chunk):
    hidden, weight, ids = _inputs(dtype=torch.float64)
    for a, b in zip(_gradients(hidden, weight, ids), _gradients(hidden, weight, ids, chunk_size=chunk)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 7, 40])
def test_tiles_of_the_vocabulary_change_no_gradient(monkeypatch, columns):
    """verl#2899, #5349: a vocabulary that is no multiple of the tile."""
    hidden, weight, ids = _inputs(dtype=torch.float64)
    whole = _gradients(hidden, weight, ids)
    monkeypatch.setitem(_head.MIN_COLUMNS, "cpu", columns)
    for a, b in zip(whole, _gradients(hidden, weight, ids, chunk_size=1)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_chunk_is_larger_than_asked(monkeypatch):
    """Forward and backward; the buffer is one."""
    sizes, logits = [], _head.Head.logits

    def record(self, tokens, columns):
        out = logits(self, tokens, columns)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(_head.Head, "logits", record)
    monkeypatch.setitem(_head.MIN_COLUMNS, "cpu", 4)
    _gradients(*_inputs(), chunk_size=3)
    assert max(sizes) <= 3 * 37 and len(sizes) > 5


def test_peak_memory_is_a_chunk_and_the_gradients():
    """In a process of its own: 1024 tokens by 128,256 would be 525 MB of logits, a chunk is 131 MB."""
    code = """
import resource, torch, rlhf_kernels
torch.set_num_threads(1)
hidden = torch.randn(1024, 16).requires_grad_(); weight = torch.randn(128256, 16).requires_grad_()
ids = torch.randint(0, 128256, (1024,))
warm = rlhf_kernels.linear_token_logprobs(hidden[:2], weight, ids[:2], return_entropy=True)
sum(x.sum() for x in warm).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logprobs, entropy = rlhf_kernels.linear_token_logprobs(hidden, weight, ids, return_entropy=True)
(logprobs.sum() + entropy.sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 200, found.stdout


def test_ignored_tokens_are_never_projected(monkeypatch):
    rows, logits = [], _head.Head.logits
    monkeypatch.setattr(
        _head.Head, "logits", lambda self, *piece: (rows.append(len(self.hidden)), logits(self, *piece))[1]
    )
    hidden, weight, ids = _inputs()
    ids[3:] = -100
    hidden.data[3:] = float("nan")
    logprobs, entropy, d_hidden, d_weight = _gradients(hidden, weight, ids)
    assert rows == [3, 3]
    assert not logprobs[3:].any() and not entropy[3:].any() and not d_hidden[3:].any() and d_weight.isfinite().all()


def test_rows_that_a_gpu_would_keep(monkeypatch):
    """Where counting would wait for the device, ignored rows stay as zeros and give the same results."""
    hidden, weight, ids = _inputs(dtype=torch.float64)
    ids[[0, 5, 12]] = -100
    hidden.data[5] = float("nan")
    dropped = _gradients(hidden, weight, ids, chunk_size=4)

    class Rows(_head.Rows):
        def __init__(self, counted, order=None):
            self.shape, self.index = counted.shape, order
            self.counted = counted.reshape(-1) if order is None else counted.reshape(-1)[order]

    monkeypatch.setattr("rlhf_kernels.ops.linear_token_logprobs.Rows", Rows)
    for a, b in zip(dropped, _gradients(hidden, weight, ids, chunk_size=4)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_entropy_has_a_gradient_of_its_own():
    """TRL's chunked function gives the entropy no gradient, without a word."""
    hidden, weight, ids = _inputs(dtype=torch.float64)
    _, entropy = linear_token_logprobs(hidden, weight, ids, return_entropy=True)
    ours = torch.autograd.grad(entropy.sum(), [hidden, weight])
    logp = (hidden @ weight.T).log_softmax(-1)
    for a, b in zip(ours, torch.autograd.grad(-(logp.exp() * logp).sum(), [hidden, weight])):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-3


def test_only_wanted_gradients_are_computed(monkeypatch):
    monkeypatch.setattr(_head, "ONEDNN", False)
    calls, accumulate = [], _head.accumulate
    monkeypatch.setattr(
        _head, "accumulate", lambda out, *a, **k: (calls.append(tuple(out.shape)), accumulate(out, *a, **k))
    )
    hidden, weight, ids = _inputs()
    linear_token_logprobs(hidden.detach(), weight, ids).sum().backward()
    assert calls == [(13, 37), (13, 37), (37, 16)]
    calls.clear()
    linear_token_logprobs(hidden, weight.detach(), ids).sum().backward()
    assert calls == [(13, 37), (13, 37), (13, 16)]
    calls.clear()
    with torch.no_grad():
        linear_token_logprobs(hidden, weight, ids)
    assert calls == [(13, 37)]


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes(pair):
    """axolotl#2847: hidden states and head in different dtypes; each gradient in its own."""
    hidden, weight, ids = _inputs()
    hidden, weight = (x.detach().to(d).requires_grad_() for x, d in zip((hidden, weight), pair))
    logprobs, _, d_hidden, d_weight = _gradients(hidden, weight, ids)
    expected = token_logprobs(hidden.double() @ weight.double().T, ids)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert (d_hidden.dtype, d_weight.dtype, logprobs.dtype) == (*pair, torch.float32)


def test_weight_gradient_of_many_chunks_is_not_rounded_between():
    """Liger#512: a bfloat16 sum over chunks drifts. Ours, of 256, is the one-chunk gradient but for one rounding."""
    hidden, weight, ids = _inputs(n=256, h=8, v=5, dtype=torch.bfloat16)
    whole, cut = (_gradients(hidden, weight, ids, chunk_size=c)[3].float() for c in (None, 1))
    assert (whole - cut).abs().max() <= torch.finfo(torch.bfloat16).eps * whole.abs().max()


def test_a_head_of_all_banned_tokens_but_one():
    """-inf in the bias bans a token: log-probability 0 for the one that is left, and no NaN in the gradient."""
    hidden, weight, ids = _inputs()
    bias = torch.full((37,), -float("inf"))
    bias[4] = 0.5
    logprobs = linear_token_logprobs(hidden, weight, torch.full_like(ids, 4), bias=bias)
    assert not logprobs.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(logprobs.sum(), [hidden, weight]))


def test_runs_repeat_bit_for_bit_in_parts():
    """The forward under no_grad gives the bits of the forward that trains: the ratio of a first update is exactly 1."""
    hidden, weight, ids = _inputs(n=700, h=64, v=5003)
    with torch.no_grad():
        scored = linear_token_logprobs(hidden, weight, ids)
    trained, _ = linear_token_logprobs(hidden, weight, ids, return_entropy=True)
    assert torch.equal(scored, trained.detach())


def test_bad_input():
    hidden, weight, ids = _inputs()
    bad = [
        ({"weight": weight[0]}, ValueError, r"weight: expected \(V, H\), got \(16,\)"),
        (
            {"hidden": hidden[:, :3]},
            ValueError,
            r"hidden: expected \(\.\.\., 16\) for weight \(37, 16\), got \(13, 3\)",
        ),
        ({"token_ids": ids[:4]}, ValueError, r"hidden: expected \(4, 'H'\) for token_ids \(4,\), got \(13, 16\)"),
        ({"token_ids": ids.float()}, TypeError, "token_ids: expected int64 or int32, got torch.float32"),
        ({"bias": weight[:, 0][:5]}, ValueError, r"bias: expected the shape \(37,\) of the vocabulary, got \(5,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number above 0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale: expected a finite int or float"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected a number of tokens >= 1 or None, got 0"),
        ({"chunk_size": Chunking(logits_dtype=torch.bfloat16)}, TypeError, "logits_dtype: expected torch.float32"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got 0.5"),
        ({"token_ids": ids.scatter(0, torch.tensor([2]), 37)}, ValueError, r"got 37 at position \(2,\)"),
        ({"weight": weight[:0]}, ValueError, "weight: expected a vocabulary of at least one token"),
    ]
    for change, error, message in bad:
        arguments = {"hidden": hidden, "weight": weight, "token_ids": ids, **change}
        with pytest.raises(error, match=message):
            linear_token_logprobs(**arguments)


def test_position_of_a_bad_id_in_a_batch():
    hidden, weight, _ = _inputs(n=6)
    ids = torch.tensor([[1, 2, 3], [4, -7, 5]])
    with pytest.raises(ValueError, match=r"got -7 at position \(1, 1\)"):
        linear_token_logprobs(hidden.view(2, 3, 16), weight, ids)


def test_sharded_weight_is_refused():
    """apple#31, torchtune#2507, trl#6372: a DTensor head. Reading a shard as the whole is silently wrong."""

    class DTensor(torch.Tensor):
        pass

    hidden, weight, ids = _inputs()
    with pytest.raises(TypeError, match="weight: expected a whole tensor, got a DTensor"):
        linear_token_logprobs(hidden, weight.detach().as_subclass(DTensor), ids)


def test_create_graph_is_refused():
    hidden, weight, ids = _inputs()
    with pytest.raises(RuntimeError, match="linear_token_logprobs is differentiable once"):
        torch.autograd.grad(linear_token_logprobs(hidden, weight, ids).sum(), hidden, create_graph=True)


def test_autocast_on_a_cpu_rounds_nothing():
    hidden, weight, ids = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_token_logprobs(hidden, weight, ids)
    assert torch.equal(cast, linear_token_logprobs(hidden, weight, ids))


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
@pytest.mark.parametrize("width", [16, _head.ONEDNN_WIDTH, _head.ONEDNN_WIDTH + 1])
def test_either_library_may_form_the_logits(monkeypatch, width):
    """oneDNN where AMD's processors profit, up to a width; a strided bias, which it misreads; one chunk held."""
    hidden, weight, ids = _inputs(h=width)
    options = {"bias": torch.randn(37, 2)[:, 0], "logit_scale": 0.5, "chunk_size": 4}
    exact = _gradients(*(x.detach().double().requires_grad_() for x in (hidden, weight)), ids, **options)
    held, logits = [], _head.Head.logits

    def record(self, *piece):
        held.append(logits(self, *piece))
        return held[-1]

    monkeypatch.setattr(_head.Head, "logits", record)
    for onednn in (False, True):
        monkeypatch.setattr(_head, "ONEDNN", onednn)
        held.clear()
        for a, b in zip(_gradients(hidden, weight, ids, **options), exact):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
        assert sum(storages.values()) <= 2 * 4 * 37 * 4, "a forward and a backward hold a chunk each"


def test_plan_of_a_call():
    """Chunks by the sizes: 32 MiB of logits on a CPU, and no fewer than 256 tokens."""
    hidden, weight = torch.empty(4, 8, device="meta"), torch.empty(128256, 8, device="meta")
    cpu = torch.empty(4, 8)
    assert _head.plan(cpu, weight, 1.0, None).chunk_tokens == 256
    assert _head.plan(cpu, weight[:32000], 1.0, None).chunk_tokens == (32 << 20) // 128000
    assert _head.plan(hidden, weight, 1.0, 3).chunk_tokens == 3
    half = _head.plan(cpu.bfloat16(), weight.bfloat16(), 1.0, None)
    assert half.product_dtype == half.logits_dtype == torch.float32  # on a CPU
    gpu = _head.plan(hidden.bfloat16(), weight.bfloat16(), 1.0, Chunking(logits_dtype=torch.float32))
    assert (gpu.product_dtype, gpu.logits_dtype) == (torch.bfloat16, torch.float32)


def test_schema_is_stable():
    assert str(linear_token_logprobs_op._schema).startswith(
        "rlhf_kernels::linear_token_logprobs(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, "
    )
