"""The loss of `rlhf reward` on pairs beside that of TRL's RewardTrainer: margins, centring."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peers_compare import case, compare

from rlhf.comparisons import collate, of_ranking
from rlhf.data import TokenExample
from rlhf.losses import comparison_loss

PAIRS, CENTER = 6, 0.05


@case("trl-reward-margin", True, None)
@case("trl-reward-centred", False, CENTER)
def reward_loss(with_margin: bool, center: float | None) -> dict:
    from trl.trainer.reward_trainer import RewardTrainer

    torch.manual_seed(0)
    inputs = {"chosen": torch.randn(PAIRS), "rejected": torch.randn(PAIRS)}
    margins = torch.rand(PAIRS) if with_margin else torch.zeros(PAIRS)

    def oracle(chosen, rejected):
        likelihood = F.logsigmoid(chosen - rejected - margins.to(chosen.dtype))
        return {"loss": ((center or 0.0) * (chosen + rejected) ** 2 - likelihood).mean()}

    def ours(chosen, rejected):
        columns = [{"margin": margin} if with_margin else {} for margin in margins.tolist()]
        examples = [TokenExample([4], [[5], [6]], "", column) for column in columns]
        one_head = SimpleNamespace(pad_id=0, device="cpu", module=SimpleNamespace(score=torch.nn.Linear(2, 1)))
        batch = collate([of_ranking(example, [], Counter()) for example in examples], one_head)
        scores = torch.stack([chosen, rejected], 1).view(-1, 1)
        return {"loss": comparison_loss(scores, batch, PAIRS, center or 0.0)[0]}

    def peer(chosen, rejected):
        """Its method as it stands, of a trainer that has what it reads."""
        logits = torch.cat([chosen, rejected])[:, None]
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=center),
            accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
        )
        given = {"margin": margins} if with_margin else {}
        return {"loss": RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), given)}

    return compare(inputs, oracle, ours, peer)
