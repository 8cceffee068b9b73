"""`python -m benchmarks.peers.ppo_step [--vocab N] [--ragged] [--json FILE]`: seconds and memory of a whole PPO step.

This trainer and TRL's PPOTrainer (`make peers`) do the same work, one after the other, each in a process of its own:
64 prompts of 16 tokens, 48 new tokens each (--ragged: responses of 4 to 48, drawn uniformly), 4 epochs of one
minibatch, a Llama of width 128 and 4 layers as policy, value, reference and reward model, float32 on the CPU. A step is
rollout, scoring and updates; the first is left out. Memory is the process's peak (ru_maxrss) over what it held when its
models were built. The seconds are those of an idle machine: beside other programs (`load_average` far above the
threads) neither they nor their ratio can be trusted.

That both did the work is checked, too: the tokens of a step, and in the first step entropies (of the sampled tokens,
summed over a response) which agree, as they would not with another vocabulary, length or mask.
"""

from __future__ import annotations

import random

from benchmarks.peers import steps

TRL_PYTHON = steps.ROOT / ".venv-trl" / "bin" / "python"
SETTINGS = {"prompts": 64, "prompt_length": 16, "response_length": 48, "epochs": 4, "temperature": 0.7}
ENTROPY_TOLERANCE = 0.01  # of the value; samples of two trainers were up to 0.2 % apart


def main() -> None:
    parser = steps.arguments_of(__doc__, 3, TRL_PYTHON)
    parser.add_argument("--ragged", action="store_true", help="responses of 4 to 48 tokens")
    arguments = steps.parse(parser)
    settings = SETTINGS | {"vocab": arguments.vocab, "steps": arguments.steps + 1, "threads": arguments.threads}
    rng, longest = random.Random(0), SETTINGS["response_length"]
    settings |= {"ragged": arguments.ragged, "longest": SETTINGS["prompt_length"] + longest}
    settings["lengths"] = [
        [rng.randint(4, longest) if arguments.ragged else longest for _ in range(SETTINGS["prompts"])]
        for _ in range(settings["steps"] + 1)  # TRL samples once more than it steps
    ]
    results = steps.compare("ppo", settings, arguments.trl_python, check)
    report = {"machine": steps.machine(arguments.trl_python), "settings": settings, "results": results}
    report["trl_over_rlhf"] = steps.ratios(results, "trl", "rlhf")
    lengths = "4 to 48" if settings["ragged"] else "48"
    steps.show(f"one PPO step, vocabulary {settings['vocab']:,}, {lengths} new tokens", report, "trl_over_rlhf")
    steps.write(arguments.json, report)


def check(results: dict, settings: dict) -> None:
    """Both did the work that is compared."""
    tokens = [sum(lengths) for lengths in settings["lengths"][: settings["steps"]]]
    for name, row in results.items():
        if row["response_tokens"] != tokens or len(row["seconds"]) != settings["steps"]:
            raise SystemExit(f"{name}: expected {tokens} tokens in the steps, got {row['response_tokens']}")
    ours, theirs = (row["entropy"][0] for row in results.values())
    if abs(ours - theirs) > ENTROPY_TOLERANCE * abs(theirs):
        raise SystemExit(f"the policies differ: entropy {ours:.2f} (rlhf) and {theirs:.2f} (trl) in the first step")


if __name__ == "__main__":
    main()
