"""L2T at the stations of a step: probes after every episode, the gain of each, token advantages."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcpo.episodes import texts_of
from gcpo.faults import RunStoppedError
from gcpo.methods.base import Batch, Dump, Engine, Method, Run
from gcpo.methods.fields import (
    DATA_SOURCE,
    OLD_LOG_PROBS,
    PROMPTS,
    RESPONSES,
    REWARD_MODEL,
    Field,
    flat,
    lengths,
)
from gcpo.methods.l2t import fields as own
from gcpo.methods.l2t.check import check
from gcpo.methods.l2t.credit import FittingCredit
from gcpo.methods.l2t.probes import RowReader, pieces_of, right_answer
from gcpo.methods.l2t.scoring import score_rows
from gcpo.methods.l2t.settings import L2TConfig
from gcpo.methods.stations import brief
from gcpo.notices import notice
from gcpo.tokens import control_ids, plain_decoder

logger = logging.getLogger(__name__)

NOTHING: list[list[int]] = [[], [], []]
"""The pieces of a row about which nothing is asked."""


class L2T(Method):
    """Learning to Think: information-theoretic rewards of episodes."""

    name = "l2t"
    settings_class = L2TConfig
    fields = own.ALL
    settings: L2TConfig

    @classmethod
    def parse(cls, settings: Any, run: Run) -> L2TConfig:
        """See `Method.parse`."""
        return L2TConfig.from_config(settings, run)

    @classmethod
    def check(cls, config: Any, settings: L2TConfig, model: Any) -> None:
        """See `Method.check`."""
        check(config, settings, model)

    # ---- score ------------------------------------------------------------------------------------------------------

    @property
    def score_inputs(self) -> tuple[Field, ...]:
        """The responses, and the tokens that are scored behind them."""
        return (PROMPTS, RESPONSES, own.PIECES, own.PIECE_LENGTHS)

    def start_actor(self, engine: Engine) -> None:
        """Make the reader of responses."""
        self.reader = RowReader(self.settings, engine.tokenizer, control_ids(engine.tokenizer))
        if self.settings.penalty == "released":
            engine.keep_last_layer()

    def before_score(self, batch: Batch, tokenizer: Any, metrics: dict[str, float]) -> None:
        """Encode the right answer of every question.

        Raises:
            RunStoppedError: no question of the step has one that can be scored.
        """
        data = batch.fetch(range(batch.size), (REWARD_MODEL, DATA_SOURCE))
        pieces, causes = [NOTHING] * batch.size, Counter()
        for rows in batch.groups.values():
            truth = data[REWARD_MODEL][rows[0]].get("ground_truth")
            found = self._pieces(data[DATA_SOURCE][rows[0]], truth, tokenizer)
            if isinstance(found, str):
                causes[found] += 1
                continue
            for row in rows:
                pieces[row] = found
        self._check_missing(causes, len(batch.groups), batch.step)
        metrics["l2t/missing_frac"] = causes.total() / max(len(batch.groups), 1)
        batch.put(
            range(batch.size),
            {
                own.PIECES: [flat(entry) for entry in pieces],
                own.PIECE_LENGTHS: [lengths(entry) for entry in pieces],
            },
        )

    def _pieces(self, data_source: Any, truth: Any, tokenizer: Any) -> list[list[int]] | str:
        """The tokens of `pieces_of`, or why there are none."""
        answer, probe = right_answer(data_source, truth), self.settings.probe
        if answer is None:
            return "the ground truth holds no answer as text"
        pieces = pieces_of(answer, probe, lambda text: tokenizer.encode(text, add_special_tokens=False))
        if len(pieces[-1]) > probe.max_answer_tokens:
            return f"the right answer has more than l2t.probe.max_answer_tokens={probe.max_answer_tokens} tokens"
        return pieces

    def _check_missing(self, causes: Counter[str], questions: int, step: int) -> None:
        missing, listed = causes.total(), "; ".join(f"{cause}, {number} x" for cause, number in causes.items())
        if missing and missing == questions:
            raise RunStoppedError(
                f"none of the {questions} questions of step {step} has a right answer that can be scored, and the run "
                f"must not train on outcome rewards only under another name: {listed}"
            )
        if missing > self.settings.max_missing * questions:
            notice(
                logger,
                f"l2t: {missing} of {questions} questions of step {step} have no right answer that can be scored, more "
                f"than l2t.max_missing={self.settings.max_missing:g}; they have outcome rewards only: {listed}",
            )

    def score(self, rows: Mapping[Field, Sequence[Tensor]], engine: Engine) -> Mapping[Field, Sequence[Tensor]]:
        """Split every response into episodes, and score the right answer after each."""
        columns = zip(*rows.values(), strict=True)
        read = [self.reader.read(dict(zip(rows, values, strict=True))) for values in columns]
        scorer = engine.scorer(-1, max_tokens=self.settings.budget(self.run))
        return score_rows(read, self.settings, scorer, engine)

    # ---- credit -----------------------------------------------------------------------------------------------------

    def credit(self, batch: Batch, metrics: dict[str, float]) -> FittingCredit:
        """The gains of the batch."""
        names = (own.EPISODE_INDEX, own.PROBABILITY, own.COUNTS, OLD_LOG_PROBS)
        if has_penalty := self.settings.penalty != "off":
            names = (*names, own.PENALTY)
        data = batch.fetch(range(batch.size), names)
        groups = list(batch.groups.values())
        counts = torch.stack(data[own.COUNTS])
        scored, unshared = counts[:, :2].sum(0).tolist()
        tagged, malformed = counts[[row for rows in groups for row in rows], 2:].mean(0).tolist()
        metrics |= {
            "l2t/tokens/scored": scored,
            "l2t/tokens/scored_unshared": unshared,
            "l2t/episodes/tagged_frac": tagged,
            "l2t/episodes/malformed_frac": malformed,
        }
        index, old = (_padded(data[name], fill) for name, fill in ((own.EPISODE_INDEX, -1), (OLD_LOG_PROBS, 0.0)))
        penalty = torch.stack(data[own.PENALTY]) if has_penalty else None
        return FittingCredit(self.settings, groups, torch.stack(data[own.PROBABILITY]), index, old, penalty)

    # ---- layout -----------------------------------------------------------------------------------------------------

    @property
    def whole_groups(self) -> bool:
        """The rows of a group share their prompt."""
        return True

    # ---- report -----------------------------------------------------------------------------------------------------

    def dump(self, batch: Batch, credit: FittingCredit, tokenizer: Any) -> Dump:
        """The episodes of every response, with J after each."""
        column: list[Any] = [None] * batch.size
        decode = plain_decoder(tokenizer)
        for rows, data in zip(batch.groups.values(), batch.by_group(RESPONSES), strict=True):
            for row, response in zip(rows, data[RESPONSES], strict=True):
                texts = texts_of(response.tolist(), credit.index[row, : len(response)].tolist(), decode)
                after, gain = brief(credit.probability[row, 1:]), brief(credit.gain[row])
                keys = ("text", "probability", "gain")
                column[row] = [dict(zip(keys, values, strict=True)) for values in zip(texts, after, gain, strict=False)]
        return Dump({"episodes": column})


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


METHOD = L2T
