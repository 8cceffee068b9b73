"""Our linear ops beside TRL's, Liger's and torch's, in fp32 on the CPU: `python tests/peers_oracles.py` prints JSON.

Runs in the environment of `make peers`; tests/test_peers.py starts it and judges. For each output and each gradient of
a case it prints the largest value and the largest errors; for peers that define a loss differently, the gap as well.
"""

import json
import traceback
import warnings

import peers_compat_openrlhf
import peers_compat_trl
import peers_compat_verl
import peers_preferences
import peers_reward
import peers_tokens
import torch
from peers_compare import CASES

__all__ = [  # they register cases
    "CASES", "peers_compat_openrlhf", "peers_compat_trl", "peers_compat_verl", "peers_preferences", "peers_reward",
    "peers_tokens",
]  # fmt: skip


def run(name: str) -> dict:
    try:
        return CASES[name]()
    except Exception:  # a case that cannot run fails alone
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*linear_cross_entropy.*")  # it says so where it leaves the chunked path
    print(json.dumps({name: run(name) for name in CASES}))
