"""A TRL script (1.16) on the fused ops: the line with `patch` is new, the rest is TRL.

python examples/speed_up_trl.py MODEL_FOLDER        (any causal language model that transformers loads)
"""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import rlhf_kernels


def brevity(completion_ids, **_) -> list[float]:
    return [-len(ids) / 32 for ids in completion_ids]


if __name__ == "__main__":
    print(rlhf_kernels.patch("trl"))  # what it replaced; rlhf_kernels.unpatch("trl") takes it back
    gpu = torch.cuda.is_available()
    options = {"max_steps": 3, "max_completion_length": 32, "logging_steps": 1, "report_to": "none"}
    trainer = GRPOTrainer(
        model=sys.argv[1],
        reward_funcs=brevity,
        args=GRPOConfig(output_dir="grpo", bf16=gpu, use_cpu=not gpu, **options),
        train_dataset=Dataset.from_list([{"prompt": "The film was"}, {"prompt": "The play was"}] * 8),
    )
    trainer.train()
