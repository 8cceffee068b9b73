"""AdamWBF16: torch.optim.AdamW's manners around adamw_bf16_."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels import AdamWBF16, adamw_bf16_, testing
from rlhf_kernels.optim import stream_seed


def model(dtype=torch.bfloat16) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3))
    layers.to(dtype)
    layers[1].float()
    return layers


def set_grads(layers: nn.Module, step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in layers.parameters():
        p.grad = (torch.randn(p.shape, generator=generator).bfloat16() * factor).to(p.dtype)


def tensors(layers: nn.Module, optimizer: AdamWBF16) -> list[torch.Tensor]:
    found = []
    for p in layers.parameters():
        found += [p.detach(), *(optimizer.state[p][name] for name in ("step", "exp_avg", "exp_avg_sq"))]
    return [x.clone() for x in found]


def same(a, b) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def test_a_step_is_the_op_with_the_parameters_own_stream():
    layers = model()
    optimizer = AdamWBF16(layers.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, seed=5)
    options = {"lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
    halves = {i: p for i, p in enumerate(layers.parameters()) if p.dtype == torch.bfloat16}
    state = {i: [p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for i, p in halves.items()}
    for step in (1, 2, 3):
        set_grads(layers, step)
        optimizer.step()
        for i, p in halves.items():
            param, exp_avg, exp_avg_sq = state[i]
            adamw_bf16_(param, p.grad, exp_avg, exp_avg_sq, **options, step=step, seed=stream_seed(5, i))
            now = optimizer.state[p]
            assert same(state[i], [p.detach(), now["exp_avg"], now["exp_avg_sq"]])
            assert now["step"] == step and now["step"].dtype == torch.float32 and now["step"].shape == ()


def test_float32_parameters_take_torchs_step():
    ours, theirs = model(torch.float32), model(torch.float32)
    optimizers = AdamWBF16(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    for step in range(3):
        for layers, optimizer in zip((ours, theirs), optimizers):
            set_grads(layers, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert all(optimizers[0].state[p]["exp_avg"].dtype == torch.float32 for p in ours.parameters())


def test_bfloat16_parameters_follow_adamw():
    half, full = model(), model(torch.float32)
    full.load_state_dict(half.state_dict())
    optimizers = AdamWBF16(half.parameters(), lr=1e-2), torch.optim.AdamW(full.parameters(), lr=1e-2)
    for step in range(30):
        for layers, optimizer in zip((half, full), optimizers):
            set_grads(layers, step)
            optimizer.step()
    for a, b in zip(half.parameters(), full.parameters()):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.01)


def test_resume_is_bit_exact(tmp_path):
    layers = model()
    optimizer = AdamWBF16(layers.parameters(), lr=1e-3, seed=9)
    for step in range(3):
        set_grads(layers, step)
        optimizer.step()
    torch.save({"model": layers.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for step in range(3, 6):
        set_grads(layers, step)
        optimizer.step()

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = model()
    resumed = AdamWBF16(again.parameters(), lr=1.0)  # options come from the file, the seed among them
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for p in again.parameters():
        assert resumed.state[p]["step"].dtype == torch.float32 and resumed.state[p]["exp_avg"].dtype == p.dtype
    torch.manual_seed(123)  # no global generator takes part
    for step in range(3, 6):
        set_grads(again, step)
        resumed.step()
    assert same(tensors(layers, optimizer), tensors(again, resumed))


def test_a_late_step_count_survives_the_file():
    """bfloat16 has no 1001: `step` must not be cast to the dtype of its parameter."""
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = AdamWBF16([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["step"].fill_(1001)
    other = AdamWBF16([param])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[param]["step"].item() == 1001 and other.state[param]["step"].dtype == torch.float32


def test_takes_over_from_torchs_adamw():
    layers = model()
    theirs = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    set_grads(layers, 0)
    theirs.step()
    ours = AdamWBF16(layers.parameters(), seed=4)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["seed"] == 4 and ours.param_groups[0]["lr"] == 1e-3
    ours.step()
    assert all(ours.state[p]["step"] == 2 for p in layers.parameters())
    assert copy.deepcopy(ours)._step_supports_amp_scaling


def test_a_parameter_without_a_gradient_keeps_its_stream():
    """The place in the list counts, not the number of gradients of a step."""
    first, second = ([nn.Parameter(torch.ones(500).bfloat16()) for _ in range(3)] for _ in range(2))
    a, b = AdamWBF16(first, lr=1e-3), AdamWBF16([{"params": second[:1]}, {"params": second[1:]}], lr=1e-3)
    for p in (*first, *second):
        p.grad = torch.ones_like(p)
    second[1].grad = None
    a.step()
    b.step()
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert torch.equal(second[1], torch.ones(500).bfloat16()) and not b.state[second[1]]
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_found_inf_leaves_weights_moments_and_step(value):
    layers = model()
    optimizer = AdamWBF16(layers.parameters())
    set_grads(layers, 0)
    optimizer.step()
    before = tensors(layers, optimizer)
    layers[0].weight.grad[0, 0] = float("nan")
    optimizer.found_inf = torch.tensor(value)
    optimizer.step()
    assert same(before, tensors(layers, optimizer))
    set_grads(layers, 1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    twin = model()
    plain = AdamWBF16(twin.parameters())
    for step in (0, 1):
        set_grads(twin, step)
        plain.step()
    assert same(tensors(layers, optimizer), tensors(twin, plain))


def test_grad_scaler():
    """Scaled gradients give the step of plain ones; an overflow is skipped and lowers the scale."""
    layers, twin = model(), model()
    scaled, plain = AdamWBF16(layers.parameters()), AdamWBF16(twin.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))  # creates the scale
    for step in range(4):
        set_grads(layers, step, 256.0)
        if step == 2:
            scaler.update(256.0)
            layers[2].weight.grad[0, 0] = float("inf")
        scaler.step(scaled)
        scaler.update(256.0 if step != 2 else None)
        if step == 2:
            assert scaler.get_scale() == 128.0
            scaler.update(256.0)
            continue
        set_grads(twin, step)
        plain.step()
    assert same(tensors(layers, scaled), tensors(twin, plain))
    assert not hasattr(scaled, "found_inf")


def test_no_host_sync():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layers = model()
    optimizer = AdamWBF16(layers.parameters())
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
    set_grads(layers, 0)
    optimizer.step()
    with Watch():
        optimizer.step()
    assert sum("adamw_bf16_" in name for name in seen) == 4 and sum("_fused_adamw_" in name for name in seen) == 1
    assert not [name for name in seen if name.startswith(testing.SYNCS)]


def test_closure_and_schedule():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamWBF16([param], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = (param.float() ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.step(closure) < 4.0


BF16 = torch.zeros(4, 6, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("params", "options", "error", "words"),
    [
        (
            [BF16.half()],
            {},
            TypeError,
            r"params: number 0 of group 0, .*expected bfloat16 or float32, got torch.float16",
        ),
        ([BF16, BF16.T.contiguous().T], {}, ValueError, r"params: number 1 of group 0, .*contiguous .*\(1, 4\)"),
        ([BF16], {"lr": -1.0}, ValueError, "lr: expected a number >= 0"),
        ([BF16], {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a number below 1, got 1.0"),
        ([BF16], {"eps": 0}, ValueError, "eps: expected a number above 0"),
        ([BF16], {"weight_decay": -0.1}, ValueError, "weight_decay: expected a number >= 0"),
        ([BF16], {"seed": 2**64}, ValueError, r"seed: expected an int in \[0, 2\^64\)"),
    ],
)
def test_bad_input(params, options, error, words):
    with pytest.raises(error, match=words):
        AdamWBF16([nn.Parameter(p) for p in params], **options)
