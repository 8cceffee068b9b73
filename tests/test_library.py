"""Policy as tests: every op is complete, backends are chosen in the open, importing changes nothing global."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import rlhf_kernels
from rlhf_kernels import _library, testing
from rlhf_kernels._head import CHUNKED

OPS = [name for name in _library.OPS if "_backward" not in name]


def file_name(op: str) -> str:
    """Files leave out the underscore that ends the name of an op that works in place."""
    return op.removesuffix("_")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_complete(op):
    """An op has a contract file, a public function with documented shapes, battery cases and a test file."""
    file = file_name(op)
    source = (ROOT / "rlhf_kernels" / "ops" / f"{file}.py").read_text()
    body = "chunked" if _library.OPS[op].kernel == CHUNKED else "reference"
    order = ['"""', "SCHEMA = ", f"def {file}_{body}(", f"{file}_op = define", f"\ndef {op}("]
    positions = [source.find(marker) for marker in order]
    assert -1 not in positions and positions == sorted(positions), dict(zip(order, positions))
    assert getattr(rlhf_kernels, op).__doc__
    assert testing.cases(op)
    assert (ROOT / "tests" / f"test_{file}.py").exists()
    assert getattr(torch.ops.rlhf_kernels, op).default is _library.OPS[op].overload


@pytest.mark.parametrize("op", [op for op in OPS if "by design" not in _library.OPS[op].kernel])
def test_every_op_with_kernels_has_a_benchmark(op):
    assert (ROOT / "benchmarks" / f"bench_{file_name(op)}.py").exists()


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda, got 'gpu'"),
        rlhf_kernels.backend("gpu"),
    ):
        pass


def test_backend_nests_and_restores():
    before = rlhf_kernels.backends().ops
    inner = "reference" if "cpu" in rlhf_kernels.backends().unavailable else "cpu"
    with rlhf_kernels.backend("reference"):
        assert set(rlhf_kernels.backends().ops["gae"].values()) == {"reference"}
        with rlhf_kernels.backend(inner):
            assert rlhf_kernels.backends().ops["gae"]["cpu"] == inner
        assert rlhf_kernels.backends().ops["gae"]["cpu"] == "reference"
    assert rlhf_kernels.backends().ops == before


def test_missing_backend_says_why():
    for name, why in rlhf_kernels.backends().unavailable.items():
        assert len(why) > 10
        with (
            pytest.raises(RuntimeError, match=f"backend '{name}' was asked for and cannot load: "),
            rlhf_kernels.backend(name),
        ):
            pass


def test_environment_chooses_and_refuses():
    code = "import rlhf_kernels, json; print(json.dumps(rlhf_kernels.backends().ops))"
    chosen = json.loads(python(code, RLHF_KERNELS_BACKEND="reference").stdout)
    assert chosen["gae"]["cpu"] == "reference"
    refused = python(code, RLHF_KERNELS_BACKEND="nonsense")
    assert refused.returncode and "expected one of reference, cpu, triton, cuda" in refused.stderr


def test_cpu_isa_is_chosen_in_the_open():
    if "cpu" in rlhf_kernels.backends().unavailable:
        pytest.skip("the C++ kernels were not built")
    code = "import rlhf_kernels; print(rlhf_kernels.backends().cpu_isa)"
    assert python(code, RLHF_KERNELS_CPU_ISA="baseline").stdout.strip() == "baseline"
    assert "baseline" in python(code, RLHF_KERNELS_CPU_ISA="sse9").stderr


