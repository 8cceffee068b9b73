"""On a GPU: the battery for the Triton and the CUDA kernels, long sequences, offsets beyond 2^31, CUDA graphs, no host
sync, the device of the inputs. `make gpu` runs this file and test_gpu_trainer.py."""

import pytest
import torch
from long_sequences import LAYOUTS, LENGTHS, arguments, check, convert, outputs

import rlhf_kernels
from rlhf_kernels import AdamWBF16, adamw_bf16_, gae, masked_whiten, testing, token_logprobs
from rlhf_kernels._library import OPS
from rlhf_kernels.ops.adamw_bf16 import random_bits, round_stochastically

pytestmark = pytest.mark.gpu

SCANS = ("gae", "masked_whiten", "ppo_advantages", "ppo_loss")
ROWS = ("token_logprobs", "logits_kl", "linear_token_logprobs", "linear_ppo_loss", "linear_dpo_loss", "linear_kl")
SMALL = ("token_kl", "sequence_logprobs", "group_advantages", "dpo_loss")
SCAN_PAIRS = [(op, backend) for op in SCANS for backend in ("triton", "cuda")]
PAIRS = [*((op, "triton") for op in (*ROWS, "adamw_bf16_")), *SCAN_PAIRS]
CASES = [
    *(pytest.param(case, backend, id=f"{backend}-{case}") for op, backend in PAIRS for case in testing.cases(op)),
    *(pytest.param(case, None, id=str(case)) for op in SMALL for case in testing.cases(op)),
]
GPU_LENGTHS = {  # that a CPU would be slow for
    **LENGTHS,
    "many": [i % 60 + 1 for i in range(20000)],
    "rows": [300] * 5000,
    "long": [20000, 1, 17000],
}


def same(a, b) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(outputs(a), outputs(b)))


@pytest.fixture
def on_backend(request):
    with rlhf_kernels.backend(request.param):
        yield request.param


def need_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free:.0f} are")


@pytest.mark.parametrize(("case", "backend"), CASES)
def test_battery(case, backend):
    assert testing.run_battery(case, backend, "cuda") > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", GPU_LENGTHS.values(), ids=GPU_LENGTHS)
