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

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
TRL_SCRIPT = Path(__file__).with_name("trl_ppo_step.py")
MEASURES = {  # label, unit, digits
    "step_s": ("seconds (median)", 1, 2),
    "cpu_s": ("processor's seconds", 1, 2),
    "growth_bytes": ("peak over models, MB", 1e6, 0),
    "peak_bytes": ("peak of the process, MB", 1e6, 0),
}
SETTINGS = {"prompts": 64, "prompt_length": 16, "response_length": 48, "epochs": 4, "temperature": 0.7}
ENTROPY_TOLERANCE = 0.01  # of the value; samples of two trainers were up to 0.2 % apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--ragged", action="store_true", help="responses of 4 to 48 tokens")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="of both")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if not TRL_PYTHON.exists():
        parser.error(f"{TRL_PYTHON} is not there: run `make peers`")
    settings = SETTINGS | {"vocab": arguments.vocab, "steps": arguments.steps + 1, "threads": arguments.threads}
    rng, longest = random.Random(0), SETTINGS["response_length"]
    settings |= {"ragged": arguments.ragged, "longest": SETTINGS["prompt_length"] + longest}
    settings["lengths"] = [
        [rng.randint(4, longest) if arguments.ragged else longest for _ in range(SETTINGS["prompts"])]
        for _ in range(settings["steps"] + 1)  # TRL samples once more than it steps
    ]
    with tempfile.TemporaryDirectory() as name:
        report = compare(Path(name), settings)
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare(folder: Path, settings: dict) -> dict:
    """The report of both trainers. This process stays small: a child's ru_maxrss starts from its parent's."""
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    run(sys.executable, "-m", "benchmarks.peers.models", str(folder), threads=settings["threads"])
    commands = {
        "rlhf": (sys.executable, "-m", "benchmarks.peers.rlhf_ppo_step"),
        "trl": (str(TRL_PYTHON), str(TRL_SCRIPT)),
    }
    results = {}
    for name, command in commands.items():
        result = folder / f"{name}.json"
        run(*command, str(folder), str(result), threads=settings["threads"])
        results[name] = summary(json.loads(result.read_text(encoding="utf-8")))
    check(results, settings)
    ratios = {key: results["trl"][key] / results["rlhf"][key] for key in MEASURES}
    return {"machine": machine(), "settings": settings, "results": results, "trl_over_rlhf": ratios}


def run(*command: str, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")


def summary(row: dict) -> dict:
    medians = {name: statistics.median(row[key][1:]) for name, key in (("step_s", "seconds"), ("cpu_s", "cpu_seconds"))}
    return row | medians | {"growth_bytes": row["peak_bytes"] - row["built_bytes"], "load_average": os.getloadavg()[0]}


def check(results: dict, settings: dict) -> None:
    """Both did the work that is compared."""
    tokens = [sum(lengths) for lengths in settings["lengths"][: settings["steps"]]]
    for name, row in results.items():
        if row["response_tokens"] != tokens or len(row["seconds"]) != settings["steps"]:
            raise SystemExit(f"{name}: expected {tokens} tokens in the steps, got {row['response_tokens']}")
    ours, theirs = (row["entropy"][0] for row in results.values())
    if abs(ours - theirs) > ENTROPY_TOLERANCE * abs(theirs):
        raise SystemExit(f"the policies differ: entropy {ours:.2f} (rlhf) and {theirs:.2f} (trl) in the first step")


def machine(python: Path = TRL_PYTHON) -> dict:
    models = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    version = "import importlib.metadata as m; print(*(m.version(n) for n in ('trl', 'transformers', 'torch')))"
    trl = subprocess.run([str(python), "-c", version], capture_output=True, text=True, check=True).stdout.split()
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "rlhf": {name: metadata.version(name) for name in ("rlhf-kernels", "transformers", "torch")},
        "trl": dict(zip(("trl", "transformers", "torch"), trl)),
    }


def show(report: dict) -> None:
    settings, results, ratios = report["settings"], report["results"], report["trl_over_rlhf"]
    lengths = "4 to 48" if settings["ragged"] else "48"
    print(f"one PPO step, vocabulary {settings['vocab']:,}, {lengths} new tokens, ", end="")
    print(f"{settings['threads']} threads, {report['machine']['cpu']}")
    print(f"{'':28}{'rlhf':>12}{'trl ' + report['machine']['trl']['trl']:>12}{'trl / rlhf':>12}")
    for key, (label, unit, digits) in MEASURES.items():
        values = "".join(f"{results[name][key] / unit:12.{digits}f}" for name in ("rlhf", "trl"))
        print(f"{label:28}{values}{ratios[key]:11.2f}x")
    loads = "".join(f"{results[name]['load_average']:12.1f}" for name in ("rlhf", "trl"))
    print(f"{'load average at the end':28}{loads}")
    print("timed steps, s: " + "; ".join(f"{n} {[round(s, 2) for s in r['seconds'][1:]]}" for n, r in results.items()))


if __name__ == "__main__":
    main()