def test_every_instruction_set_passes_the_battery():
    """One wheel must run on a machine without AVX2: what the processor does not choose is tested too."""
    if "cpu" in rlhf_kernels.backends().unavailable:
        pytest.skip("the C++ kernels were not built")
    checks = ("error_budget", "masked_nan", "poisoned_memory")
    code = f"from rlhf_kernels import testing; print([testing.run_battery(op, 'cpu', checks={checks}) for op in {OPS}])"
    from rlhf_kernels import _host

    for isa in filter(_host.cpu_supports, ("baseline", "avx2", "avx512")):
        done = python(code, RLHF_KERNELS_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr[-2000:]


def test_works_without_triton_and_transformers():
    """rlhf_kernels needs torch alone."""
    code = (
        "import sys; sys.modules['triton'] = sys.modules['transformers'] = sys.modules['rlhf'] = None\n"
        "import rlhf_kernels, torch; print(rlhf_kernels.gae(torch.ones(1, 2), torch.zeros(1, 2))[0].tolist())"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == pytest.approx([1.95, 1.0])


def test_import_changes_nothing_global():
    code = (
        "import torch, random, logging, warnings\n"
        "state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), random.getstate(),"
        " torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(),"
        " logging.root.handlers[:], len(warnings.filters))\n"
        "before = state()\nimport rlhf_kernels\nassert state() == before, 'changed'"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_direct_calls_of_the_ops():
    """torch.ops.rlhf_kernels.* is usable as it stands, and without a graph for what has no gradient."""
    rewards = torch.randn(2, 3, requires_grad=True)
    advantages, _ = torch.ops.rlhf_kernels.gae(rewards, torch.zeros(2, 3), None, None, None, 1.0, 0.95, False)
    assert not advantages.requires_grad


def test_a_second_derivative_is_refused():
    """A kernel's gradient has no graph: under create_graph it would be a constant, a gradient penalty silently 0."""
    logits = torch.randn(2, 5, requires_grad=True)
    loss, _ = rlhf_kernels.ppo_loss(logits, logits.detach(), logits.detach())
    for output in (rlhf_kernels.token_logprobs(logits, torch.tensor([0, 1])).sum(), loss):
        with pytest.raises(RuntimeError, match="is differentiable once"):
            torch.autograd.grad(output, logits, create_graph=True)


def test_run_battery_by_name():
    assert testing.run_battery("token_kl", checks=("error_budget",)) == len(testing.cases("token_kl"))
    with pytest.raises(ValueError, match="op: expected one of token_logprobs"):
        testing.run_battery("gea")
    with pytest.raises(ValueError, match=r"checks: expected names of error_budget, .* got eror_budget"):
        testing.run_battery("gae", checks=("eror_budget",))


def test_battery_catches_a_launcher_that_syncs(monkeypatch):
    def syncing(x, *options):
        return _library.OPS["masked_whiten"].reference(x, *options) * float(x.sum() != 0)

    monkeypatch.setattr(_library, "triton_kernels", lambda: {"masked_whiten": syncing})
    monkeypatch.delitem(_library._failures, "triton", raising=False)
    with rlhf_kernels.backend("triton"), pytest.raises(AssertionError, match=r"host syncs .*aten\.item"):
        testing.CHECKS["no_sync"](testing.cases("masked_whiten")[0], "cpu")


def test_battery_catches_a_wrong_kernel():
    """The battery itself can fail: for a kernel off by 1e-4, one that writes nothing, one that leaks under the mask."""
    op = _library.OPS["masked_whiten"]
    case = testing.cases("masked_whiten")[0]

    def broken(kernel, check):
        library = torch.library.Library("rlhf_kernels", "IMPL")
        library.impl("masked_whiten", kernel, "CPU")
        try:
            with pytest.raises(AssertionError):
                testing.CHECKS[check](case, "cpu")
        finally:
            library._destroy()

    broken(lambda *a: op.reference(*a) * 1.0001, "error_budget")
    broken(lambda x, *a: torch.empty_like(x), "poisoned_memory")
    broken(lambda x, mask, *a: op.reference(x, mask, *a).masked_fill_(~mask, 1), "masked_nan")


TWICE = """
import torch, rlhf_kernels
from rlhf_kernels import testing
torch.set_num_threads(2)
case = next(case for case in testing.cases("linear_kl", large=True) if case.name == "large_reverse")
with rlhf_kernels.backend("reference"), torch.no_grad():
    first, second = (case.call(**case.inputs(torch.float32))[0] for _ in range(2))
assert torch.equal(first, second), float((first - second).abs().max())
"""


@pytest.mark.slow
def test_the_first_call_of_a_process_is_as_exact_as_the_next():
    """pytorch#188792: without `_first_calls` 2 of 21 processes, three at a time on two cores, gave errors of 2e-5."""
    for _ in range(7):
        processes = [subprocess.Popen([sys.executable, "-c", TWICE], cwd=ROOT) for _ in range(3)]
        assert [process.wait() for process in processes] == [0, 0, 0]