@pytest.mark.parametrize("on_backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("op", SCANS)
def test_long_sequences(op, on_backend, lengths, layout):
    check(op, lengths, layout, "cuda")


@pytest.mark.parametrize("lengths", ["warps", "chunks"])
@pytest.mark.parametrize(("op", "on_backend"), SCAN_PAIRS, indirect=["on_backend"])
def test_graph_replay_repeats_and_follows_its_inputs(op, on_backend, lengths):
    args = convert(arguments(op, LENGTHS[lengths], "packed"), "cuda", torch.float32)
    replays(lambda: OPS[op].overload(*args), args)


def test_token_logprobs_in_a_graph():
    logits, ids = torch.randn(7, 5000, device="cuda"), torch.randint(5000, (7,), device="cuda")
    with rlhf_kernels.backend("triton"):
        replays(lambda: token_logprobs(logits, ids, return_entropy=True), [logits])


def replays(run, args) -> None:
    """Captures `run`, changes its inputs in place and asks the graph for the bits of a fresh call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.mul_(0.5).add_(0.125)
    graph.replay()
    assert same(captured, run())
    graph.replay()
    assert same(captured, run())


@pytest.mark.parametrize("lengths", ["warps", "blocks", "chunks"])
@pytest.mark.parametrize(("op", "on_backend"), SCAN_PAIRS, indirect=["on_backend"])
def test_no_host_sync(op, on_backend, lengths):
    args = convert(arguments(op, LENGTHS[lengths], "packed"), "cuda", torch.float32)
    OPS[op].overload(*args)  # a first call may load a module
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS[op].overload(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_logits_beyond_2_31_elements():
    need_memory(20)
    rows, vocabulary = 16900, 128256
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device="cuda")
    logprobs = token_logprobs(logits, ids)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    tail = logits[-2:].detach().double().requires_grad_()
    expected = torch.log_softmax(tail, -1).gather(-1, ids[-2:, None])[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), tail)
    torch.testing.assert_close(logprobs[-2:].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[-2:].double(), expected_gradient, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("on_backend", ["triton", "cuda"], indirect=True)
def test_scan_beyond_2_31_tokens(on_backend):
    need_memory(45)
    rewards = torch.randn(3, 2**30 // 3 * 2 + 7, device="cuda")
    values = torch.zeros(1, 1, device="cuda").expand(rewards.shape).contiguous()
    advantages, returns = gae(rewards, values, gamma=0.9, lam=0.9)
    tail = slice(-500, None)
    expected, _ = gae(rewards[:, tail].cpu().double(), values[:, tail].cpu().double(), gamma=0.9, lam=0.9)
    torch.testing.assert_close(advantages[:, tail].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(advantages[:, tail], returns[:, tail])


@pytest.mark.parametrize("on_backend", ["triton", "cuda"], indirect=True)
def test_whitening_beyond_2_31_elements(on_backend):
    need_memory(30)
    x = torch.randn(2**31 + 5, device="cuda").add_(1e3)
    out = masked_whiten(x)
    part = x[-1000:].double()
    torch.testing.assert_close(
        out[-1000:].double(), part - 1e3, rtol=1e-3, atol=1e-3
    )  # its mean and variance are known


@pytest.mark.parametrize("on_backend", ["triton", "cuda"], indirect=True)
def test_bad_bounds_read_nothing_outside(on_backend):
    tokens = torch.randn(6, device="cuda")
    for bounds in ([0, 2**31 - 1, 6], [0, 4, -3, 6], [-(2**31), 6]):
        gae(tokens, tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device="cuda"))
        torch.cuda.synchronize()


def test_bad_ids_give_nan():
    logits = torch.randn(4, 50, device="cuda", requires_grad=True)
    with rlhf_kernels.backend("triton"):
        logprobs = token_logprobs(logits, torch.tensor([3, 50, -1, 7], device="cuda"))
        (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    bad = torch.tensor([False, True, True, False], device="cuda")
    assert torch.equal(logprobs.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad)
    assert torch.equal(gradient.isnan().any(-1), bad)


@pytest.mark.parametrize(("op", "on_backend"), SCAN_PAIRS, indirect=["on_backend"])
def test_the_device_of_the_inputs(op, on_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = arguments(op, LENGTHS["warps"], "padded")
    assert torch.cuda.current_device() == 0
    ours = [OPS[op].overload(*convert(args, device, torch.float32)) for device in ("cuda:0", "cuda:1")]
    assert same(ours[0], [x.to("cuda:0") for x in outputs(ours[1])])


def test_adamw_draws_the_random_bits_of_the_cpu():
    """Where decay and update are 0 but for a moment's fall, only the random bits decide: they are the reference's."""
    n = 2**20 + 3
    device, host = ([torch.ones(n, dtype=torch.bfloat16, device=d) for _ in range(3)] for d in ("cuda", "cpu"))
    for p, m, v in (device, host):
        options = {"lr": 0.0, "beta1": 0.999, "beta2": 0.999, "step": 5, "seed": 2**63 + 11}
        adamw_bf16_(p, torch.zeros_like(p), m, v, **options)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(device, host))
    assert all(0.2 < x.lt(1).float().mean() < 0.3 for x in host[1:])  # 0.001 of a unit of 1/256


def test_adamw_beyond_2_32_elements():
    """The upper half of a position takes part: the tail is rounded with its own bits."""
    need_memory(40)
    n, tail = 2**32 + 1000, 1000
    states = [torch.ones(n, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    grad = torch.zeros(1, dtype=torch.bfloat16, device="cuda").expand(n).contiguous()
    options = {"lr": 0.0, "beta1": 0.999, "beta2": 0.999, "step": 5, "seed": 1}
    adamw_bf16_(states[0], grad, *states[1:], **options)
    bits = random_bits(1, torch.full((), 5.0, device="cuda"), 2**32, tail)
    fallen = torch.ones(tail, device="cuda") + (0 - torch.ones(tail, device="cuda")) * (1 - 0.999)
    assert torch.equal(states[1][-tail:], round_stochastically(fallen, bits[1]))


def test_adamw_in_a_graph_reads_step_and_found_inf_on_the_device():
    param = torch.randn(5000, device="cuda").bfloat16().requires_grad_()
    param.grad = torch.randn(5000, device="cuda").bfloat16()
    twin = param.detach().clone().requires_grad_()
    twin.grad = param.grad
    captured, plain = AdamWBF16([param], lr=1e-3), AdamWBF16([twin], lr=1e-3)
    captured.found_inf = torch.zeros((), device="cuda")
    for optimizer in (captured, plain):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for skipped in (0.0, 1.0, 0.0):
        captured.found_inf.fill_(skipped)
        graph.replay()
        if not skipped:
            plain.step()
        assert torch.equal(param, twin)
