"""`python -m benchmarks.reward_rankings [--seeds N] [--json FILE]`: rankings of K against pairs.

At an equal number of comparisons: C pairs, or C / (K(K-1)/2) rankings of K, whose responses are fewer. Each ranking is
also given apart, as a row for each of its pairs: the same data without the K-wise batch (arXiv 2203.02155, section 3.5,
found that such rows overfit). The data are reviews of the built-in task; the judge ranks them by gold reward plus
Gumbel noise, so that each pair of a ranking is as noisy as a pair. Every run takes the same number of comparisons a
step, and as many steps. Accuracy is that of the order of held-out reviews by the gold reward itself.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from rlhf import demo, reward_model, task
from rlhf.comparisons import load_judged, score_rows
from rlhf.config import InitConfig, RewardConfig
from rlhf.init import init
from rlhf.model import load_scorer
from rlhf.reward_report import Margins

from .report import machine, machine_line

FORMAT = 1
COMPARISONS, STEP = 1_440, 36  # in a dataset, and in an optimizer step: divisible by the pairs of 2, 4 and 9
HELD_OUT = 2_000  # pairs
EPOCHS = 4
WAYS = (("pairs", 2, False), ("rankings of 4", 4, False), ("rankings of 4, pairs apart", 4, True),
        ("rankings of 9", 9, False), ("rankings of 9, pairs apart", 9, True))  # fmt: skip


@dataclass(frozen=True)
class Row:
    way: str
    accuracies: list[float]  # one a seed
    mean: float
    standard_error: float | None
    gain: float  # over pairs, of the same seeds
    gain_standard_error: float | None
    responses: int  # that were judged
    sequences: int  # through the model in an epoch
    seconds: float  # of a run, the mean


def rankings(count: int, size: int, rng: random.Random) -> list[list[str]]:
    """Plackett-Luce: the first of two wins with probability sigmoid(gold - gold), as in rlhf.task.prefer."""
    found = []
    while len(found) < count:
        reviews = list({task.sample_review(rng): None for _ in range(size)})
        if len(reviews) == size:
            noisy = {review: task.gold(review) - math.log(-math.log(rng.random())) for review in reviews}
            found.append([f" {review}" for review in sorted(reviews, key=noisy.get, reverse=True)])
    return found


def held_out(rng: random.Random) -> list[list[str]]:
    """Pairs in the order of their gold rewards, which differ."""
    found = []
    while len(found) < HELD_OUT:
        pair = sorted((task.sample_review(rng) for _ in range(2)), key=task.gold, reverse=True)
        if task.gold(pair[0]) > task.gold(pair[1]):
            found.append([f" {review}" for review in pair])
    return found


def written(path: Path, ranked: list[list[str]]) -> str:
    return demo.write_rows(path, [{"prompt": task.PROMPT, "ranking": row} for row in ranked])


def learn(folder: Path, seed: int, size: int, apart: bool) -> tuple[float, float]:
    """(accuracy, seconds) of one run."""
    pairs = size * (size - 1) // 2
    ranked = rankings(COMPARISONS // pairs, size, random.Random(f"{seed}/{size}"))
    rows = [list(pair) for row in ranked for pair in combinations(row, 2)] if apart else ranked
    name = f"{seed}-{size}-{apart}"
    config = RewardConfig(
        model_name_or_path=str(folder / "base"),
        dataset_name=written(folder / f"{name}.jsonl", rows),
        output_dir=str(folder / name),
        seed=seed,
        device="cpu",
        max_length=32,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=STEP if apart else STEP // pairs,
        learning_rate=1e-3,
        warmup_steps=10,
        eval_fraction=0.0,
        report_to="none",
    )
    result, seconds = demo.timed(reward_model.train, config)
    scorer = load_scorer(str(result.final_dir), config)
    config = replace(config, dataset_name=[str(folder / "held_out.jsonl")], per_device_train_batch_size=256)
    judged = load_judged(config, scorer).examples
    return Margins.of(judged, score_rows(scorer, judged, config)).accuracy()["accuracy"], seconds


def compare(folder: Path, seeds: int) -> list[Row]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    reviews = [task.sample_review(random.Random(f"corpus/{i}")) for i in range(500)]
    corpus = demo.write_rows(folder / "corpus.jsonl", [{"prompt": task.PROMPT, "completion": f" {r}"} for r in reviews])
    init(InitConfig(output_dir=str(folder / "base"), dataset_name=corpus, tokenizer="word", **sizes))
    written(folder / "held_out.jsonl", held_out(random.Random("held out")))
    rows, of_pairs = [], []
    for way, size, apart in WAYS:
        accuracies, seconds = zip(*(learn(folder, seed, size, apart) for seed in range(1, seeds + 1)))
        of_pairs = of_pairs or accuracies
        mean, error = spread(accuracies)
        gain, gain_error = spread([ours - theirs for ours, theirs in zip(accuracies, of_pairs)])
        count = COMPARISONS // (size * (size - 1) // 2)
        sequences = 2 * COMPARISONS if apart else size * count
        time = statistics.mean(seconds)
        rows.append(Row(way, list(accuracies), mean, error, gain, gain_error, size * count, sequences, time))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def spread(values: Sequence[float]) -> tuple[float, float | None]:  # mean and its standard error
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def table(rows: list[Row]) -> str:
    heads = ["data", "accuracy", "gain over pairs", "responses judged", "sequences an epoch", "s a run"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        figures = [(row.mean, row.standard_error), (row.gain, row.gain_standard_error)]
        shown = [f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}") for value, error in figures]
        lines.append([row.way, *shown, f"{row.responses:,}", f"{row.sequences:,}", f"{row.seconds:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_rankings", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts = machine(torch.device("cpu"), argv)
    facts["command"] = shlex.join(["python", "-m", "benchmarks.reward_rankings", *argv])
    print(machine_line(facts), flush=True)
    with tempfile.TemporaryDirectory() as name:
        rows = compare(Path(name), args.seeds)
    print(f"\n{COMPARISONS:,} comparisons, {EPOCHS} epochs, {args.seeds} seeds, {HELD_OUT:,} held-out pairs\n")
    print(table(rows))
    if args.json:
        report = {"format": FORMAT, "machine": facts, "comparisons": COMPARISONS, "epochs": EPOCHS}
        report |= {"held_out": HELD_OUT, "results": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
