"""`python -m benchmarks.peers.ppo_step [--vocab N] [--ragged] [--json FILE]`: seconds and memory of a whole PPO step.

This trainer and TRL's PPOTrainer (`make peers`) do the same work, one after the other, each in a process of its own:
64 prompts of 16 tokens, 48 new tokens each (--ragged: responses of 4 to 48, drawn uniformly), 4 epochs of one
minibatch, a Llama of width 128 and 4 layers as policy, value, reference and reward model, float32 on the CPU. A step is
rollout, scoring and updates; the first is left out. Memory is the process's peak over what it held when its models were
built. The seconds are those of an idle machine: beside other programs (`load_average` far above the threads) neither
they nor their ratio can be trusted.

That both did the work is checked, too: the tokens of a step, and in the first step entropies (of the sampled tokens,
summed over a response) which agree, as they would not with another vocabulary, length or mask.
"""

from __future__ import annotations

import random

from benchmarks.peers import steps

LLAMA = {"kind": "llama", "width": 128, "layers": 4, "heads": 4}
DEFAULTS = {
    "trainer": "ppo",
    "device": "cpu",
    "policy": LLAMA,
    "prompts": 64,
    "prompt_length": 16,
    "response_length": 48,
    "shortest": 48,  # of the responses, drawn uniformly up to response_length
    "epochs": 4,
    "temperature": 0.7,
}
# Of the value, for 3,072 tokens, whose samples were up to 0.2 % apart in two trainers; noise falls with the root.
ENTROPY_TOLERANCE = 0.01 * 3072**0.5


def settings_of(timed: int, **given) -> dict:
    """DEFAULTS with what is `given`; one step that is not timed comes first."""
    settings = DEFAULTS | given | {"steps": timed + 1}
    rng, longest = random.Random(0), settings["response_length"]
    settings["longest"] = settings["prompt_length"] + longest
    settings["lengths"] = [
        [rng.randint(settings["shortest"], longest) for _ in range(settings["prompts"])]
        for _ in range(settings["steps"] + 1)  # TRL samples once more than it steps
    ]
    return settings


def check(providers: dict, settings: dict) -> None:
    """Both did the work that is compared."""
    tokens = [sum(lengths) for lengths in settings["lengths"][: settings["steps"]]]
    for name, row in providers.items():
        if row["response_tokens"] != tokens or len(row["seconds"]) != settings["steps"]:
            raise steps.StepError(f"{name}: expected {tokens} tokens in the steps, got {row['response_tokens']}")
    first = [row["entropy"][0] for row in providers.values()]
    if max(first) - min(first) > ENTROPY_TOLERANCE / tokens[0] ** 0.5 * max(first):
        raise steps.StepError(f"the policies differ: entropies of {' and '.join(providers)} in the first step: {first}")


def main() -> None:
    parser = steps.arguments_of(__doc__, 3)
    parser.add_argument("--ragged", action="store_true", help="responses of 4 to 48 tokens")
    given = parser.parse_args()
    shortest, lengths = (4, "4 to 48") if given.ragged else (48, "48")
    name = f"vocabulary {given.vocab:,}, {lengths} new tokens"
    settings = settings_of(given.steps, name=name, vocab=given.vocab, threads=given.threads, shortest=shortest)
    steps.alone(settings, check, given.json, "benchmarks.peers.ppo_step")


if __name__ == "__main__":
    main()
