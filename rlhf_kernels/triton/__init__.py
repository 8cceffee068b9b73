"""Triton kernels: KERNELS maps an op's name to a launcher that takes the arguments of the op's schema.

They run on NVIDIA and AMD GPUs, and on CPU tensors where TRITON_INTERPRET=1 is set before triton is imported. float64
inputs are computed in float64. A kernel never reports bad data to the host: an id out of range gives NaN, and bounds
in cu_seqlens are clamped to the tokens that exist.
"""

from collections.abc import Callable

from .adamw_bf16 import adamw_bf16
from .gae import gae
from .logits_kl import logits_kl, logits_kl_backward_into
from .masked_whiten import masked_whiten
from .ppo_advantages import ppo_advantages
from .ppo_loss import ppo_loss
from .token_logprobs import token_logprobs, token_logprobs_backward, token_logprobs_backward_into

KERNELS: dict[str, Callable] = {
    "token_logprobs": token_logprobs,
    "token_logprobs_backward": token_logprobs_backward,
    "token_logprobs_backward_into": token_logprobs_backward_into,
    "logits_kl": logits_kl,
    "logits_kl_backward_into": logits_kl_backward_into,
    "gae": gae,
    "masked_whiten": masked_whiten,
    "ppo_advantages": ppo_advantages,
    "ppo_loss": ppo_loss,
    "adamw_bf16_": adamw_bf16,
}
