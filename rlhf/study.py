"""`rlhf demo --study`: over-optimisation at four KL penalties beside best-of-n and DPO; each variant of PPO in a table.

The task, the SFT model and the reward model are the demo's. The proxy is that reward model as it is: on 4,000 pairs it
is good enough that any KL penalty from 0.05 up keeps PPO honest, and without one it is taken apart within 60 steps
(gold 1.7 at 2.4 nats, -3.4 at 61, while the proxy rises from 1.1 to 1.3), so no weaker one is trained. How soon hangs
on the reward model: another, which differed in rounding alone, held through the 60 steps.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rlhf import demo, dpo, ppo, task
from rlhf.best_of_n import best_of_n_kl, expected_best
from rlhf.config import DemoConfig, DPOConfig
from rlhf.data import load
from rlhf.demo import GOLD, GOLD_BETA, Judge, Measurement
from rlhf.forward import token_logprobs
from rlhf.model import LanguageModel, load_language_model
from rlhf.read import Source
from rlhf.sft import collate as collate_texts
from rlhf.study_report import draw, markdown, show

BETAS = (0.0, 0.05, 0.2, 0.4)  # reward per nat
SWEEP_STEPS = 60  # at beta 0 gold is 1.7 after 10 and -3.4 after 40; at a rate of 1e-3 it fell from the third step on
SWEEP_POINTS = {*range(1, 11), *range(15, SWEEP_STEPS + 1, 5)}  # steps that are measured
VARIANT_STEPS = 40
SAMPLES = 4_096  # behind each final figure
POINT_SAMPLES = 512  # behind each point of a curve
BEST_OF = [2**i for i in range(8)]
POOL_PARTS = 16  # of the pool of best-of-n, for its standard error
DPO_BETAS = (0.1, 0.5)
DPO_EPOCHS, DPO_BATCH, DPO_RATE = 3, 64, 1e-4  # at 3e-4 the KL at beta 0.1 jumped between 1 and 45 nats
DPO_POINTS = 12  # measurements along a run
HELD_OUT_REVIEWS = 1_024
KL_TARGET, KL_TOLERANCE = 0.5, 0.25  # nats, and part of it
LAST_STEPS = 10  # whose mean KL is held against the target

NEEDED_DROP = 1.0  # of the gold reward below its best, to call a run over-optimised
TOLERATED_DROP = 0.3  # the best of 20 points of deviation 0.05 is 0.1 above the mean
NEEDED_GAIN = 1.0  # of a variant's gold reward over the SFT model's


@dataclass(frozen=True)
class Setup:
    """What every run starts from and is judged by."""

    config: DemoConfig
    folder: Path
    judge: Judge
    before: Measurement  # of the SFT model
    optimum: task.KnownOptimum

    @property
    def proxy(self) -> str:
        return str(self.folder / "reward" / "final")


@dataclass(frozen=True)
class Variant:
    name: str
    settings: dict  # of PPOConfig
    scored: bool  # the reward is the gold reward alone, at the optimum's beta
    note: str  # what is peculiar, of the run's figures


def main(config: DemoConfig) -> None:
    """The demo, or its study, which exits with status 1 and one line where a finding is not what it should be."""
    if not config.study:
        demo.main(config)
        return
    with demo.prepared(config) as folder:
        run(config, folder)


def run(config: DemoConfig, folder: Path) -> None:
    began = time.perf_counter()
    judge, stages = demo.train_judge(config, folder)
    before = stages[0].result
    setup = Setup(config, folder, judge, before, task.known_optimum(before.gold, GOLD_BETA))
    sft = figures(before) | describe(setup, judge.reference, before)
    summary = {
        "config": asdict(config),
        "samples": {"final": SAMPLES, "point": POINT_SAMPLES, "pool": len(before.proxy)},
        "sft": sft,
        "optimum": asdict(setup.optimum),
        "frontier": [asdict(task.known_optimum(before.gold, beta)) for beta in demo.FRONTIER],
        "sweep": [train_on_proxy(setup, beta) for beta in BETAS],
        "best_of_n": [best_of_n(before, n) for n in BEST_OF],
        "dpo": [train_dpo(setup, beta) for beta in DPO_BETAS],
        "variants": [train_variant(setup, variant, sft) for variant in variants(setup)],
    }
    summary["seconds"] = time.perf_counter() - began
    (folder / "study.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "study.md").write_text(markdown(summary), encoding="utf-8")
    draw(folder / "study.png", summary)
    show(summary, folder)
    if failed := shortfalls(summary):
        raise SystemExit(f"rlhf demo --study: not as it should be: {'; '.join(failed)}")


def figures(result: Measurement) -> dict[str, float]:
    """Means and their standard errors."""
    errors = {f"{name}_se": float(getattr(result, name).std()) / math.sqrt(len(result.gold)) for name in result.means()}
    return result.means() | errors


# PPO


@dataclass
class Log:
    """What a run says on its way."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def last(self, name: str) -> float:
        values = [metrics[name] for metrics in self.metrics[-LAST_STEPS:]]
        return sum(values) / len(values)


