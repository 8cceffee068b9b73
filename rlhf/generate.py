"""Samples from a model, as a table and as samples.jsonl."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from rlhf.config import GenerateConfig
from rlhf.data import tokenize
from rlhf.log import refuse_training_run, save_config, show_table, write_samples
from rlhf.model import check_context, load_language_model
from rlhf.read import DataError, read_rows
from rlhf.rollout import Sampling, generate
from rlhf.types import PromptBatch


def main(config: GenerateConfig) -> list[dict]:
    """The samples: rows of prompt, completion and whether it ended."""
    folder = Path(config.output_dir)
    refuse_training_run(folder, "samples")
    model = load_language_model(config.model_name_or_path, config)
    rows = [(f"prompt {i}", {"prompt": text}) for i, text in enumerate(config.prompt, start=1)]
    if config.dataset_name:
        rows += islice(read_rows(config.dataset_name, config.dataset_split), config.num_prompts)
    if not rows:
        raise DataError(f"{config.dataset_name}: no usable row")
    data = tokenize(rows, model, "prompt", config.max_prompt_length)
    check_context(model, data.longest_prompt + config.max_new_tokens, "longest prompt + max_new_tokens")
    examples = [example for example in data.examples for _ in range(config.num_return_sequences)]
    prompts = PromptBatch([e.prompt for e in examples], [e.text for e in examples], {})
    rollout = generate(model, prompts, Sampling(config.max_new_tokens, config.temperature), seed=(config.seed,))
    columns = prompts.texts, rollout.completions, rollout.finished.tolist()
    samples = [{"prompt": p, "completion": c, "finished": f} for p, c, f in zip(*columns)]
    save_config(config)
    (folder / "samples.jsonl").unlink(missing_ok=True)
    write_samples(folder, samples)
    show_table(config.model_name_or_path, samples)
    return samples
