"""`rlhf ppo --dry_run`: the memory that a run will take, by part, before any weight is loaded.

Models are built as a run builds them, but from config.json and with fake tensors, which have a size and no memory. The
code of sampling, scoring and the update then runs on them, over the largest micro-batch, while a tracker counts the
storages that operations make and those that go. So the estimate is of the code as it is. Arithmetic adds what a fake
does not show: the optimizer's moments, and the chunk of logits inside an op on hidden states.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.advantages import of_tokens
from rlhf.attention import decode_inputs, prefill_inputs
from rlhf.config import PPOConfig
from rlhf.forward import only, token_scores
from rlhf.layout import Models, enable_checkpointing, load_models, recomputing
from rlhf.losses import ppo_losses
from rlhf.model import choose_device
from rlhf.ppo import update
from rlhf.rollout import draw, new_cache
from rlhf.types import Experience, SequenceBatch

MOMENTS = 2  # AdamW's, each of its parameter's size and dtype
# Pieces that glibc never maps by themselves leave gaps in its heap that the next ones, aligned, don't fit. With a model
# of 50 million parameters the process held 1.0 to 1.7 times their bytes, most often 1.5, in seven layouts and
# micro-batch sizes (glibc 2.36, 2026-11-25), and with MALLOC_MMAP_THRESHOLD_=131072 just their bytes.
HEAP_PIECE, HEAP_GAPS = 32 << 20, 0.5


@dataclass(frozen=True)
class Estimate:
    """Bytes. The phases and the peak are of everything that is held at the time, the parts of one thing each."""

    device: torch.device
    capacity: int
    process: int  # Python and its libraries, where the process's memory is what counts
    weights: dict[str, int]  # of each model, what it shares with one before it left out
    offloaded: int  # of these, on the host while nothing is scored
    gradients: int
    moments: int
    loading: int  # the most weights at a time while they are loaded: in float32, whatever becomes of them
    activations: int  # of the largest micro-batch, kept for its backward pass
    activations_recomputed: int  # the same with gradient checkpointing
    head_chunk: int
    head_gradient: int
    cache: int  # keys and values of a whole batch of responses
    sampling: int  # what else a rollout makes
    scoring: int  # what scoring makes
    updating: int  # what an update makes: gradients, activations, the head
    assumptions: tuple[str, ...]

    @property
    def held(self) -> int:
        """What is there in every phase."""
        return self.process + sum(self.weights.values()) - self.offloaded + self.moments

    @property
    def phases(self) -> dict[str, int]:
        made = {
            "rollout": self.cache + self.sampling,
            "scoring": self.offloaded + self.scoring,
            "update": self.updating,
        }
        return {"loading": self.process + self.loading, **{name: self.held + size for name, size in made.items()}}

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def peak(self) -> int:
        return self.phases[self.peak_phase]


class Tracker(TorchDispatchMode):
    """Bytes of the storages that operations make: live, and at their highest. What was there before counts nothing."""

    def __init__(self, gaps: float = 0.0) -> None:
        super().__init__()
        self.live = self.peak = self.chunk = 0
        self.gaps = gaps  # what the heap takes beside pieces below HEAP_PIECE, as a part of their bytes
        self._small = 0
        self._sizes: dict[int, int] = {}  # of live storages, by their address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for storage in [x.untyped_storage() for x in _tensors(result)]:
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._count(storage.nbytes())
                weakref.finalize(storage, self._gone, storage._cdata)
        inside = _chunk(func, args)
        self.chunk = max(self.chunk, inside)
        self.peak = max(self.peak, self.taken + inside)
        return result

    @property
    def taken(self) -> int:
        return self.live + int(self.gaps * self._small)

    def _count(self, size: int) -> None:
        self.live += size
        self._small += size if abs(size) < HEAP_PIECE else 0

    def _gone(self, address: int) -> None:
        self._count(-self._sizes.pop(address))


def _tensors(tree: object) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def _chunk(func, args: tuple) -> int:
    """What an op on hidden states holds beside its results (rlhf_kernels/_head.py): a chunk of logits, its operands in
    the dtype of the products, and the sums of gradients that it returns in a narrower one."""
    if func.namespace != "rlhf_kernels" or not func._opname.startswith("linear_"):
        return 0
    named = dict(zip((a.name for a in func._schema.arguments), args))
    hidden, weight, product = named["hidden"], named["weight"], named["product_dtype"]
    size = min(hidden.shape[:-1].numel(), named["chunk_tokens"]) * weight.shape[0] * named["logits_dtype"].itemsize
    operands = [x for name, x in named.items() if name.endswith(("hidden", "weight")) and isinstance(x, Tensor)]
    size += sum(x.numel() * product.itemsize for x in operands if x.dtype != product)
    if "backward" in func._opname and named["grad_weight"] and weight.dtype.itemsize < 4:
        size += weight.numel() * 4
    return size


def main(config: PPOConfig) -> None:
    show(estimate(config), config)


def estimate(config: PPOConfig) -> Estimate:
    config = replace(config, dry_run=True)
    device, _ = choose_device(config)
    with Tracker() as loading:
        models = load_models(config)
    process = _resident() if device.type == "cpu" else 0
    weights, trained, offloaded = _weigh(models)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _materialize(models, mode, device)
    cache, sampling = _rollout(models, config, mode, device)
    scoring = _scoring(models, config, device)
    updating, chunk = _update(models, config, device)
    kept = _activations(models, replace(config, gradient_checkpointing=False), device)
    if all(getattr(module, "supports_gradient_checkpointing", True) for module in models.modules.values()):
        enable_checkpointing(models.modules)
    again = _activations(models, replace(config, gradient_checkpointing=True), device)
    return Estimate(
        device=device,
        capacity=_capacity(device),
        process=process,
        weights=weights,
        offloaded=offloaded if device.type != "cpu" else 0,
        gradients=trained,
        moments=MOMENTS * trained,
        loading=loading.peak,
        activations=kept,
        activations_recomputed=again,
        head_chunk=chunk,
        head_gradient=_head_gradient(models),
        cache=cache,
        sampling=sampling,
        scoring=scoring,
        updating=updating,
        assumptions=_assumptions(models, config),
    )


def _resident() -> int:
    """Bytes of this process that are in memory. Where there is no /proc, the most that there were."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGESIZE")