def train_ppo(
    setup: Setup, name: str, settings: dict, points: set[int]
) -> tuple[dict, LanguageModel, Measurement, Log]:
    """Figures of the policy that came out, the policy, its samples, and the log."""
    log, output = Log(), setup.folder / "study" / name.replace(" ", "-").lower()

    def watch(step: int, policy: LanguageModel, metrics: dict[str, float]) -> None:
        log.metrics.append(metrics)
        if step in points:
            log.curve.append(point(setup, policy, step))

    config = demo.ppo_config(setup.config, setup.folder, output, gold_reward=GOLD, **settings)
    result, seconds = demo.timed(ppo.train, config, watch)
    policy = load_language_model(str(result.final_dir), setup.config)
    after = setup.judge.measure(policy, SAMPLES, setup.config.seed, 3)
    warnings = (output / "warnings.jsonl").read_text(encoding="utf-8").splitlines()
    found = figures(after) | {"seconds": seconds, "warnings": [json.loads(line) for line in warnings]}
    return found | {"sample": after.completions[0]}, policy, after, log


def point(setup: Setup, policy: LanguageModel, step: int) -> dict[str, float]:
    return {"step": step, **figures(setup.judge.measure(policy, POINT_SAMPLES, setup.config.seed, 2, step))}


def train_on_proxy(setup: Setup, beta: float) -> dict:
    settings = {"reward_model_path": [setup.proxy], "kl_coef": beta, "total_episodes": SWEEP_STEPS * 256}
    found, _, _, log = train_ppo(setup, f"beta {beta:g}", settings, SWEEP_POINTS)
    return {"beta": beta, **found, "curve": [{"step": 0, **figures(setup.before)}, *log.curve]}


def variants(setup: Setup) -> list[Variant]:
    """The demo's PPO on the gold reward, and what differs from it."""
    gold = {"reward": [GOLD], "kl_coef": GOLD_BETA}
    groups = gold | {"num_generations": 8}
    supervised = {"ptx_coef": 0.2, "ptx_dataset_name": str(setup.folder / "reviews.jsonl"), "ptx_max_length": 32}
    two = {"reward": [GOLD, "rlhf.task:very_reward"], "reward_weights": [1.0, 0.3]}
    process = {"process_reward_model_path": [setup.proxy], "step_separator": ".", "kl_coef": demo.PROXY_BETA}
    # The coefficient moves by a twentieth a step at most, and the rate stays: with 512 and the linear decay the policy
    # followed ever less, the coefficient went past its place by a factor of 3 and the KL was 0.594.
    steady = {"kl_horizon": 1024, "lr_scheduler_type": "constant"}
    # One update on each batch, so at a higher rate.
    a2c = {"num_mini_batches": 1, "gradient_accumulation_steps": 4, "cliprange": None, "cliprange_value": None}
    review_loss = "loss on reviews {review_loss:.3f} (SFT {sft[review_loss]:.3f})"
    early = "gold {early_gold:.2f} at step 10"
    return [
        Variant("PPO", gold, True, f"{review_loss}; {early}"),
        Variant("PPO-ptx", gold | supervised, True, review_loss),
        Variant("two rewards", gold | two, False, "`very` {very:.2f} a review (SFT {sft[very]:.2f}), weight 0.3"),
        Variant("step-wise reward", gold | {"reward": ["rlhf.task:stepwise_gold_reward"]}, True, early),
        Variant("process reward model", process, False, "sentences {sentences:.2f} (SFT {sft[sentences]:.2f})"),
        Variant(
            "adaptive KL",
            gold | steady | {"kl_target": KL_TARGET},
            False,
            "KL {last_kl:.3f} for target {target}, beta {kl_coef:.2f}",
        ),
        Variant("GRPO", groups | {"advantage": "grpo"}, True, early),
        Variant("RLOO", groups | {"advantage": "rloo"}, True, early),
        Variant("A2C", gold | a2c | {"learning_rate": 1e-3}, True, early),
    ]


def train_variant(setup: Setup, variant: Variant, sft: dict) -> dict:
    settings = variant.settings | {"total_episodes": VARIANT_STEPS * 256}
    found, policy, after, log = train_ppo(setup, variant.name, settings, set())
    found |= {"name": variant.name, "gain": found["gold"] - sft["gold"]}
    found |= demo.score_of(after, setup.optimum) if variant.scored else {}
    early = [metrics["watch/gold"] for metrics in log.metrics[8:11]]
    own = describe(setup, policy, after) | {
        "last_kl": log.last("objective/kl"),
        "kl_coef": log.last("objective/kl_coef"),
    }
    own |= {"early_gold": sum(early) / max(len(early), 1), "target": settings.get("kl_target")}
    return found | own | {"note": variant.note.format(**own, sft=sft)}


