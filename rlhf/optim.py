"""AdamW, the learning rate as a function of the step, clipping, and what happens when numbers stop being finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import rlhf_kernels
from rlhf.config import TrainConfig, TrainingDiverged


def make_optimizer(models: list[tuple[nn.Module, float]], config: TrainConfig) -> torch.optim.Optimizer:
    """One AdamW over (module, peak learning rate) pairs. Vectors (norms, biases) have no weight decay."""
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}  # one group of each kind: a group is a call
    for module, rate in models:
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            decay = config.weight_decay if parameter.dim() >= 2 else 0.0
            alike.setdefault((decay, rate), []).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay, "peak_lr": rate, "lr": rate}
        for (decay, rate), params in alike.items()
    ]
    options = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if getattr(config, "optim", "adamw") == "adamw_bf16":
        return rlhf_kernels.AdamWBF16(groups, **options, seed=config.seed)
    return torch.optim.AdamW(groups, **options, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Sets the rates of step 0 <= step < total, and returns the first model's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * schedule(config, step, total)
    return optimizer.param_groups[0]["lr"]


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """Factor of the peak learning rate: up to 1 over the warm-up, then down to 0 one step after the last."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return shapes[config.lr_scheduler_type]


class StepGuard:
    """Optimizer steps that skip what is not finite, decided on the device; `check` reads how often, and gives up after
    `patience` skips in a row."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: list[nn.Module],
        max_norm: float,
        state: dict | None = None,  # keeps the counts: a run's, so that its checkpoints have them
        patience: int = 3,
    ):
        self.optimizer, self.modules, self.max_norm, self.patience = optimizer, modules, max_norm, patience
        self.state = {} if state is None else state
        self.state |= {"skipped": 0, "skipped_in_a_row": 0} | self.state
        in_a_row = self.state["skipped_in_a_row"]
        device = next(modules[0].parameters()).device
        self._counts = torch.tensor([self.state["skipped"], in_a_row, in_a_row], device=device)  # the last: most so far
        self._last: Tensor | None = None  # loss and norms of the last step, for the message

    def step(self, loss: Tensor) -> Tensor:  # () to ()
        """Clips each module's gradients to max_norm, updates, clears them; returns the largest norm before clipping."""
        norms = [nn.utils.clip_grad_norm_(module.parameters(), self.max_norm) for module in self.modules]
        device = self._counts.device  # the loss, or the norm of a module without gradients, may be on the host
        self._last = torch.stack([x.detach().float().to(device, non_blocking=True) for x in (loss, *norms)])
        bad = ~self._last.isfinite().all()
        self.optimizer.found_inf = bad.float()  # the fused optimizers leave everything as it is where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        skipped, in_a_row, most = self._counts.unbind()
        in_a_row = (in_a_row + 1) * bad
        self._counts = torch.stack([skipped + bad, in_a_row, torch.maximum(most, in_a_row)])
        return self._last[1:].max()

    def check(self) -> int:
        """How many steps were skipped so far: one host sync."""
        self.state["skipped"], self.state["skipped_in_a_row"], most = self._counts.tolist()
        if most >= self.patience:
            loss, *norms = self._last.tolist()
            raise TrainingDiverged(
                f"loss {loss} with gradient norms {norms}: {most} optimizer steps in a row were not finite; "
                "lower learning_rate or look at the rewards"
            )
        return self.state["skipped"]
