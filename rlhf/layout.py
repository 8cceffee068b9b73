"""Which models a PPO run holds and which weights they share: the memory layouts.

    separate      policy, value, reference and reward models, each with weights of its own
    shared_value  the value is a head on the policy's trunk
    lora          policy = reference + adapters; value = reward model + adapters, or policy's trunk + adapters + head

and beside one of these: frozen_bf16, models that are not trained in bfloat16; offload, they are on the device only
while they score. Without a value (GRPO, RLOO) none is loaded. The reference is the initial policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from rlhf.config import MemoryFields, PPOConfig
from rlhf.log import say, say_how_logprobs_are_formed
from rlhf.model import (
    LanguageModel,
    ModelError,
    Scorer,
    ValueHead,
    check_context,
    frozen,
    frozen_copy,
    load_language_model,
    load_scorer,
    same_vocabulary,
    to_bfloat16,
    value_on_trunk,
    with_adapters,
)
from rlhf.reward import Reward, function_reward, load_rewards


@dataclass(frozen=True)
class Models:
    policy: LanguageModel
    value: Scorer | ValueHead | None
    reference: LanguageModel
    rewards: list[Reward]
    gold: Reward | None = None  # measured, never trained on
    offloaded: tuple[nn.Module, ...] = ()  # what waits on the host between phases

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is trained."""
        value = {} if self.value is None else {"value": self.value.module}
        return {"policy": self.policy.module, **value}

    def check_context(self, length: int, fields: str) -> None:
        """Of every model that reads the policy's tokens."""
        readers = [reward.reader for reward in self.rewards if reward.reader]
        readers += [self.value] if isinstance(self.value, Scorer) else []
        for model in (self.policy, *readers):
            check_context(model, length, fields)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Brings the offloaded models to the device for the block. Their weights on the host stay: nothing is copied
        back, as nothing trains them."""
        tensors = list(chain.from_iterable((*m.parameters(), *m.buffers()) for m in self.offloaded))
        on_host = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.policy.device, non_blocking=True)
            yield
        finally:
            for tensor, data in zip(tensors, on_host):
                tensor.data = data


def load_models(config: PPOConfig) -> Models:
    base, half = load_language_model(config.model_name_or_path, config), config.optim == "adamw_bf16"
    if half:  # before the reference is made of it, which is the initial policy to the bit
        to_bfloat16(base.module)
    say_how_logprobs_are_formed(base)
    rewards = load_rewards(config, base)
    gold = function_reward(config.gold_reward) if config.gold_reward else None
    if config.has("lora"):
        reference = frozen(base, config)
        policy = with_adapters(reference, config)
    else:
        reference, policy = frozen(frozen_copy(base), config), base
    if config.kl_estimator == "full" and not policy.head.fused:
        raise ModelError(f"kl_estimator: full needs hidden states, use k1 or k3: {policy.head.reason}")
    value = load_value(config, policy, reference, rewards) if config.advantage == "gae" else None
    if half and value is not None:
        to_bfloat16(value.module)
    models = Models(policy, value, reference, rewards, gold)
    if config.gradient_checkpointing:
        enable_checkpointing(models.modules)
    if not config.has("offload"):
        return models
    return replace(models, offloaded=untrained(models) if config.dry_run else offload(models))


def enable_checkpointing(modules: dict[str, nn.Module]) -> None:
    """Makes it possible; `recomputing` does it."""
    for module in modules.values():
        if hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable({"use_reentrant": False})


def load_value(
    config: PPOConfig,
    policy: LanguageModel,
    reference: LanguageModel,
    rewards: list[Reward],
) -> Scorer | ValueHead:
    """From value_model_path; else the first reward model that reads the policy's tokens; else the policy, head zero."""
    if config.has("shared_value"):
        if not policy.head.fused:
            raise ModelError(f"memory_layout: shared_value needs hidden states: {policy.head.reason}")
        head = nn.Linear(policy.head.weight.shape[1], 1, bias=False, device=policy.device)
        nn.init.zeros_(head.weight)
        return ValueHead(policy, head)
    lora, start = config.has("lora"), config.value_model_path
    if start:
        value = load_scorer(start, config, head="zero")
        if not same_vocabulary(value, policy):
            raise ModelError(f"value_model_path: {start} has another vocabulary than the policy")
        return with_value_adapters(frozen(value, config), config) if lora else value
    readable = [r.scorer for r in rewards if r.scorer and same_vocabulary(r.scorer, policy)]
    if readable and lora:
        return with_value_adapters(readable[0], config)
    if readable:
        return load_scorer(readable[0].module.name_or_path, config)
    if config.reward_model_path:
        say("the reward model has another tokenizer: the value model starts from the policy")
    if lora:
        return with_value_adapters(value_on_trunk(reference), config)
    return load_scorer(config.model_name_or_path, config, head="zero")


def with_value_adapters(base: Scorer, config: PPOConfig) -> Scorer:
    """Adapters below a head of its own, in float32 and trained."""
    value = with_adapters(base, config)
    head = base.module.score
    value.module.score = nn.Linear(
        head.in_features, head.out_features, bias=head.bias is not None, device=head.weight.device
    )
    with torch.no_grad():
        for ours, theirs in zip(value.module.score.parameters(), head.parameters()):
            ours.copy_(theirs)
    return value


@contextmanager
def recomputing(modules: dict[str, nn.Module], config: MemoryFields) -> Iterator[None]:
    """Gradient checkpointing for the block, where it is asked for. transformers ties it to train mode, which would
    bring dropout: a layer is in train mode when it is called and in eval mode while it computes, each time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers, hooks = [], []
    if config.gradient_checkpointing:
        found = chain.from_iterable(module.modules() for module in modules.values())
        layers = [layer for layer in found if isinstance(layer, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True
            hooks.append(layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", False)))
            # also after the end of a second computation, which torch cuts short with an exception
            leave = layer.register_forward_hook(lambda layer, *_: setattr(layer, "training", True), always_call=True)
            hooks.append(leave)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.training = False


def untrained(models: Models) -> tuple[nn.Module, ...]:
    """What is not trained and shares no weights with what is."""
    trained = {id(p) for module in models.modules.values() for p in module.parameters()}
    scorers = [reward.scorer.module for reward in models.rewards if reward.scorer]
    modules = (models.reference.module, *scorers)
    return tuple(module for module in modules if not any(id(p) in trained for p in module.parameters()))


def offload(models: Models) -> tuple[nn.Module, ...]:
    """Moves to the host what is not trained and shares no weights with what is; pinned, where there is a GPU."""
    moved = untrained(models)
    for module in moved:
        for tensor in chain(module.parameters(), module.buffers()):
            on_host = tensor.data.cpu()
            tensor.data = on_host.pin_memory() if torch.cuda.is_available() else on_host
    return moved
