"""GVPO at the stations of a step: advantages that are computed anew before every mini-batch of the update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcpo.algorithms import gvpo_advantage, gvpo_loss
from gcpo.methods.base import Batch, Engine, Method, Run
from gcpo.methods.fields import ADVANTAGES, OLD_LOG_PROBS, RESPONSE_MASK, Field
from gcpo.methods.gvpo.fields import PLACE
from gcpo.methods.gvpo.settings import GVPOConfig, check


class GVPO(Method):
    """Group variance policy optimization.

    The loss of a group is `gvpo_loss`. Its gradient is that of verl's ``gpg`` loss with the advantages of
    `gvpo_advantage` times beta * n / (n - 1), if the log-ratios D are those of the weights before the mini-batch:
    verl's aggregation ``seq-mean-token-sum`` divides by the n rows of each group.
    """

    name = "gvpo"
    settings_class = GVPOConfig
    fields = (PLACE,)
    settings: GVPOConfig

    @classmethod
    def parse(cls, settings: Any, run: Run) -> GVPOConfig:
        """See `Method.parse`."""
        return GVPOConfig.from_config(settings, run)

    @classmethod
    def check(cls, config: Any, settings: GVPOConfig, model: Any) -> None:
        """See `Method.check`."""
        check(config, settings)

    def credit(self, batch: Batch, metrics: dict[str, float]) -> None:
        """Number the groups and their rows; the advantages are GRPO's, R - mean(R)."""
        for number, rows in enumerate(batch.groups.values()):
            batch.put(rows, {PLACE: [torch.tensor([number, place]) for place in range(len(rows))]})

    @property
    def whole_mini_batches(self) -> bool:
        """The mean of the log-ratios is over all responses of a group."""
        return True

    @property
    def mini_batch_inputs(self) -> tuple[Field, ...]:
        """The centred rewards, in GRPO's advantages, and the log-probabilities of the log-ratios."""
        return (PLACE, ADVANTAGES, OLD_LOG_PROBS, RESPONSE_MASK)

    def before_mini_batch(
        self,
        rows: Mapping[Field, Sequence[Tensor]],
        log_probs: Sequence[Tensor] | None,
        engine: Engine,
        metrics: dict[str, float],
    ) -> Mapping[Field, Sequence[Tensor]]:
        """Compute the advantages of the rows from the rewards and log-ratios of their groups.

        Raises:
            ValueError: a group is not whole.
        """
        old, masks = rows[OLD_LOG_PROBS], rows[RESPONSE_MASK]
        # Float64, because the log-ratio is a sum over a whole response.
        ratios = [
            float(((new - before).double() * mask).sum())
            for new, before, mask in zip(old if log_probs is None else log_probs, old, masks, strict=True)
        ]
        places = [tuple(place.tolist()) for place in rows[PLACE]]
        rewards = [float(advantages[0]) for advantages in rows[ADVANTAGES]]
        groups: defaultdict[int, list[tuple[int, float, float]]] = defaultdict(list)
        for (group, place), reward, ratio in engine.gather(list(zip(places, rewards, ratios, strict=True))):
            groups[group].append((place, reward, ratio))
        n, beta = self.run.n, self.settings.beta
        advantages: dict[tuple[int, int], Tensor] = {}
        losses, deviations = [], []
        for group, members in groups.items():
            if len(members) != n:
                raise ValueError(f"a mini-batch holds {len(members)} of the {n} responses to a question")
            reward, ratio = torch.tensor([member[1:] for member in members], dtype=torch.float64).T
            values = beta * n / (n - 1) * gvpo_advantage(reward, ratio, beta=beta)
            advantages |= {(group, member[0]): value for member, value in zip(members, values, strict=True)}
            losses.append(gvpo_loss(reward, ratio, beta=beta))
            deviations.append(ratio.std())
        metrics["gvpo/loss"] = float(torch.stack(losses).mean())
        if log_probs is not None:
            metrics["gvpo/log_ratio_std"] = float(torch.stack(deviations).mean())
        own = zip(places, masks, strict=True)
        return {ADVANTAGES: [(advantages[place] * mask).float() for place, mask in own]}


METHOD = GVPO
