"""Process groups: statistics over two gloo ranks equal those of one process with both batches."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_kernels import AdvantageOptions, masked_whiten, ppo_advantages, ppo_loss

OPTIONS = AdvantageOptions(whiten_rewards=True, gamma=0.98)


def _batch():
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [draw(5, 7) for _ in range(3)], draw(5), torch.rand(5, 7, generator=generator) < 0.7


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    tensors, scores, mask = _batch()
    rows = slice(0, 2) if rank == 0 else slice(2, 5)  # uneven on purpose
    part, group = [x[rows] for x in tensors], dist.group.WORLD
    white = masked_whiten(part[0], mask[rows], group=group)
    out = ppo_advantages(*part, scores[rows], mask[rows], options=OPTIONS, group=group)
    stats = ppo_loss(*part, mask[rows])[1].all_reduce_(group)
    torch.save({"white": white, "out": list(out), "stats": stats.sums}, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while the other is still in a collective aborts it
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    tensors, scores, mask = _batch()
    torch.testing.assert_close(
        torch.cat([r["white"] for r in ranks]), masked_whiten(tensors[0], mask), rtol=1e-6, atol=1e-6
    )
    for i, whole in enumerate(ppo_advantages(*tensors, scores, mask, options=OPTIONS)):
        torch.testing.assert_close(torch.cat([r["out"][i] for r in ranks]), whole, rtol=1e-5, atol=1e-5)
    whole = ppo_loss(*tensors, mask)[1].sums
    for r in ranks:
        torch.testing.assert_close(r["stats"], whole, rtol=1e-5, atol=1e-6)
