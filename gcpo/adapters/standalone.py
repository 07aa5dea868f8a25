"""The engine by itself, without Ray and without the configuration of a run: for measurements and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from gcpo.adapters.engine import GCPOFSDPEngine
from gcpo.adapters.schema import nested
from gcpo.adapters.scoring import attention_for, packed_batch
from gcpo.scoring.requests import ScoreRequest
from gcpo.scoring.rows import members, pack_rows


def standalone_engine(
    model: str, *, dtype: str = "fp32", attention: str = "sdpa", use_remove_padding: bool = False
) -> GCPOFSDPEngine:
    """Return the engine of a model under FSDP2; ``torch.distributed`` must be initialised.

    Args:
        model: folder of a model of transformers, with its tokenizer.
        dtype: ``fp32`` or ``bf16``, in which it computes; parameters and sums of gradients are float32.
        attention: ``attn_implementation`` of rows that are no trees.
        use_remove_padding: of verl.
    """
    engine = GCPOFSDPEngine(
        model_config=HFModelConfig(
            path=model,
            use_remove_padding=use_remove_padding,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": attention},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": dtype},
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=0.0, weight_decay=0.0, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def add_gradient(
    engine: GCPOFSDPEngine,
    requests: Sequence[ScoreRequest],
    loss: Callable[[int, Tensor], Tensor],
    *,
    is_tree: bool,
    max_tokens: int,
    settings: dict[str, Any],
) -> None:
    """Add the gradient of a sum of losses to that of the parameters, in packs as the term of a method.

    Args:
        engine: in train mode.
        requests: whose log-probabilities are used.
        loss: takes the index of a request and its log-probabilities [T].
        is_tree: whether sequences share rows; else each is a row.
        max_tokens: largest number of tokens of a tree.
        settings: engine settings of the batch, ``temperature`` among them.
    """
    rows = pack_rows(
        [torch.cat([request.context, request.target]) for request in requests],
        [len(request.context) for request in requests],
        [None] * len(requests),
        budget=max_tokens if is_tree else None,
        min_shared=8,
    )
    inside = members(rows)

    def of_a_pack(model_output: dict[str, Tensor], data: Any, dp_group: Any = None) -> tuple[Tensor, dict]:
        sequences = inside[int(data["gcpo_row"][0, 0])]
        values = model_output["log_probs"].values().split([len(requests[i].target) for i in sequences])
        return torch.stack([loss(i, log_p) for i, log_p in zip(sequences, values, strict=True)]).sum(), {}

    batch = packed_batch(rows)
    tu.assign_non_tensor(batch, **settings)
    with attention_for(engine, is_tree=is_tree):
        engine.forward_backward_batch(batch, of_a_pack)


def plain_pass(engine: GCPOFSDPEngine, rows: Sequence[Tensor], *, with_gradient: bool, max_tokens: int) -> None:
    """Run a pass over rows as verl trains on them; the gradient is that of the mean log-probability of a micro-batch.

    Args:
        engine: in train mode where the gradient is asked for, else in eval mode.
        rows: token ids [S].
        with_gradient: whether the gradient is added to that of the parameters.
        max_tokens: largest number of tokens of a micro-batch, padding not counted.
    """
    ids = nested(list(rows))
    fields = {"input_ids": ids, "position_ids": nested([torch.arange(len(row)) for row in rows])}
    batch = TensorDict({**fields, "loss_mask": nested([torch.ones_like(row) for row in rows])}, batch_size=len(rows))
    settings = {"use_remove_padding": engine.use_remove_padding, "use_fused_kernels": False, "temperature": 1.0}
    tu.assign_non_tensor(batch, use_dynamic_bsz=True, max_token_len_per_gpu=max_tokens, calculate_entropy=True)
    tu.assign_non_tensor(batch, **settings)

    def mean(model_output: dict[str, Tensor], data: Any, dp_group: Any = None) -> tuple[Tensor, dict]:
        return model_output["log_probs"].values().mean(), {}

    if with_gradient:
        engine.forward_backward_batch(batch, mean)
    else:
        engine.infer_batch(batch)
