"""linear_kl: the battery, then what is particular to it."""

import pytest
import torch
from conftest import battery

import rlhf_kernels
from rlhf_kernels import Chunking, _head, linear_kl, testing
from rlhf_kernels.ops.linear_kl import linear_kl_op
from rlhf_kernels.ops.logits_kl import DIRECTIONS

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
N, H, R, V = 13, 16, 11, 37  # the reference is of another width


@battery("linear_kl")
def test_battery(backend, case, check):
    with rlhf_kernels.backend(backend):
        testing.CHECKS[check](case, "cpu")


def _inputs(dtype=torch.float32, width=R):
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,)}
    shapes |= {"ref_hidden": (N, width), "ref_weight": (V, width), "ref_bias": (V,)}
    out = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return {name: x.requires_grad_(not name.startswith("ref_")) for name, x in out.items()}


def _plain(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scale=1.0, ref_scale=1.0, direction="reverse"):
    logp, logq = (scale * (hidden @ weight.T + bias)), ref_scale * (ref_hidden @ ref_weight.T + ref_bias)
    logs = [x.log_softmax(-1) for x in (logp, logq)]
    a, b = logs if direction == "reverse" else logs[::-1]
    return (a.exp() * (a - b)).sum(-1)


def _gradients(inputs, **options):
    """[kl, gradients of hidden, weight and bias] for an upstream that differs from token to token."""
    kl = linear_kl(**inputs, **options)
    upstream = torch.linspace(-2, 3, kl.numel(), dtype=kl.dtype).view_as(kl)
    return [kl, *torch.autograd.grad(kl, [inputs[name] for name in ("hidden", "weight", "bias")], upstream)]


@both_directions
def test_values_and_gradients_of_the_plain_sum(direction):
    """Another width, bias and scale of the reference; ref_logit_scale is logit_scale unless given."""
    inputs = _inputs(torch.float64)
    learned = [inputs[name] for name in ("hidden", "weight", "bias")]
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    for given, scales in (({}, (1.0, 1.0)), ({"ref_logit_scale": 0.7}, (0.5, 0.7)), ({}, (0.5, 0.5))):
        expected = _plain(**inputs, scale=scales[0], ref_scale=scales[1], direction=direction)
        ours = _gradients(inputs, logit_scale=scales[0], direction=direction, **given)
        torch.testing.assert_close(ours, [expected, *torch.autograd.grad(expected, learned, upstream)])


@both_directions
def test_temperature_and_softcap(direction):
    inputs, temperature = _inputs(torch.float64), torch.rand(N, dtype=torch.float64) + 0.5
    capped = {}
    for name in ("", "ref_"):
        logits = inputs[f"{name}hidden"] @ inputs[f"{name}weight"].T + inputs[f"{name}bias"]
        capped[f"{name}logits"] = 3.0 * torch.tanh(logits / 3.0) / temperature[:, None]
    expected = rlhf_kernels.logits_kl(**capped, direction=direction)
    ours = linear_kl(**inputs, temperature=temperature, softcap=3.0, chunk_size=5, direction=direction)
    torch.testing.assert_close(ours, expected)
    for name in ("hidden", "weight", "bias"):
        grads = [torch.autograd.grad(x.sum(), inputs[name], retain_graph=True)[0] for x in (ours, expected)]
        torch.testing.assert_close(*grads)


@both_directions
def test_gradcheck(direction):
    inputs = {name: x.detach()[:5].clone() for name, x in _inputs(torch.float64).items()}  # a vocabulary of 5

    def function(hidden, weight, bias):
        arguments = inputs | {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_kl(**arguments, mask=torch.tensor([1, 1, 0, 1, 1]) > 0, chunk_size=4, direction=direction)

    learned = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(function, learned)


@both_directions
def test_equal_heads_are_exactly_0_apart(direction):
    inputs = _inputs(width=H)
    for name in ("hidden", "weight", "bias"):
        inputs[f"ref_{name}"] = inputs[name].detach().clone()
    assert not any(x.any() for x in _gradients(inputs, direction=direction, temperature=0.7, chunk_size=5))


@both_directions
def test_small_divergences_keep_their_digits(direction):
    """Of integers and multiples of 2^-16, whose products float32 holds: nothing is lost before the sums."""
    hidden, weight = torch.randint(-3, 4, (N, H)).float(), torch.randint(-1024, 1025, (V, H)) / 2**10
    near = weight + torch.randint(-4, 5, (V, H)) / 2**16
    kl = linear_kl(hidden, near, hidden, weight, direction=direction)
    z, ref_z = (hidden.double() @ w.double().T for w in (near, weight))
    x = z.log_softmax(-1) - ref_z.log_softmax(-1)
    x, weights = (x, z) if direction == "reverse" else (-x, ref_z)
    exact = (weights.softmax(-1) * (torch.expm1(-x) + x)).sum(-1)
    assert exact.max() < 1e-6
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 1000, Chunking(tokens=7)])
def test_chunks_change_no_result(chunk):
    inputs = _inputs(torch.float64)
    torch.testing.assert_close(_gradients(inputs, chunk_size=chunk), _gradients(inputs), rtol=1e-12, atol=1e-12)


