"""`python -m benchmarks.peers.dpo_step [--vocab N] [--json FILE]`: seconds and memory of an optimizer step of DPO.

This trainer and TRL's DPOTrainer (`make peers`) take the same steps on the same pairs in the same order, one after the
other, each in a process of its own: 16 pairs a step, sequences of 20 to 400 tokens, a Llama of width 128 and 4 layers,
float32 on the CPU, AdamW, the reference's log-probabilities scored beforehand. The first step is left out. Memory is
the process's peak over what it held when its model was built. The seconds are those of an idle machine: beside other
programs (`load_average` far above the threads) neither they nor their ratio can be trusted.

That both did the same is checked: the losses of all steps agree within 1e-4.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.peers.ppo_step import MEASURES, ROOT, machine, run, summary
from rlhf.order import permutation

TRL_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
TRL_SCRIPT = Path(__file__).with_name("trl_dpo_step.py")
SETTINGS = {"pairs": 16, "shortest": 20, "longest": 400, "learning_rate": 1e-4, "beta": 0.1, "seed": 1}
LOSS_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="of both")
    parser.add_argument("--trl-python", type=Path, default=TRL_PYTHON, help="interpreter with TRL 1.16")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if not arguments.trl_python.exists():
        parser.error(f"{arguments.trl_python} is not there: run `make peers`")
    settings = SETTINGS | {"vocab": arguments.vocab, "steps": arguments.steps + 1, "threads": arguments.threads}
    rng, lengths = random.Random(0), []
    for _ in range(settings["pairs"] * settings["steps"]):
        prompt = rng.randint(5, settings["shortest"] - 5)
        lengths.append([prompt, *(rng.randint(settings["shortest"], settings["longest"]) - prompt for _ in range(2))])
    settings |= {"pair_lengths": lengths, "order": permutation(len(lengths), f"{SETTINGS['seed']}/0")}
    with tempfile.TemporaryDirectory() as name:
        report = compare(Path(name), settings, arguments.trl_python)
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare(folder: Path, settings: dict, trl_python: Path) -> dict:
    """The report of both trainers."""
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    run(sys.executable, "-m", "benchmarks.peers.models", str(folder), threads=settings["threads"])
    commands = {
        "rlhf": (sys.executable, "-m", "benchmarks.peers.rlhf_dpo_step"),
        "trl": (str(trl_python), str(TRL_SCRIPT)),
    }
    results = {}
    for name, command in commands.items():
        result = folder / f"{name}.json"
        run(*command, str(folder), str(result), threads=settings["threads"])
        results[name] = summary(json.loads(result.read_text(encoding="utf-8")))
    check(results, settings)
    ratios = {key: results["rlhf"][key] / results["trl"][key] for key in MEASURES}
    settings = {name: value for name, value in settings.items() if name not in ("pair_lengths", "order")}
    return {"machine": machine(trl_python), "settings": settings, "results": results, "rlhf_over_trl": ratios}


def check(results: dict, settings: dict) -> None:
    """Both took the same steps."""
    for name, row in results.items():
        if len(row["losses"]) != settings["steps"] or len(row["seconds"]) != settings["steps"]:
            raise SystemExit(f"{name}: expected {settings['steps']} steps, got the losses {row['losses']}")
    ours, theirs = (row["losses"] for row in results.values())
    if any(abs(a - b) > LOSS_TOLERANCE for a, b in zip(ours, theirs)):
        raise SystemExit(f"the losses differ: {ours} (rlhf) and {theirs} (trl)")


def show(report: dict) -> None:
    settings, results, ratios = report["settings"], report["results"], report["rlhf_over_trl"]
    print(f"one DPO step of {settings['pairs']} pairs, vocabulary {settings['vocab']:,}, sequences of ", end="")
    print(f"{settings['shortest']} to {settings['longest']} tokens, {settings['threads']} threads, ", end="")
    print(report["machine"]["cpu"])
    print(f"{'':28}{'rlhf':>12}{'trl ' + report['machine']['trl']['trl']:>12}{'rlhf / trl':>12}")
    for key, (label, unit, digits) in MEASURES.items():
        values = "".join(f"{results[name][key] / unit:12.{digits}f}" for name in ("rlhf", "trl"))
        print(f"{label:28}{values}{ratios[key]:11.2f}x")
    loads = "".join(f"{results[name]['load_average']:12.1f}" for name in ("rlhf", "trl"))
    print(f"{'load average at the end':28}{loads}")
    print("timed steps, s: " + "; ".join(f"{n} {[round(s, 2) for s in r['seconds'][1:]]}" for n, r in results.items()))
    print("losses: " + "; ".join(f"{n} {[round(x, 5) for x in r['losses']]}" for n, r in results.items()))


if __name__ == "__main__":
    main()
