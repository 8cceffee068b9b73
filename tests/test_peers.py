"""Our linear ops and preference losses beside those of TRL, Liger and torch, in the environment of `make peers`.

Both errors are measured against float64. That the peer's is small says that it computes the same formula; ours may be
no more than twice the peer's, plus 1e-6 of the largest value. Their difference needs no rule: it is at most the sum.
"""

import json
import os
import subprocess

import pytest
from conftest import ROOT
from peers_oracles import CASES

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SAME_FORMULA = 1e-5  # of the largest value, in fp32
ANOTHER_FORMULA = 1e-3

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON.relative_to(ROOT)}: `make peers` makes it")


@pytest.fixture(scope="module")
def figures():
    # Of this tree, whichever the environment was made from.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(ROOT / "tests" / "peers_oracles.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_peer(case, figures):
    found = figures[case]
    assert "error" not in found, found["error"]
    assert len(found) > 1
    for name, figure in found.items():
        scale, ours, peer = (figure[key] for key in ("scale", "ours", "peer"))
        assert scale > 0, name
        assert peer <= SAME_FORMULA * scale, f"{name}: the peer is {peer / scale:.1e} off: another formula?"
        assert ours <= 2 * peer + 1e-6 * scale, f"{name}: ours is {ours / scale:.1e} off, the peer {peer / scale:.1e}"
        assert figure.get("gap", scale) > ANOTHER_FORMULA * scale, f"{name}: the definitions no longer differ"
