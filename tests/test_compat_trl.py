"""TRL's own trainers on our ops: every step logs the same numbers and the weights end the same, to 1e-4 in fp32.

Its functions alone are compared in tests/test_peers.py (cases compat-trl-...); both need the environment of
`make peers`.
"""

import json
import os
import subprocess

import pytest
import torch
from conftest import ROOT

from rlhf_kernels.compat import trl as compat

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
COMPILED = ("sft-compiled", "dpo-compiled", "grpo-compiled")
EAGER = (
    "sft", "sft-accumulated", "sft-dft", "dpo", "dpo-accumulated", "dpo-wpo", "grpo", "grpo-accumulated", "rloo", "kto",
)  # fmt: skip
TOLERANCE = 1e-4
needs_peers = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON.relative_to(ROOT)}: `make peers` makes it")


def run(folder, cases):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(ROOT / "tests" / "peers_trl_trainers.py"), str(folder), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def judge(found):
    assert found["steps"] == [20, 20] and found["calls"] >= 20
    assert found["unpatched"] == 0, "unpatch gives TRL's own functions back"
    assert found["moved"] > 0.01, "the weights did train"
    assert len({round(norm, 4) for norm in found["gradients"]}) > 10, "the steps did differ"
    for name, difference in found["logged"].items():
        assert difference <= TOLERANCE, f"{name} differs by {difference:.1e}"
    assert found["weights"] <= TOLERANCE


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trl"), EAGER)


@needs_peers
@pytest.mark.parametrize("case", EAGER)
def test_trainer(case, eager):
    judge(eager[case])


@needs_peers
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_trainer(case, tmp_path):
    judge(run(tmp_path, [case])[case])


def test_statistics_of_the_head():
    """Against plain torch, with ties, at which TRL counts the first of the largest logits."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    weight[5] = weight[2]
    targets = (hidden @ weight.T).argmax(-1)
    targets[0] = 6 if targets[0] != 6 else 1
    targets = torch.where(targets == 2, 5, targets)
    z = (hidden @ weight.T) / 0.5
    p = z.softmax(-1)
    found = compat.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.5, 3)
    assert (targets == 5).any(), "a tie is lost by the second"
    torch.testing.assert_close(found.log_sum_sq_probs, p.pow(2).sum(-1).log())
    torch.testing.assert_close(found.mean_logits, z.mean(-1))
    assert found.is_top1.dtype == torch.bool and found.is_top1.tolist() == (z.argmax(-1) == targets).tolist()
    assert not found.log_sum_sq_probs.requires_grad


def test_what_is_not_asked_for_is_none():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3])
    found = compat.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 3, outputs=("log_probs", "is_top1"))
    assert found.entropy is None and found.mean_logits is None and found.log_sum_sq_probs is None
    assert found.log_probs.shape == found.is_top1.shape == (3,)


def test_no_token_is_scored():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    found = compat.ChunkedLogProbFunction.apply(hidden, weight, None, torch.empty(0, dtype=torch.long), 1.0, 3)
    found.log_probs.sum().backward()
    assert weight.grad.abs().max() == 0 and found.is_top1.shape == (0,)


def test_partitioned_head_is_refused():
    weight = torch.nn.Parameter(torch.randn(7, 4))
    weight.ds_id = 0
    with pytest.raises(NotImplementedError, match="ZeRO stage 3"):
        compat.ChunkedLogProbFunction.apply(torch.randn(3, 4), weight, None, torch.tensor([1, 2, 3]), 1.0, 3)


def test_temperature_is_positive():
    for function in (compat.selective_log_softmax, compat.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="temperature"):
            function(torch.randn(2, 5), torch.tensor([0, 1]), temperature=0.0)


@needs_peers
def test_what_trl_asserts_of_its_functions_and_its_head():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(ROOT / "tests" / "peers_trl_asserts.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_peers
def test_example_runs(tmp_path):
    write = "import sys; sys.path[:0] = ['tests']; import peers_trl_trainers as t; "
    write += "t.model().save_pretrained(sys.argv[1]); t.tokenizer().save_pretrained(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(PYTHON), "-c", write, str(tmp_path / "model")], cwd=ROOT, env=environment, check=True)
    command = [str(PYTHON), str(ROOT / "examples" / "speed_up_trl.py"), "model"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "trl.trainer.utils.selective_log_softmax" in done.stdout and done.stdout.count("'loss'") == 3
