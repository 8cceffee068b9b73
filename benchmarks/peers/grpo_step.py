"""`python -m benchmarks.peers.grpo_step [--vocab N] [--json FILE]`: a GRPO step of TRL, before and after one line.

TRL's GRPOTrainer (`make peers`) with its defaults takes the same steps twice, each time in a process of its own: as it
is ("trl"), and after `rlhf_kernels.patch("trl")` ("rlhf"). 8 completions of one prompt a step, 128 + 128 tokens, a
Llama of width 256 and 4 layers with tied embeddings, float32 on the CPU, AdamW; random weights hardly ever end a
completion early. The first step is left out. Memory is the process's peak over what it held when the model was built.

That both did the same is checked: losses, gradient norms, rewards and lengths of all steps agree within 1e-4.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import steps

DEFAULTS = {
    "trainer": "grpo",
    "device": "cpu",
    "policy": {"kind": "llama", "width": 256, "layers": 4, "heads": 4, "tie_word_embeddings": True},
    "completions": 8,
    "response_length": 128,
    "learning_rate": 1e-4,
}
COMPARED = ("loss", "grad_norm", "reward", "completions/mean_length")
TOLERANCE = 1e-4


def compare(settings: dict) -> dict:
    """The record of both."""
    python, providers = steps.TRL_PYTHON["grpo"], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        for which in ("rlhf", "trl"):
            command = str(python), "-m", "benchmarks.peers.trl_grpo_step"
            providers[which] = steps.measured(folder, settings, *command, which)
    check(providers, settings)
    return steps.record_of(settings, providers, {})


def check(providers: dict, settings: dict) -> None:
    """Both took the same steps."""
    for name, row in providers.items():
        if len(row["loss"]) != settings["steps"] or not all(row["grad_norm"]):
            raise steps.StepError(f"{name}: expected {settings['steps']} steps with a gradient, got {row['grad_norm']}")
    for figure in COMPARED:
        ours, theirs = (providers[name][figure] for name in ("rlhf", "trl"))
        if any(abs(a - b) > TOLERANCE * max(1, abs(b)) for a, b in zip(ours, theirs)):
            raise steps.StepError(f"{figure} differs: {ours} (patched) and {theirs} (TRL alone)")


def main() -> None:
    parser = steps.arguments_of(__doc__, 4)
    parser.set_defaults(vocab=151936)
    parser.add_argument("--prompt_length", type=int, default=128, help="tokens, which TRL projects on a CPU, too")
    given = parser.parse_args()
    if not steps.TRL_PYTHON["grpo"].exists():
        parser.error(f"{steps.TRL_PYTHON['grpo']} is not there: run `make peers`")
    settings = DEFAULTS | {
        "name": f"TRL's trainer on our ops, vocabulary {given.vocab:,}", "vocab": given.vocab, "threads": given.threads,
        "steps": given.steps + 1, "prompt_length": given.prompt_length,
        "longest": given.prompt_length + DEFAULTS["response_length"],
    }  # fmt: skip
    command = " ".join(["python", "-m", "benchmarks.peers.grpo_step", *sys.argv[1:]])
    facts, record = steps.machine("cpu", given.threads, command), compare(settings)
    print(steps.table(record))
    for name, row in record["providers"].items():
        print(f"{name}: " + ", ".join(f"{figure} {[round(x, 5) for x in row[figure]]}" for figure in COMPARED))
    steps.write(given.json, facts, [record])


if __name__ == "__main__":
    main()
