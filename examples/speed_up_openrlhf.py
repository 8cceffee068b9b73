"""OpenRLHF (0.11) on the fused ops: `python examples/speed_up_openrlhf.py ARGUMENTS` for `python -m
openrlhf.cli.train_ppo_ray ARGUMENTS`. Ray starts its workers as other processes: each of them patches itself.
"""

import runpy

import ray

import rlhf_kernels


def on_worker_start() -> None:
    rlhf_kernels.patch("openrlhf")


if __name__ == "__main__":
    print(rlhf_kernels.patch("openrlhf"))  # what it replaced; rlhf_kernels.unpatch("openrlhf") takes it back
    its_own = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    ray.init(runtime_env={"worker_process_setup_hook": on_worker_start, "env_vars": its_own})  # as OpenRLHF's own call
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
