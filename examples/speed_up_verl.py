"""verl (0.9) on the fused ops: Ray calls `on_worker_start` in every process it starts, and nothing else changes.

    PYTHONPATH=examples python -m verl.trainer.main_ppo ARGUMENTS \
        +ray_kwargs.ray_init.runtime_env.worker_process_setup_hook=speed_up_verl.on_worker_start

`python examples/speed_up_verl.py` shows it in one worker, without a model.
"""

import ray
import torch

import rlhf_kernels


def on_worker_start() -> None:
    print(rlhf_kernels.patch("verl"))  # what it replaced; rlhf_kernels.unpatch("verl") takes it back


@ray.remote
def advantages() -> str:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    estimate = get_adv_estimator_fn("gae")
    rewards, values, mask = torch.randn(4, 16), torch.randn(4, 16), (torch.rand(4, 16) < 0.8).float()
    return f"{estimate.__module__}: advantages {tuple(estimate(rewards, values, mask, 1.0, 0.95)[0].shape)}"


if __name__ == "__main__":
    ray.init(num_cpus=1, runtime_env={"worker_process_setup_hook": on_worker_start})
    print(ray.get(advantages.remote()))
