"""The cases of the battery: inputs, and oracles written as a textbook would, with autograd and loops, apart from the
references. A file holds the cases of ops that share their inputs."""

from .adamw import ADAMW_BF16
from .linear import LINEAR_PPO_LOSS, LINEAR_TOKEN_LOGPROBS
from .logits_kl import LINEAR_KL, LOGITS_KL
from .ppo_loss import PPO_LOSS
from .preference import DPO_LOSS, GROUP_ADVANTAGES, KTO_LOSS, LINEAR_DPO_LOSS, SEQUENCE_LOGPROBS
from .token_logprobs import TOKEN_LOGPROBS
from .tokens import GAE, MASKED_WHITEN, PPO_ADVANTAGES, TOKEN_KL

CASES = {
    "token_logprobs": TOKEN_LOGPROBS, "token_kl": TOKEN_KL, "gae": GAE, "masked_whiten": MASKED_WHITEN,
    "ppo_advantages": PPO_ADVANTAGES, "ppo_loss": PPO_LOSS,
    "linear_token_logprobs": LINEAR_TOKEN_LOGPROBS, "linear_ppo_loss": LINEAR_PPO_LOSS,
    "sequence_logprobs": SEQUENCE_LOGPROBS, "group_advantages": GROUP_ADVANTAGES, "dpo_loss": DPO_LOSS,
    "kto_loss": KTO_LOSS, "linear_dpo_loss": LINEAR_DPO_LOSS, "logits_kl": LOGITS_KL, "linear_kl": LINEAR_KL,
    "adamw_bf16_": ADAMW_BF16,
}  # fmt: skip
