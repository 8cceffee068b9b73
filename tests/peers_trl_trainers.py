"""`.venv-peers/bin/python tests/peers_trl_trainers.py FOLDER CASE...`: 20 steps by TRL's own trainers, on TRL's
functions and on ours, a case at a time; its last line is JSON {case: figures}. tests/test_compat_trl.py judges them.

Real trainers, on a model of 30,000 parameters built here: nothing is replaced but what `rlhf_kernels.patch` replaces.
"""

import json
import sys
from pathlib import Path

import torch

import rlhf_kernels

STEPS, VOCAB = 20, 96
COMMON = {
    "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "seed": 0,
    "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip
SAMPLED = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4, "temperature": 0.9}
# case: (trainer, options)
CASES = {
    "sft": ("SFT", {"per_device_train_batch_size": 4, "max_length": 24}),
    "sft-accumulated": ("SFT", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_length": 24}),
    "sft-compiled": ("SFT", {"per_device_train_batch_size": 4, "max_length": 24, "torch_compile": True}),
    "sft-dft": ("SFT", {"per_device_train_batch_size": 4, "max_length": 24, "loss_type": "dft"}),
    "dpo": ("DPO", {"per_device_train_batch_size": 4, "max_length": 24}),
    "dpo-accumulated": ("DPO", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 24}),
    "dpo-compiled": ("DPO", {"per_device_train_batch_size": 4, "max_length": 24, "torch_compile": True}),
    "dpo-wpo": ("DPO", {"per_device_train_batch_size": 4, "max_length": 24, "use_weighting": True}),
    "grpo": ("GRPO", {**SAMPLED, "beta": 0.04, "entropy_coef": 0.01}),
    "grpo-accumulated": ("GRPO", {**SAMPLED, "gradient_accumulation_steps": 2, "beta": 0.04, "num_iterations": 2}),
    "grpo-compiled": ("GRPO", {**SAMPLED, "torch_compile": True, "beta": 0.04}),
    "rloo": ("RLOO", {**SAMPLED, "beta": 0.04}),
    "kto": ("KTO", {"per_device_train_batch_size": 4, "max_length": 24}),
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{VOCAB - 2}", eos_token=f"w{VOCAB - 1}")


def model():  # as every run starts
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 2,
        bos_token_id=None, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(kind: str):
    """120 rows of words drawn with a fixed seed, of lengths that differ."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(3)

    def text(low: int, high: int) -> str:
        n = int(torch.randint(low, high, (1,), generator=draw))
        return " ".join(f"w{i}" for i in torch.randint(VOCAB - 2, (n,), generator=draw).tolist())

    def row(i: int) -> dict:
        prompt = text(2, 7)
        if kind in ("GRPO", "RLOO"):
            return {"prompt": prompt}
        if kind == "DPO":
            return {"prompt": prompt, "chosen": " " + text(2, 9), "rejected": " " + text(2, 9)}
        return {"prompt": prompt, "completion": " " + text(2, 9), **({"label": i % 3 > 0} if kind == "KTO" else {})}

    return Dataset.from_list([row(i) for i in range(120)])


def reward(completions, **_) -> list[float]:
    return [sum(int(word[1:]) % 7 == 0 for word in text.split()) / 4 for text in completions]


def train(kind: str, options: dict, folder: Path) -> tuple[list[dict], dict]:
    """(what every step logged, final weights)."""
    import trl

    torch._dynamo.reset()
    config = getattr(trl, f"{kind}Config")(output_dir=str(folder), **COMMON, **options)
    sampled = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(folder / "model"), args=config, train_dataset=rows(kind), processing_class=tokenizer(), **sampled
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logged, {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


def train_patched(kind: str, options: dict, folder: Path) -> tuple[list[dict], dict, int]:
    """The same on our ops, and how often TRL called ours."""
    with rlhf_kernels.patch("trl"):
        from trl.trainer import utils

        ours, calls = utils._ChunkedLogProbFunction.apply, []
        utils._ChunkedLogProbFunction.apply = staticmethod(lambda *args: (calls.append(1), ours(*args))[1])
        try:
            return *train(kind, options, folder), len(calls)
        finally:
            utils._ChunkedLogProbFunction.apply = staticmethod(ours)


def figures(kind: str, options: dict, folder: Path) -> dict:
    theirs, their_weights = train(kind, options, folder)
    ours, our_weights, calls = train_patched(kind, options, folder)
    again = theirs if "torch_compile" in options else train(kind, options, folder)[0]  # compiling takes half a minute
    start = dict(model().named_parameters())
    always = set.intersection(*(set(entry) for entry in theirs + ours)) - {"epoch"}
    names = sorted(n for n in always if isinstance(theirs[0][n], float) and "time" not in n)
    return {
        "steps": [len(theirs), len(ours)],
        "calls": calls,
        "gradients": [entry["grad_norm"] for entry in theirs],
        "logged": {n: max(abs(a[n] - b[n]) for a, b in zip(theirs, ours)) for n in names},
        "unpatched": max(abs(a["loss"] - b["loss"]) for a, b in zip(theirs, again)),
        "weights": max((our_weights[n] - x).abs().max().item() for n, x in their_weights.items()),
        "moved": max((start[n] - x).abs().max().item() for n, x in their_weights.items()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    print(json.dumps({case: figures(*CASES[case], folder) for case in sys.argv[2:] or CASES}))