def _capacity(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The models


def _parts(models: Models) -> dict[str, nn.Module]:
    scorers = {f"reward {reward.name}": reward.scorer.module for reward in models.rewards if reward.scorer}
    return {**models.modules, "reference": models.reference.module, **scorers}


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _weigh(models: Models) -> tuple[dict[str, int], int, int]:
    """Bytes of each model that no model before it has; of what is trained; of what is offloaded."""
    seen, weights = set(), {}
    for name, module in _parts(models).items():
        new = {id(x): x.nbytes for x in _tensors_of(module) if id(x) not in seen}
        seen |= new.keys()
        weights[name] = sum(new.values())
    trained = {id(p): p.nbytes for m in models.modules.values() for p in m.parameters() if p.requires_grad}
    offloaded = {id(x): x.nbytes for module in models.offloaded for x in _tensors_of(module)}
    return weights, sum(trained.values()), sum(offloaded.values())


def _materialize(models: Models, mode: FakeTensorMode, device: torch.device) -> None:
    """Fakes on the device in place of every tensor, shared where it is shared."""
    made = {}
    for module in [part for whole in _parts(models).values() for part in whole.modules()]:
        for store in (module._parameters, module._buffers):
            for name, tensor in [(n, t) for n, t in store.items() if t is not None]:
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty_like(tensor, device=device, requires_grad=tensor.requires_grad)
                    fake = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                    made[id(tensor)] = tensor, fake
                store[name] = made[id(tensor)][1]


def _head_gradient(models: Models) -> int:
    """Of the policy's head, summed in float32 over the chunks."""
    weight = models.policy.head.weight
    return 4 * weight.numel() if weight is not None and weight.requires_grad else 0


# The phases


def _gaps(device: torch.device) -> float:
    return HEAP_GAPS if device.type == "cpu" else 0.0


def _pass_size(config: PPOConfig) -> int:
    """Sequences of full length in a forward pass."""
    length, minibatch = config.max_prompt_length + config.response_length, config.batch_size // config.num_mini_batches
    budget = config.micro_batch_tokens
    return config.per_device_train_batch_size if budget is None else min(minibatch, max(1, budget // length))


def _sequences(count: int, prompt: int, response: int, device: torch.device) -> SequenceBatch:
    ids = torch.zeros(count, prompt + response, dtype=torch.long, device=device)
    return SequenceBatch(ids, torch.full((count,), prompt), torch.full((count,), response))


def _experience(config: PPOConfig, count: int, device: torch.device) -> Experience:
    batch = _sequences(count, config.max_prompt_length, config.response_length, device)
    zeros = torch.zeros(count, config.response_length, device=device)
    valued = {"values": zeros, "returns": zeros} if config.advantage == "gae" else {}
    return Experience(batch, zeros, zeros, zeros, zeros[:, 0], advantages=zeros, **valued)


@torch.no_grad()
def _rollout(models: Models, config: PPOConfig, mode: FakeTensorMode, device: torch.device) -> tuple[int, int]:
    """(keys and values, what else is there at the most) of a whole batch: the prompts, and the last token."""
    policy, size, width = models.policy, config.batch_size, config.max_prompt_length
    total = width + config.response_length
    with mode, policy.autocast(), Tracker(_gaps(device)) as tracker:
        padding, cache = torch.zeros(size, dtype=torch.long, device=device), new_cache(total)
        uniform = torch.zeros(size, 1, dtype=torch.float64, device=device)

        def step(inputs: dict[str, Tensor]) -> None:
            out = policy.module(**inputs, past_key_values=cache, use_cache=True, **only(policy.module, 1))
            draw(out.logits[:, -1], config.temperature, policy.vocab_size, uniform)

        step(prefill_inputs(torch.zeros(size, width, dtype=torch.long, device=device), padding))
        first = tracker.peak
        if config.response_length > 1:  # all tokens but one at once: for the cache that they leave
            between = torch.zeros(size, config.response_length - 1, dtype=torch.long, device=device)
            seen = torch.ones(size, 1, between.shape[1], total - 1, dtype=torch.bool, device=device)
            step({"input_ids": between, "position_ids": between, "attention_mask": seen})
        tracker.peak = tracker.taken
        step(decode_inputs(padding, padding, total - 1))
    held = sum(x.nbytes for layer in cache.layers for x in layer.held)
    return held, max(first, tracker.peak) - held


@torch.no_grad()
def _scoring(models: Models, config: PPOConfig, device: torch.device) -> int:
    batch = _sequences(_pass_size(config), config.max_prompt_length, config.response_length, device)
    runs: list[Callable] = [lambda: of_tokens(batch, models, config)]
    runs += [lambda scorer=r.scorer: token_scores(scorer, batch) for r in models.rewards if r.scorer]
    peaks = []
    for run in runs:
        with Tracker(_gaps(device)) as tracker:
            run()
        peaks.append(tracker.peak)
    return max(peaks)


def _activations(models: Models, config: PPOConfig, device: torch.device) -> int:
    """What the backward pass of the largest micro-batch needs, the gradient of the head left out."""
    experience, one = _experience(config, _pass_size(config), device), torch.ones((), device=device)
    in_loss = config.kl_coef if config.kl_in == "loss" else 0.0
    with recomputing(models.modules, config), Tracker() as tracker:
        _loss = ppo_losses(models, experience, config, one, in_loss)
        kept = tracker.live
    return kept - (_head_gradient(models) if models.policy.head.fused else 0)


class _NoStep:
    """In place of the guard: an optimizer step makes nothing new beside the moments."""

    def step(self, loss: Tensor) -> Tensor:
        return loss


def _update(models: Models, config: PPOConfig, device: torch.device) -> tuple[int, int]:
    """(the most that is made, the chunk of logits) in an optimizer step of its first passes: in the second, if there
    is one, all gradients are there beside the activations."""
    size, minibatch = _pass_size(config), config.batch_size // config.num_mini_batches
    rows = min(minibatch, 2 * size)
    supervised = None
    if config.ptx_coef:
        supervised = _sequences(min(config.ptx_batch_size or minibatch, 2 * size), 1, config.ptx_max_length - 1, device)
    experience, everything = _experience(config, rows, device), torch.arange(rows)
    with recomputing(models.modules, config), Tracker(_gaps(device)) as tracker:
        update(models, experience, everything, _NoStep(), config, config.kl_coef, supervised)
    return tracker.peak, tracker.chunk


# The report


def _assumptions(models: Models, config: PPOConfig) -> tuple[str, ...]:
    length = f"{config.max_prompt_length} tokens (max_prompt_length)"
    lines = [
        f"every prompt has {length}: the data are not read; every response has {config.response_length}",
        "moments are there from the second optimizer step on",
    ]
    if models.policy.packed:
        lines.append("sequences can be packed and the head fused, which a run tries when the weights are there")
    if any(reward.scorer is None for reward in models.rewards):
        lines.append("reward functions hold nothing")
    if choose_device(config)[0].type == "cpu":
        lines.append(f"the heap takes {1 + HEAP_GAPS} times the tensors below {HEAP_PIECE >> 20} MiB that come and go")
    else:
        lines.append("workspaces of cuBLAS and what the allocator splits are left out")
    return tuple(lines)


def show(found: Estimate, config: PPOConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"memory of rlhf ppo on {found.device}, layout {' + '.join(config.memory_layout)}")
    table.add_column("part")
    table.add_column("GB", justify="right")

    def add(name: str, size: int, style: str | None = None, **options) -> None:
        table.add_row(name, f"{size / 1e9:.3f}", style=style, **options)

    if found.process:
        add("Python and its libraries", found.process)
    for name, size in found.weights.items():
        add(f"weights: {name}", size)
    add("gradients", found.gradients)
    add("moments of AdamW", found.moments, end_section=True)
    size = _pass_size(config)
    for recompute, held in ((False, found.activations), (True, found.activations_recomputed)):
        used = "" if recompute == config.gradient_checkpointing else "not used: "
        how = " with gradient_checkpointing" if recompute else ""
        add(f"{used}activations of {size} sequences{how}", held, "dim" if used else None)
    add("head: a chunk of logits", found.head_chunk)
    add("head: gradient of its weight in float32", found.head_gradient)
    add(f"rollout: keys and values of {config.batch_size} sequences", found.cache)
    add("rollout: prompts, logits and sampling", found.sampling)
    add("scoring", found.scoring, end_section=True)
    for name, size in found.phases.items():
        add(f"{name} in all", size, "bold" if name == found.peak_phase else None)
    console = Console()
    console.print(table)
    note = f"peak: {found.peak / 1e9:.2f} GB of {found.capacity / 1e9:.1f} GB, in the {found.peak_phase}"
    for line in (note, *(f"assumed: {line}" for line in found.assumptions)):
        console.print(line, highlight=False, soft_wrap=True)
