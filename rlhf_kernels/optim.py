"""AdamWBF16: `adamw_bf16_` as a torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import _checks as check
from .ops.adamw_bf16 import adamw_bf16_, mix64


def stream_seed(seed: int, index: int) -> int:
    """The seed of one parameter, by its place among all parameters of the optimizer."""
    return mix64(mix64(seed) ^ index)


class AdamWBF16(torch.optim.Optimizer):
    """torch.optim.AdamW for bfloat16 models without a float32 copy: weights and moments are bfloat16, rounded
    stochastically (`adamw_bf16_`), 8 bytes a parameter with its gradient instead of 16.

    float32 parameters among them (norms, a value head) keep float32 moments and take the step of
    torch.optim.AdamW(fused=True); other dtypes raise TypeError. Defaults are those of torch.optim.AdamW. Gradients are
    bfloat16 or float32 for a bfloat16 parameter.

    State of a parameter: `step` () float32, `exp_avg` and `exp_avg_sq` in its dtype. A run resumed from `state_dict()`
    continues bit for bit: random bits depend on `seed`, the parameter's `step` and its place among all parameters,
    which one without a gradient keeps.

    Like torch's fused optimizers it reads the tensors `grad_scale` and `found_inf` that torch.amp.GradScaler sets on
    it: gradients are divided by the first, and where the second is not 0 weights, moments and step stay as they are.
    Nothing waits for the device. A bfloat16 parameter's gradient is left as it came, where torch stores it unscaled.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves the gradients and the skipping to `step`

    def __init__(
        self,
        params: Iterable,  # parameters or groups, as torch's optimizers take them
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,  # in [0, 2^64)
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    def __setstate__(self, state: dict) -> None:
        """What load_state_dict ends with: it leaves `step` on the device it was saved from, and takes the options as
        they were saved, which torch.optim.AdamW does without a seed."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for param, values in self.state.items():
            if "step" in values:
                values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device=param.device)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # A sum over devices may be 2, and torch's kernel takes it from the step.
        found_inf = None if found_inf is None else (found_inf != 0).float().reshape(())
        grad_scale = None if grad_scale is None else grad_scale.float().reshape(())
        first = 0
        for group in self.param_groups:
            self._step_group(group, first, grad_scale, found_inf)
            first += len(group["params"])
        return loss

    def _step_group(self, group: dict, first: int, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        options = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
        options["beta1"], options["beta2"] = group["betas"]
        with_grad = [(i, p) for i, p in enumerate(group["params"], first) if p.grad is not None]
        for _, param in with_grad:
            if not self.state[param]:
                self.state[param] = _fresh_state(param)
        halves = [(i, p) for i, p in with_grad if p.dtype == torch.bfloat16]
        _advance([self.state[p]["step"] for _, p in halves], found_inf)
        for i, param in halves:
            state = self.state[param]
            adamw_bf16_(
                param, param.grad, state["exp_avg"], state["exp_avg_sq"], step=state["step"],
                seed=stream_seed(group["seed"], i), found_inf=_beside(param, found_inf),
                grad_scale=_beside(param, grad_scale), **options,
            )  # fmt: skip
        singles = [p for _, p in with_grad if p.dtype != torch.bfloat16]
        if not singles:
            return
        names = ("exp_avg", "exp_avg_sq", "step")
        exp_avgs, exp_avg_sqs, steps = ([self.state[p][name] for p in singles] for name in names)
        adamw(
            singles, [p.grad for p in singles], exp_avgs, exp_avg_sqs, [], steps,
            fused=True, grad_scale=grad_scale, found_inf=found_inf, amsgrad=False, maximize=False, **options,
        )  # fmt: skip


def _check_group(group: dict, number: int) -> None:
    check.number("lr", group["lr"], 0)
    for name, value in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        check.number(name, value, 0, below=1)
    check.number("eps", group["eps"], above=0)
    check.number("weight_decay", group["weight_decay"], 0)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an int in [0, 2^64), got {seed!r}")
    for i, param in enumerate(group["params"]):
        where = f"params: number {i} of group {number}, of shape {tuple(param.shape)}"
        if param.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"{where}: expected bfloat16 or float32, got {param.dtype}; convert it with .bfloat16()")
        if param.dtype == torch.bfloat16 and not param.is_contiguous():
            raise ValueError(
                f"{where}: expected a contiguous tensor, because it is updated in place, got strides {param.stride()}; "
                "assign .contiguous() to its .data"
            )


def _fresh_state(param: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def _beside(param: Tensor, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(param.device, non_blocking=True)


def _advance(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Counts a step where it is taken, in one launch a device."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for step in steps:
        by_device[step.device].append(step)
    for device_steps in by_device.values():
        if found_inf is None:
            torch._foreach_add_(device_steps, 1.0)
        else:
            torch._foreach_add_(device_steps, [1 - _beside(device_steps[0], found_inf)] * len(device_steps))
