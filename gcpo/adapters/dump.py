"""verl's rollout dump, with the advantages, the group and a method's own keys in every line.

verl writes ``STEP.jsonl`` into ``trainer.rollout_data_dir``, one line per response. The auxiliary generations have a
file of the same form in ``auxiliary/``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gcpo.adapters import hooks
from gcpo.adapters.schema import QueueBatch, is_padding
from gcpo.algorithms import group_relative_advantage
from gcpo.methods.base import Batch, Credit, Dump, Method
from gcpo.methods.fields import ADVANTAGES, INDEX, PROMPTS, RESPONSE_MASK, REWARDS
from gcpo.methods.stations import brief

_VERLS_KEYS = frozenset({"input", "output", "gts", "score", "step", "uid"})


class DumpingTrainer(PPOTrainerSync):
    """verl's synchronous trainer with more keys in its dump of the responses."""

    method: Method
    _credit: Credit | None = None
    _row_keys: Mapping[str, Mapping[str, Any]] | None = None
    """The additional keys by the key of the row; ``None`` outside the dump of the responses."""

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """verl's dump of the responses, and one of the auxiliary generations in ``auxiliary/``."""
        rows = QueueBatch(batch, self.global_steps)
        dump: Dump = hooks.call(self.method, "dump", rows, self._credit, self.tokenizer)
        columns = {**group_columns(rows, self.method.run.norm_by_std), **dump.columns}
        columns["padding"] = [is_padding(tag) for tag in batch.tags]
        self._row_keys = {
            key: {name: values[row] for name, values in columns.items()} for row, key in enumerate(batch.keys)
        }
        try:
            super()._log_rollout_data(batch, timing_raw, rollout_data_dir)
        finally:
            self._row_keys = None
        if dump.draws:
            self._dump_draws(rows, dump.draws, os.path.join(rollout_data_dir, "auxiliary"))

    def _dump_draws(self, rows: Batch, draws: list[dict[str, Any]], folder: str) -> None:
        decode = self.tokenizer.decode
        prompts = rows.fetch([draw["row"] for draw in draws], [PROMPTS])[PROMPTS]
        names = draws[0].keys() - {"row", "reward", "token_ids"}
        self._dump_generations(
            inputs=[decode(prompt.tolist(), skip_special_tokens=True) for prompt in prompts],
            outputs=[decode(draw["token_ids"], skip_special_tokens=True) for draw in draws],
            gts=[None] * len(draws),
            scores=[draw["reward"] for draw in draws],
            reward_extra_infos_dict={name: [draw[name] for draw in draws] for name in draws[0] if name in names},
            dump_path=folder,
        )

    def _dump_generations(
        self,
        inputs: list[str],
        outputs: list[str],
        gts: list[Any],
        scores: list[Any],
        reward_extra_infos_dict: dict[str, list[Any]],
        dump_path: str,
    ) -> None:
        """verl's, whose lines take any key that has a value for each of them; ``uid`` says which row a line is of."""
        if self._row_keys is not None:
            rows = [self._row_keys[key] for key in reward_extra_infos_dict["uid"]]
            added = {name: [row[name] for row in rows] for name in rows[0] if name not in _VERLS_KEYS}
            reward_extra_infos_dict = {**added, **reward_extra_infos_dict}
        super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)


def group_columns(batch: Batch, norm_by_std: bool) -> dict[str, list[Any]]:
    """Return the keys that every method has; ``None`` in padding rows.

    ``group`` is the id of the group, ``index`` the number of the response in it, and ``question`` the place of the
    question in the data set. ``grpo_advantage`` is A, and ``advantage`` the mean of B over the tokens of a response.
    """
    names = ("group", "index", "question", "grpo_advantage", "advantage")
    columns: dict[str, list[Any]] = {name: [None] * batch.size for name in names}
    fields = batch.by_group(REWARDS, ADVANTAGES, RESPONSE_MASK, INDEX)
    for (uid, rows), data in zip(batch.groups.items(), fields, strict=True):
        scores = torch.stack([row.sum() for row in data[REWARDS]])
        label = torch.zeros(len(rows), dtype=torch.long)
        own = group_relative_advantage(scores, label, norm_by_std=norm_by_std)
        masks = [mask.bool() for mask in data[RESPONSE_MASK]]
        trained = torch.stack([row[mask].mean() for row, mask in zip(data[ADVANTAGES], masks, strict=True)])
        values = ([uid] * len(rows), range(len(rows)), map(_question, data[INDEX]), brief(own), brief(trained))
        for row, *found in zip(rows, *values, strict=True):
            for name, value in zip(names, found, strict=True):
                columns[name][row] = value
    return columns


def _question(index: Any) -> Any:
    """Return the place of a question as JSON; a data set can have any object there."""
    index = index.item() if hasattr(index, "item") else index
    return index if isinstance(index, int | str) else str(index)