@both_directions
@pytest.mark.parametrize("columns", [1, 7, 40])
def test_tiles_of_the_vocabulary_change_no_gradient(monkeypatch, columns, direction):
    """As a GPU cuts the backward: what the rows saved serves any columns of them."""
    inputs, options = _inputs(torch.float64), {"softcap": 4.0, "temperature": 0.7, "direction": direction}
    whole = _gradients(inputs, **options)
    monkeypatch.setitem(_head.MIN_COLUMNS, "cpu", columns)
    torch.testing.assert_close(_gradients(inputs, chunk_size=2, **options), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 6, 7])
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN"))])  # fmt: skip
def test_both_logits_together_are_no_larger_than_a_chunk(monkeypatch, chunk, onednn):
    held, tokens, logits = [], set(), _head.Head.logits

    def record(self, *piece):
        held.append(logits(self, *piece))
        tokens.add(len(held[-1]))
        return held[-1]

    monkeypatch.setattr(_head.Head, "logits", record)
    monkeypatch.setattr(_head, "ONEDNN", onednn)
    _gradients(_inputs(), chunk_size=chunk)
    assert tokens == {max(1, chunk // 2), 1}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    passes = 2  # a forward and a backward hold two halves each
    assert sum(storages.values()) <= passes * max(2, chunk) * V * 4


def test_products_are_counted(monkeypatch):
    """Two forward; in the backward the two again and one for each gradient that is wanted."""
    monkeypatch.setattr(_head, "ONEDNN", False)
    products, accumulate = [], _head.accumulate
    monkeypatch.setattr(
        _head, "accumulate", lambda out, *a, **k: (products.append(tuple(out.shape)), accumulate(out, *a, **k))
    )
    inputs = {name: x.detach() for name, x in _inputs().items() if "bias" not in name}
    of_both, gradients = [(N, V), (N, V)], {"hidden": (N, H), "weight": (V, H)}
    for wanted in (["hidden"], ["weight"], ["hidden", "weight"]):
        products.clear()
        linear_kl(**inputs | {name: inputs[name].clone().requires_grad_() for name in wanted}).sum().backward()
        assert products == of_both + of_both + [gradients[name] for name in wanted]
    products.clear()
    with torch.no_grad():
        linear_kl(**inputs | {"hidden": inputs["hidden"].clone().requires_grad_()})
    assert products == of_both


def test_gradients_come_only_where_they_are_wanted():
    """The reference is a constant even where its tensors would learn."""
    inputs = {name: x.detach().requires_grad_(name in ("bias", "ref_hidden", "ref_weight", "ref_bias"))
              for name, x in _inputs().items()}  # fmt: skip
    linear_kl(**inputs).sum().backward()
    assert [name for name, x in inputs.items() if x.grad is not None] == ["bias"]
    constant = {name: x.detach() if name in ("hidden", "weight", "bias") else x for name, x in inputs.items()}
    assert not linear_kl(**constant).requires_grad


def test_masked_tokens_are_never_projected(monkeypatch):
    rows, logits = [], _head.Head.logits
    monkeypatch.setattr(
        _head.Head, "logits", lambda self, *piece: (rows.append(len(self.hidden)), logits(self, *piece))[1]
    )
    inputs, mask = _inputs(), torch.arange(N) % 4 == 0
    expected = _gradients(inputs, mask=mask)
    for name in ("hidden", "ref_hidden"):
        inputs[name].data[~mask] = float("nan")
    kl, d_hidden, d_weight, d_bias = found = _gradients(inputs, mask=mask)
    assert set(rows) == {int(mask.sum())} and not kl[~mask].any() and not d_hidden[~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and d_weight.any() and d_bias.any()
    assert not any(x.any() for x in _gradients(inputs, mask=torch.zeros_like(mask)))


def test_rows_that_a_gpu_would_keep(monkeypatch):
    inputs, mask = _inputs(torch.float64), torch.arange(N) % 3 > 0
    options = {"mask": mask, "chunk_size": 4, "temperature": torch.rand(N, dtype=torch.float64) + 0.5}
    options["temperature"][~mask] = float("nan")
    for name in ("hidden", "ref_hidden"):
        inputs[name].data[~mask] = float("nan")
    dropped = _gradients(inputs, **options)

    class Rows(_head.Rows):
        def __init__(self, counted):
            self.shape, self.index, self.counted = counted.shape, None, counted.reshape(-1)

    monkeypatch.setattr("rlhf_kernels.ops.linear_kl.Rows", Rows)
    torch.testing.assert_close(_gradients(inputs, **options), dropped, rtol=1e-12, atol=1e-12)


def test_tokens_that_a_bias_bans():
    inputs = _inputs()
    banned = torch.arange(V) % 5 == 2
    barred = {name: inputs[name].detach().masked_fill(banned, -float("inf")) for name in ("bias", "ref_bias")}
    barred["bias"].requires_grad_()
    kept = {name: x.detach()[~banned] if name.endswith(("bias", "weight")) else x for name, x in inputs.items()}
    for direction in DIRECTIONS:
        kl, *grads = _gradients(inputs | barred, direction=direction)
        torch.testing.assert_close(kl, linear_kl(**kept, direction=direction), rtol=1e-5, atol=1e-5)
        assert all(g.isfinite().all() for g in grads) and not grads[1][banned].any()
    assert linear_kl(**inputs | {"bias": barred["bias"]}).isfinite().all()
    assert linear_kl(**inputs | {"ref_bias": barred["ref_bias"]}).isposinf().all()


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_mixed_dtypes(dtypes):
    """Computed in float32 on a CPU; every gradient in its input's dtype."""
    inputs = _inputs()
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    cast = {name: inputs[name].detach().to(dtype) for name, dtype in zip(names, dtypes)}
    exact = {name: x.detach().double() for name, x in (inputs | cast).items()}
    cast["hidden"].requires_grad_(), cast["weight"].requires_grad_()
    kl, d_hidden, d_weight, _ = _gradients(inputs | cast)
    assert (kl.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, *dtypes[:2])
    torch.testing.assert_close(kl.double(), _plain(**exact), rtol=1e-5, atol=1e-5)


def test_layouts_of_the_tokens():
    inputs = _inputs(torch.float64)
    flat = linear_kl(**inputs)
    shaped = {name: inputs[name][:12].view(3, 2, 2, -1).transpose(0, 2) for name in ("hidden", "ref_hidden")}
    turned = {name: inputs[name].t().contiguous().t() for name in ("weight", "ref_weight")}
    torch.testing.assert_close(linear_kl(**inputs | shaped | turned), flat[:12].view(3, 2, 2).transpose(0, 2))
    assert linear_kl(**inputs | {name: inputs[name][0] for name in shaped}).shape == ()


def test_bad_input():
    inputs = {name: x.detach() for name, x in _inputs().items()}
    hidden, weight, ref_hidden, ref_weight = (inputs[k] for k in ("hidden", "weight", "ref_hidden", "ref_weight"))
    bad = [
        ({"weight": weight[0]}, ValueError, r"^weight: expected \(V, H\), got \(16,\)"),
        ({"hidden": hidden[:, :3]}, ValueError, r"^hidden: expected \(\.\.\., 16\) for weight \(37, 16\), got"),
        ({"ref_hidden": hidden}, ValueError, r"^the reference's hidden: expected \(\.\.\., 11\) for weight \(37, 11\)"),
        ({"ref_weight": ref_weight.int()}, TypeError, "^the reference's weight: expected float32, .* got torch.int32"),
        ({"ref_hidden": ref_hidden[:5]}, ValueError, r"^ref_hidden: expected \(13, '...'\) as the policy has, got \(5"),
        ({"ref_weight": ref_weight[:9], "ref_bias": None}, ValueError, r"^ref_weight: expected \(37, '...'\)"),
        ({"bias": weight[:5, 0]}, ValueError, r"^bias: expected the shape \(37,\) of the vocabulary, got \(5,\)"),
        ({"ref_bias": weight[:5, 0]}, ValueError, r"^the reference's bias: expected the shape \(37,\) of the vocabul"),
        ({"mask": torch.ones(N)}, TypeError, "^mask: expected bool, .* got torch.float32"),
        ({"mask": torch.ones(3) > 0}, ValueError, r"^mask: expected the shape \(13,\) of hidden's tokens, got \(3,\)"),
        ({"temperature": -1.0}, ValueError, "^temperature: expected a number above 0, got -1.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"^temperature: expected the shape \(13,\) of the tokens"),
        ({"softcap": 0.0}, ValueError, "^softcap: expected a number above 0, got 0.0"),
        (
            {"logit_scale": float("inf"), "ref_logit_scale": 1.0},
            ValueError,
            "^logit_scale: expected a finite int or float, got inf",
        ),
        ({"ref_logit_scale": "1"}, ValueError, "^ref_logit_scale: expected a finite int or float, got '1'"),
        ({"direction": "both"}, ValueError, "^direction: expected one of reverse, forward, got 'both'"),
        ({"chunk_size": 0}, ValueError, "^chunk_size: expected a number of tokens >= 1 or None, got 0"),
        ({k: inputs[k][:0] for k in ("weight", "bias", "ref_weight", "ref_bias")}, ValueError, "^weight: .* one token"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            linear_kl(**{**inputs, **change})


def test_sharded_weight_of_the_reference_is_refused():
    class DTensor(torch.Tensor):
        pass

    inputs = _inputs()
    with pytest.raises(TypeError, match="the reference's weight: expected a whole tensor, got a DTensor"):
        linear_kl(**inputs | {"ref_weight": inputs["ref_weight"].as_subclass(DTensor)})


def test_create_graph_is_refused():
    inputs = _inputs()
    with pytest.raises(RuntimeError, match="linear_kl is differentiable once"):
        torch.autograd.grad(linear_kl(**inputs).sum(), inputs["hidden"], create_graph=True)


def test_schema_is_stable():
    assert str(linear_kl_op._schema).startswith("rlhf_kernels::linear_kl(Tensor hidden, Tensor weight, Tensor ref_hi")
