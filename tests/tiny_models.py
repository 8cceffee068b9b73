"""Real models of 33,000 parameters in the format of transformers, and rows to train them on."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlhf.config import InitConfig, RewardConfig
from rlhf.init import init

WORDS = ["the", "film", "play", "was", "very", "good", "bad", "dull", "fine", "great", "and", "story", "actor", "plot"]

CHAT_TEMPLATE = (
    "{% for m in messages %} {{ m.role }} {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentence(number: int, length: int = 6) -> str:
    return " ".join(WORDS[(number * 5 + i * i) % len(WORDS)] for i in range(length))


@contextmanager
def single_thread():
    """Models this small gain nothing from a second thread, and lose 20x on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """40 rows of prompt and completion, of different lengths."""
    rows = [{"prompt": sentence(i, 2 + i % 4), "completion": " " + sentence(i + 50, 3 + i % 5)} for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> str:
    """32 pairs with a shared beginning, the good one ending in `great`."""
    rows = [
        {"chosen": f"{sentence(i)} was great", "rejected": f"{sentence(i)} was {('dull', 'bad')[i % 2]}"}
        for i in range(32)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> str:
    """40 rows of prompt, completion and label: true where the completion ends in `great`."""
    rows = [
        {
            "prompt": sentence(i, 2 + i % 3),
            "completion": f" {sentence(i + 9, 1 + i % 4)} {end}",
            "label": end == "great",
        }
        for i, end in enumerate(["great", "dull", "great", "bad", "dull"] * 8)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, corpus) -> str:
    """A word-level Llama: hidden 32, 2 layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return str(init(InitConfig(dataset_name=corpus, output_dir=str(folder), tokenizer="word", **sizes)))


@pytest.fixture(scope="session")
def chat_model(tiny_model, tmp_path_factory) -> str:
    """The same with a chat template."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "chat")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(folder)


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory) -> str:
    """Four of one to three answers; the last ends with the user's turn."""
    texts = [
        ("the film", "was good", "the plot", "was very dull"),
        ("the play", "was fine"),
        ("the actor", "was bad", "and the story", "great", "was the film", "dull"),
        ("the film", "was good", "the play"),
    ]
    rows = [{"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 3, t)]} for t in texts]
    return write_jsonl(tmp_path_factory.mktemp("data") / "dialogues.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory, tiny_model, pairs) -> str:
    from rlhf import reward_model

    config = RewardConfig(
        model_name_or_path=tiny_model,
        dataset_name=pairs,
        output_dir=str(tmp_path_factory.mktemp("models") / "reward"),
        max_length=32,
        max_steps=8,
        learning_rate=3e-3,
    )
    with single_thread():
        return str(reward_model.train(config).final_dir)