@torch.no_grad()
def describe(setup: Setup, policy: LanguageModel, result: Measurement) -> dict[str, float]:
    """Nats a token on held-out reviews; `very` and sentences in a sampled review."""
    rng = random.Random(f"{setup.config.seed}/held out")
    reviews = [task.sample_review(rng) for _ in range(HELD_OUT_REVIEWS)]
    rows = [{"prompt": task.PROMPT, "completion": f" {review}"} for review in reviews]
    path = demo.write_rows(setup.folder / "study" / "reviews.jsonl", rows)
    data = load(Source((path,)), policy, "completion", 32)
    logprobs, _ = token_logprobs(policy, collate_texts(data.examples, policy, True))
    count = len(result.completions)
    return {
        "review_loss": -float(logprobs.mean()),
        "very": sum(task.very_reward([], result.completions)) / count,
        "sentences": sum(text.split().count(".") for text in result.completions) / count,
    }


# Best-of-n


def best_of_n(pool: Measurement, n: int) -> dict[str, float]:
    """Both rewards of the sample that the proxy likes best of n, and the KL of choosing so."""
    found: dict[str, float] = {"n": n, "kl": best_of_n_kl(n), "kl_se": 0.0}
    for name in ("proxy", "gold"):
        rewards = getattr(pool, name)
        parts = zip(pool.proxy.chunk(POOL_PARTS), rewards.chunk(POOL_PARTS))
        of_parts = torch.tensor([float(expected_best(p, r, n)) for p, r in parts if len(p) >= n])
        found[name] = float(expected_best(pool.proxy, rewards, n))
        found[f"{name}_se"] = float(of_parts.std()) / math.sqrt(len(of_parts)) if len(of_parts) > 1 else 0.0
    return found


# DPO


def train_dpo(setup: Setup, beta: float) -> dict:
    """On the reward model's pairs, from the SFT model."""
    config = dpo_config(setup, beta)
    pairs = (setup.folder / "pairs.jsonl").read_text(encoding="utf-8").count("\n")
    steps = math.ceil(pairs * DPO_EPOCHS / DPO_BATCH)
    measured = {math.ceil(steps * i / DPO_POINTS) for i in range(1, DPO_POINTS + 1)} | {2, 4, 8}
    curve, spent = [{"step": 0, **figures(setup.before)}], 0.0

    def watch(step: int, policy: LanguageModel, metrics: dict[str, float]) -> None:
        nonlocal spent
        spent += metrics["timing/step"]
        if step in measured:
            curve.append(point(setup, policy, step))

    result = dpo.train(config, watch)
    after = setup.judge.measure(load_language_model(str(result.final_dir), setup.config), SAMPLES, setup.config.seed, 3)
    accuracy = result.metrics["rewards/accuracies"]
    return {"beta": beta, **figures(after), "accuracy": accuracy, "seconds": spent, "curve": curve}


def dpo_config(setup: Setup, beta: float) -> DPOConfig:
    return DPOConfig(
        **demo.common(setup.config, setup.folder / "study" / f"dpo-{beta:g}"),
        model_name_or_path=str(setup.folder / "sft" / "final"),
        dataset_name=str(setup.folder / "pairs.jsonl"),
        beta=beta,
        per_device_train_batch_size=DPO_BATCH,
        num_train_epochs=DPO_EPOCHS,
        learning_rate=DPO_RATE,
        lr_scheduler_type="linear",
        max_length=32,
        eval_fraction=0.0,
    )


# What must come out


def gold_drop(run: dict) -> float:
    """How far gold has fallen from its best on the way while the proxy rose; 0 where the proxy did not rise."""
    best = max(run["curve"], key=lambda p: p["gold"])
    return best["gold"] - run["gold"] if run["proxy"] > best["proxy"] else 0.0


def shortfalls(summary: dict) -> list[str]:
    """A line for each finding that is not what it should be."""
    return [*_free_run(summary), *_tied_run(summary), *_variants(summary)]


def _free_run(summary: dict) -> list[str]:
    free, failed = summary["sweep"][0], []
    if not (drop := gold_drop(free)) >= NEEDED_DROP:
        failed.append(f"beta 0: gold fell by {drop:.2f} while the proxy rose, expected at least {NEEDED_DROP}")
    if not any("gold_reward has fallen" in row["warning"] for row in free["warnings"]):
        failed.append("beta 0: no warning that gold_reward fell")
    return failed


def _tied_run(summary: dict) -> list[str]:
    tied, failed = summary["sweep"][-1], []
    drop = max(point["gold"] for point in tied["curve"]) - tied["gold"]
    if not drop <= TOLERATED_DROP:
        failed.append(f"beta {tied['beta']:g}: gold is {drop:.2f} below its best, expected at most {TOLERATED_DROP}")
    if tied["warnings"]:
        failed.append(f"beta {tied['beta']:g}: warned: {tied['warnings'][0]['warning']}")
    return failed


def _variants(summary: dict) -> list[str]:
    failed = []
    for variant in summary["variants"]:
        name, target = variant["name"], variant["target"]
        if not variant["gain"] >= NEEDED_GAIN:
            failed.append(f"{name} raised gold by {variant['gain']:.2f}, expected at least {NEEDED_GAIN}")
        if target and not abs(variant["last_kl"] / target - 1) <= KL_TOLERANCE:
            within = f"within {KL_TOLERANCE:.0%} of {target}"
            failed.append(f"{name}: KL {variant['last_kl']:.3f} over the last {LAST_STEPS} steps, expected {within}")
    return failed
