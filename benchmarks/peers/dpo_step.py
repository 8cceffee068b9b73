"""`python -m benchmarks.peers.dpo_step [--vocab N] [--json FILE]`: seconds and memory of an optimizer step of DPO.

This trainer and TRL's DPOTrainer (`make peers`) take the same steps on the same pairs in the same order, one after the
other, each in a process of its own: 16 pairs a step, sequences of 20 to 400 tokens, a Llama of width 128 and 4 layers,
float32 on the CPU, AdamW, the reference's log-probabilities scored beforehand. The first step is left out. Memory is
the process's peak over what it held when its model was built. The seconds are those of an idle machine: beside other
programs (`load_average` far above the threads) neither they nor their ratio can be trusted.

That both did the same is checked: the losses of all steps agree within 1e-4.
"""

from __future__ import annotations

import random

from benchmarks.peers import steps
from rlhf.order import permutation

TRL_PYTHON = steps.ROOT / ".venv-peers" / "bin" / "python"
SETTINGS = {"pairs": 16, "shortest": 20, "longest": 400, "learning_rate": 1e-4, "beta": 0.1, "seed": 1}
LOSS_TOLERANCE = 1e-4


def main() -> None:
    arguments = steps.parse(steps.arguments_of(__doc__, 5, TRL_PYTHON))
    settings = SETTINGS | {"vocab": arguments.vocab, "steps": arguments.steps + 1, "threads": arguments.threads}
    rng, lengths = random.Random(0), []
    for _ in range(settings["pairs"] * settings["steps"]):
        prompt = rng.randint(5, settings["shortest"] - 5)
        lengths.append([prompt, *(rng.randint(settings["shortest"], settings["longest"]) - prompt for _ in range(2))])
    order = permutation(len(lengths), f"{SETTINGS['seed']}/0")
    results = steps.compare("dpo", settings | {"pair_lengths": lengths, "order": order}, arguments.trl_python, check)
    report = {"machine": steps.machine(arguments.trl_python), "settings": settings, "results": results}
    report["rlhf_over_trl"] = steps.ratios(results, "rlhf", "trl")
    sizes = f"sequences of {settings['shortest']} to {settings['longest']} tokens"
    title = f"one DPO step of {settings['pairs']} pairs, vocabulary {settings['vocab']:,}, {sizes}"
    steps.show(title, report, "rlhf_over_trl")
    print("losses: " + "; ".join(f"{n} {[round(x, 5) for x in r['losses']]}" for n, r in results.items()))
    steps.write(arguments.json, report)


def check(results: dict, settings: dict) -> None:
    """Both took the same steps."""
    for name, row in results.items():
        if len(row["losses"]) != settings["steps"] or len(row["seconds"]) != settings["steps"]:
            raise SystemExit(f"{name}: expected {settings['steps']} steps, got the losses {row['losses']}")
    ours, theirs = (row["losses"] for row in results.values())
    if any(abs(a - b) > LOSS_TOLERANCE for a, b in zip(ours, theirs)):
        raise SystemExit(f"the losses differ: {ours} (rlhf) and {theirs} (trl)")


if __name__ == "__main__":
    main()
