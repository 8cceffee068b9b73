"""PPO as a library: a model that learns to write short sentences, from a reward function and nothing downloaded.

python examples/ppo_from_python.py
"""

import json
from pathlib import Path

from rlhf import ppo
from rlhf.config import InitConfig, PPOConfig
from rlhf.init import init


def brevity(prompts, completions, **columns):
    """A reward function sees texts, and any other columns of the prompts' rows."""
    return [-len(text.split()) / 10 for text in completions]


if __name__ == "__main__":
    folder = Path("runs/example")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"the {noun} was"} for noun in ("film", "plot", "cast", "score", "ending")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_name": str(folder / "prompts.jsonl"), "device": "cpu"}
    base = init(InitConfig(**data, output_dir=str(folder / "base"), tokenizer="word", vocab_size=64, hidden_size=32))
    config = PPOConfig(
        **data,
        output_dir=str(folder / "ppo"),
        model_name_or_path=str(base),  # a directory or a hub id
        reward=["ppo_from_python:brevity"],
        resume="auto",
        response_length=12,
        learning_rate=1e-3,
        max_steps=20,
    )
    ppo.train(config, on_step=lambda step, policy, metrics: print(step, metrics["objective/scores"]))
