"""GC2PO at the stations of a step: the answers of every group, perturbed states of every episode, token advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gcpo.faults import RunStoppedError
from gcpo.methods.base import Batch, Credit, Dump, Engine, Method, Outcome, Run
from gcpo.methods.fields import OLD_LOG_PROBS, PROMPTS, RESPONSES, REWARD_MODEL, Field, flat, lengths
from gcpo.methods.gc2po import fields as own
from gcpo.methods.gc2po.check import check
from gcpo.methods.gc2po.credit import (
    GroupAnswers,
    GroupEpisodes,
    GroupResult,
    batch_metrics,
    group_advantage,
    group_answers,
)
from gcpo.methods.gc2po.dump import episodes_of
from gcpo.methods.gc2po.scoring import RowReader, score_rows
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.tokens import TokenReader, control_ids, plain_decoder


@dataclass
class EpisodeCredit(Credit):
    """Token advantages from episode rewards; GRPO's advantage in groups without a parsable answer.

    Attributes:
        config: the resolved settings.
        rows: of every group, in the order of its responses.
        groups: their episodes; ``None``: no answer could be parsed.
        results: of the other groups in the same order, after `advantages`.
    """

    config: GC2POConfig
    rows: list[list[int]]
    groups: list[GroupEpisodes | None]
    results: list[GroupResult] = field(default_factory=list)
    _masks: list[Tensor] = field(default_factory=list)

    def advantages(self, outcome: Outcome) -> Tensor:
        """[B, T]; zeros in padding rows."""
        rewards = outcome.rewards.sum(-1)
        advantages = torch.zeros_like(outcome.grpo)
        for rows, group in zip(self.rows, self.groups, strict=True):
            if group is None:
                advantages[rows] = outcome.grpo[rows]
                continue
            result = group_advantage(group, rewards[rows], outcome.mask[rows], self.config)
            advantages[rows] = result.advantage.to(advantages)
            self.results.append(result)
            self._masks.append(outcome.mask[rows])
        return advantages

    def metrics(self) -> dict[str, float]:
        """Metrics of the whole batch under ``gc2po/``."""
        known = [group for group in self.groups if group is not None]
        return batch_metrics(self.results, self._masks, known, len(self.groups) - len(known))


class GC2PO(Method):
    """Group Causal Counterfactual Policy Optimization."""

    name = "gc2po"
    settings_class = GC2POConfig
    fields = own.ALL
    settings: GC2POConfig

    @classmethod
    def parse(cls, settings: Any, run: Run) -> GC2POConfig:
        """See `Method.parse`."""
        return GC2POConfig.from_config(settings, n=run.n)

    @classmethod
    def check(cls, config: Any, settings: GC2POConfig, model: Any) -> None:
        """See `gcpo.methods.gc2po.check`."""
        check(config, settings, model)

    # ---- score ------------------------------------------------------------------------------------------------------

    @property
    def score_inputs(self) -> tuple[Field, ...]:
        """The responses, and what `before_score` writes beside them."""
        return (PROMPTS, RESPONSES, own.PLACE, own.ANSWERS, own.ANSWER_LENGTHS, own.PROBE)

    def start_actor(self, engine: Engine) -> None:
        """Find the layer of h.

        Raises:
            ConfigError: the model has no such layer.
            RunStoppedError: its states cannot be perturbed.
        """
        self.layer, self.reader = self.settings.layer_of(engine.layers), TokenReader(engine.tokenizer)
        problem = engine.tree_problem() if self.settings.counterfactual else None
        if problem is not None:
            raise RunStoppedError(
                f"GC2PO perturbs states in packed rows, which this run can't have: {problem}; use another model, or "
                "gc2po.counterfactual=off"
            )

    def before_score(self, batch: Batch, tokenizer: Any, metrics: dict[str, float]) -> None:
        """Collect the final answers of every group, and put them beside its rows."""

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        config = self.settings
        data = batch.fetch(range(batch.size), (RESPONSES, REWARD_MODEL))
        places, answers = [torch.tensor([0, -1, row]) for row in range(batch.size)], [[[]]] * batch.size
        self._answers: list[GroupAnswers] = []
        for number, rows in enumerate(batch.groups.values()):
            responses = [data[RESPONSES][row].tolist() for row in rows]
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            gold = data[REWARD_MODEL][rows[0]].get("ground_truth")
            found = group_answers(texts, gold, config.answers.max_answers)
            tokens = {answer: encode(answer + config.answers.suffix) for answer in found.candidates}
            kept = {answer: ids for answer, ids in tokens.items() if len(ids) <= config.answers.max_tokens}
            self._answers.append(replace(found, candidates=tuple(kept)))
            for row in rows:
                places[row] = torch.tensor([int(found.parsable), number, row])
                # At least one piece: a row of a nested tensor must not be empty.
                answers[row] = (list(kept.values()) if config.needs_answers else []) or [[]]
        probe = torch.tensor(encode(config.answers.prompt), dtype=torch.int64)
        batch.put(
            range(batch.size),
            {
                own.PLACE: places,
                own.ANSWERS: [flat(pieces) for pieces in answers],
                own.ANSWER_LENGTHS: [lengths(pieces) for pieces in answers],
                own.PROBE: [probe] * batch.size,
            },
        )

    def score(self, rows: Mapping[Field, Sequence[Tensor]], engine: Engine) -> Mapping[Field, Sequence[Tensor]]:
        """Split every response into episodes, and perturb their states."""
        config = self.settings
        scorer = engine.perturbed_scorer(
            self.layer,
            intervention=config.intervention,
            relative=config.perturbation.distribution == "gaussian",
            max_tokens=int(config.max_token_len_per_gpu or self.run.max_tokens),
        )
        reader = RowReader(config, self.reader, control_ids(engine.tokenizer), engine.step)
        columns = zip(*rows.values(), strict=True)
        read = [reader.read(dict(zip(rows, values, strict=True))) for values in columns]
        return score_rows(read, config, scorer, size=engine.hidden_size, gather=engine.gather)

    # ---- credit -----------------------------------------------------------------------------------------------------

    def credit(self, batch: Batch, metrics: dict[str, float]) -> EpisodeCredit:
        """The episodes of the batch."""
        names = (own.EPISODE_INDEX, own.DIVERGENCE, own.EFFECTIVENESS, own.COUNTS, OLD_LOG_PROBS)
        data = batch.fetch(range(batch.size), names)
        index, old = (_padded(data[name], value) for name, value in ((own.EPISODE_INDEX, -1), (OLD_LOG_PROBS, 0.0)))
        divergence, effect, counts = (torch.stack(data[name]) for name in names[1:4])
        groups = list(batch.groups.values())
        collected = [
            GroupEpisodes(divergence[rows], effect[rows], index[rows], old[rows], answers) if answers.parsable else None
            for rows, answers in zip(groups, self._answers, strict=True)
        ]
        path, branches, unshared = counts[:, :3].sum(0).tolist()
        tagged, malformed = counts[[row for rows in groups for row in rows], 3:].mean(0).tolist()
        metrics |= {
            "gc2po/tokens/path": path,
            "gc2po/tokens/branches": branches,
            "gc2po/tokens/unshared": unshared,
            "gc2po/tokens/scored": path + branches,
            "gc2po/episodes/tagged_frac": tagged,
            "gc2po/episodes/malformed_frac": malformed,
        }
        return EpisodeCredit(config=self.settings, rows=groups, groups=collected)

    # ---- layout -----------------------------------------------------------------------------------------------------

    @property
    def whole_groups(self) -> bool:
        """The rows of a group share their prompt."""
        return True

    # ---- report -----------------------------------------------------------------------------------------------------

    def dump(self, batch: Batch, credit: EpisodeCredit, tokenizer: Any) -> Dump:
        """The episodes of every response."""
        column: list[Any] = [None] * batch.size
        results, decode = iter(credit.results), plain_decoder(tokenizer)
        for rows, group, data in zip(credit.rows, credit.groups, batch.by_group(RESPONSES), strict=True):
            if group is not None:
                for row, episodes in zip(rows, episodes_of(group, next(results), data[RESPONSES], decode), strict=True):
                    column[row] = episodes
        return Dump({"episodes": column})


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


METHOD = GC2PO
