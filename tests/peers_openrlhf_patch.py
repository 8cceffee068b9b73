"""`.venv-peers/bin/python tests/peers_openrlhf_patch.py`: patch("openrlhf") on its real modules. What they import and
a CPU, or this environment, does not have is stood in for by empty classes, none of which is called."""

import importlib.abc
import importlib.machinery
import sys
import types

import rlhf_kernels
from rlhf_kernels.compat import openrlhf as ours

ABSENT = ("flash_attn", "deepspeed", "vllm", "aiohttp", "fastapi", "uvicorn")


class Empty(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def main() -> None:
    sys.meta_path.append(Absent())
    with rlhf_kernels.patch("openrlhf"):
        from openrlhf import models
        from openrlhf.models import actor
        from openrlhf.trainer.ppo_utils import experience_maker

        maker = experience_maker.RemoteExperienceMaker
        assert models.PolicyLoss is ours.PolicyLoss and models.loss.ValueLoss is ours.ValueLoss
        assert actor.log_probs_from_logits is ours.log_probs_from_logits
        assert experience_maker.compute_approx_kl is ours.compute_approx_kl
        assert maker.get_advantages_and_returns is ours.get_advantages_and_returns
    assert models.PolicyLoss.__module__ == "openrlhf.models.loss"
    assert actor.log_probs_from_logits.__module__ == "openrlhf.models.utils"
    assert maker.get_advantages_and_returns.__module__ == experience_maker.__name__


if __name__ == "__main__":
    main()
