"""verl's data set with a text at the end of every question."""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset


class EpisodePromptDataset(RLHFDataset):
    """verl's data set with the text of ``data.episode_prompt`` at the end of every question.

    ``data.custom_cls`` selects it.
    """

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """Append the text to the questions, then apply verl's filter."""
        addition, key = self.config.get("episode_prompt") or "", self.prompt_key

        def add(row: dict[str, Any]) -> dict[str, Any]:
            *before, last = row[key]
            return {key: [*before, {**last, "content": last["content"] + addition}]}

        return super().maybe_filter_out_long_prompts(dataframe.map(add) if addition else dataframe)
