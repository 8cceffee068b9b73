"""Fused, exact RLHF ops for PyTorch, each with a plain-torch reference and C++, Triton and CUDA kernels behind one
registered op.

In the order of the pipeline: token_logprobs and token_kl from logits, ppo_advantages (gae and masked_whiten) from
rewards, ppo_loss, adamw_bf16_ on the weights. `backends()` says which kernel serves each op on this machine, and why
the others do not.
"""

from . import _first_calls
from ._head import Chunking
from ._library import Backends, backend, backends, load_kernels
from .compat import Patch, patch, unpatch
from .lm_head import LMHead, lm_head_of
from .ops.adamw_bf16 import adamw_bf16_
from .ops.dpo_loss import DPOOptions, dpo_loss
from .ops.gae import gae
from .ops.group_advantages import group_advantages
from .ops.kto_loss import kto_loss
from .ops.linear_dpo_loss import linear_dpo_loss
from .ops.linear_kl import linear_kl
from .ops.linear_ppo_loss import linear_ppo_loss
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.logits_kl import logits_kl
from .ops.masked_whiten import masked_whiten
from .ops.ppo_advantages import AdvantageOptions, PPOAdvantages, ppo_advantages
from .ops.ppo_loss import PPOLossOptions, ppo_loss
from .ops.sequence_logprobs import sequence_logprobs
from .ops.token_kl import token_kl
from .ops.token_logprobs import token_logprobs
from .optim import AdamWBF16
from .packing import pack_sequences, plan_microbatches
from .stats import DPOStats, KTOStats, PPOStats

__version__ = "0.1.0"

load_kernels()
_first_calls.make()

__all__ = [
    "AdamWBF16", "AdvantageOptions", "Backends", "Chunking", "DPOOptions", "DPOStats", "KTOStats", "LMHead",
    "PPOAdvantages", "PPOLossOptions", "PPOStats", "Patch", "adamw_bf16_", "backend", "backends", "dpo_loss", "gae",
    "group_advantages", "kto_loss", "linear_dpo_loss", "linear_kl", "linear_ppo_loss", "linear_token_logprobs",
    "lm_head_of", "logits_kl", "masked_whiten", "pack_sequences", "patch", "plan_microbatches", "ppo_advantages",
    "ppo_loss", "sequence_logprobs", "token_kl", "token_logprobs", "unpatch",
]  # fmt: skip
