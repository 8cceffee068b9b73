"""`python -m benchmarks.peers.grpo_step [--vocab N] [--json FILE]`: a GRPO step of TRL, before and after one line.

TRL's GRPOTrainer (`make peers`) with its defaults takes the same steps twice, each time in a process of its own: as it
is, and after `rlhf_kernels.patch("trl")`. 8 completions of one prompt a step, 128 + 128 tokens, a Llama of width 256
and 4 layers with tied embeddings, float32 on the CPU, AdamW; random weights hardly ever end a completion early. The
first step is left out. Memory is the process's peak over what it held when the model was built.

That both did the same is checked: losses, gradient norms, rewards and lengths of all steps agree within 1e-4.
"""

from __future__ import annotations

from benchmarks.peers import steps

TRL_PYTHON = steps.ROOT / ".venv-peers" / "bin" / "python"
SETTINGS = {
    "width": 256, "layers": 4, "completion_length": 128, "completions": 8, "learning_rate": 1e-4,
}  # fmt: skip
COMPARED = ("loss", "grad_norm", "reward", "completions/mean_length")
TOLERANCE = 1e-4


def main() -> None:
    parser = steps.arguments_of(__doc__, 4, TRL_PYTHON)
    parser.set_defaults(vocab=151936)
    parser.add_argument("--prompt-length", type=int, default=128, help="tokens, which TRL projects on a CPU, too")
    arguments = steps.parse(parser)
    settings = SETTINGS | {"vocab": arguments.vocab, "steps": arguments.steps + 1, "threads": arguments.threads}
    settings["prompt_length"] = arguments.prompt_length
    command = str(arguments.trl_python), "-m", "benchmarks.peers.trl_grpo_step"
    results = steps.measure({name: (*command, name) for name in ("trl", "patched")}, settings)
    check(results, settings)
    report = {"machine": steps.machine(arguments.trl_python), "settings": settings, "results": results}
    report["trl_over_patched"] = steps.ratios(results, "trl", "patched")
    lengths = f"{settings['prompt_length']} + {settings['completion_length']} tokens"
    title = f"one GRPO step of {settings['completions']} completions, vocabulary {settings['vocab']:,}, {lengths}"
    steps.show(title, report, "trl_over_patched")
    parts = "; ".join(f"{n} {row['generation_s']:.2f} + {row['training_s']:.2f}" for n, row in results.items())
    print(f"of which sampling and scoring + loss, backward and optimizer, s: {parts}")
    for name, row in results.items():
        print(f"{name}: " + ", ".join(f"{figure} {[round(x, 5) for x in row[figure]]}" for figure in COMPARED))
    steps.write(arguments.json, report)


def check(results: dict, settings: dict) -> None:
    """Both took the same steps."""
    for name, row in results.items():
        if len(row["loss"]) != settings["steps"] or not all(row["grad_norm"]):
            raise SystemExit(f"{name}: expected {settings['steps']} steps with a gradient, got {row['grad_norm']}")
    for figure in COMPARED:
        ours, theirs = (results[name][figure] for name in ("patched", "trl"))
        if any(abs(a - b) > TOLERANCE * max(1, abs(b)) for a, b in zip(ours, theirs)):
            raise SystemExit(f"{figure} differs: {ours} (patched) and {theirs} (trl)")


if __name__ == "__main__":
    main()
