"""verl's rows without padding: a micro-batch as one row, in which rows that begin alike share their tokens.

This is what verl's ``use_remove_padding`` does where flash-attn runs, with equal prompts read once, by the attention of
`gcpo.scoring.attention`. Log-probabilities and gradients are those of padded rows up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from gcpo.adapters.scoring import row_of
from gcpo.adapters.stability import StableEngine
from gcpo.notices import notice
from gcpo.scoring.tree import PrefixForest

logger = logging.getLogger(__name__)

_PLACES = "gcpo_places"
"""Output argument: int64 [tokens of the micro-batch], the place in the packed row of every token, row after row."""
MIN_SHARED = 8


def flattened(micro_batch: TensorDict) -> TensorDict:
    """The same micro-batch for those functions of verl that read its rows one behind the other."""
    flat = micro_batch.copy()
    tu.assign_non_tensor(flat, use_remove_padding=True)
    return flat


class PaddingFreeEngine(StableEngine):
    """FSDP engine that packs verl's own rows where it is asked to.

    Attributes:
        padding_free: whether rows are packed.
        tree_problem: why the model can't be run on packed trees, ``None`` if it can.
    """

    padding_free = False
    tree_problem: str | None

    def use_padding_free(self) -> None:
        """Pack rows from now on, or log why not. All ranks must call it together."""
        problem = self.tree_problem
        if problem is None and self.pad_to_length:
            problem = "rows are padded to a fixed length (pad_to_length)"
        self.padding_free = problem is None
        if problem is not None and torch.distributed.get_rank() == 0:
            notice(logger, f"gcpo.padding_free is not used, the actor keeps verl's rows: {problem}")

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """verl's passes, with attention over packs where its rows are packed."""
        packs = self.padding_free and "gcpo_rows" not in data.keys()
        with self.tree_attention() if packs else nullcontext():
            return super().forward_backward_batch(data, loss_function, forward_only)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        """verl's inputs, or one packed row."""
        if row_of(micro_batch) is not None or not self.padding_free:
            return super().prepare_model_inputs(micro_batch)
        model_inputs, output_args = super().prepare_model_inputs(flattened(micro_batch))
        rows: Any = micro_batch["input_ids"]
        (pack,) = PrefixForest(rows.unbind(), min_shared=MIN_SHARED).packs()
        places = dict(zip(pack.sequences, pack.places, strict=True))
        device = rows.device
        output_args[_PLACES] = torch.cat([places[row] for row in range(len(places))]).to(device)
        model_inputs["input_ids"] = pack.token_ids.to(device).unsqueeze(0)
        model_inputs["position_ids"] = pack.position_ids.to(device).unsqueeze(0)
        return {**model_inputs, "tree_pack": pack}, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, torch.Tensor]:
        """verl's outputs, of a packed row too: its logits are put where verl looks for them."""
        if _PLACES in output_args:
            output.logits = output.logits[:, output_args[_PLACES]]
            micro_batch = flattened(micro_batch)
        return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
