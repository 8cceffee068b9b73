"""`python -m benchmarks.peers.dpo_step [--vocab N] [--json FILE]`: seconds and memory of an optimizer step of DPO.

This trainer and TRL's DPOTrainer (`make peers`) take the same steps on the same pairs in the same order, one after the
other, each in a process of its own: 16 pairs a step, sequences of 20 to 400 tokens, a Llama of width 128 and 4 layers,
float32 on the CPU, AdamW, the reference's log-probabilities scored beforehand (--ask_reference: at every step). The
first step is left out. Memory is the process's peak over what it held when its model was built. The seconds are those
of an idle machine: beside other programs (`load_average` far above the threads) neither they nor their ratio can be
trusted.

That both did the same is checked: the losses of all steps agree within 1e-4.
"""

from __future__ import annotations

import random

from benchmarks.peers import steps
from benchmarks.peers.ppo_step import LLAMA
from rlhf.order import permutation

DEFAULTS = {
    "trainer": "dpo",
    "device": "cpu",
    "policy": LLAMA,
    "pairs": 16,
    "shortest": 20,
    "longest": 400,
    "learning_rate": 1e-4,
    "beta": 0.1,
    "seed": 1,
    "precompute": True,
}
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 0.02}  # of bfloat16, whose sums over 400 tokens are rounded differently


def settings_of(timed: int, **given) -> dict:
    """DEFAULTS with what is `given`; one step that is not timed comes first."""
    settings = DEFAULTS | given | {"steps": timed + 1}
    rng, lengths, shortest = random.Random(0), [], settings["shortest"]
    for _ in range(settings["pairs"] * settings["steps"]):
        prompt = rng.randint(5, shortest - 5)
        lengths.append([prompt, *(rng.randint(shortest, settings["longest"]) - prompt for _ in range(2))])
    order = permutation(len(lengths), f"{settings['seed']}/0")
    return settings | {"pair_lengths": lengths, "order": order}


def check(providers: dict, settings: dict) -> None:
    """Both took the same steps."""
    for name, row in providers.items():
        if len(row["losses"]) != settings["steps"] or len(row["seconds"]) != settings["steps"]:
            raise steps.StepError(f"{name}: expected {settings['steps']} steps, got the losses {row['losses']}")
    for losses in zip(*(row["losses"] for row in providers.values())):
        if max(losses) - min(losses) > LOSS_TOLERANCE[settings["device"]]:
            raise steps.StepError(f"the losses of {' and '.join(providers)} differ in a step: {losses}")


def main() -> None:
    parser = steps.arguments_of(__doc__, 5)
    parser.add_argument("--ask_reference", action="store_true", help="at every step, of a second model")
    given = parser.parse_args()
    name = f"vocabulary {given.vocab:,}"
    common = {"name": name, "vocab": given.vocab, "threads": given.threads, "precompute": not given.ask_reference}
    steps.alone(settings_of(given.steps, **common), check, given.json, "benchmarks.peers.dpo_step")


if __name__ == "__main__":
    main()
