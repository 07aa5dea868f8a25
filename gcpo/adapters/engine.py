"""verl's FSDP engine with what methods ask of it.

Packs: a micro-batch of `gcpo.adapters.scoring` is one packed row; it yields the log-probabilities and hidden states
that its row asks for. In a row of `gcpo.adapters.perturbed` states are perturbed on the way.
Term: an update whose method has a term of its own runs forward and backward twice before the one optimizer step, on
verl's rows and on those of the term.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import _is_scalar_unit_temperature, _scale_logits_by_temperature

from gcpo.adapters.padding_free import PaddingFreeEngine
from gcpo.adapters.perturbed import PerturbedRow
from gcpo.adapters.probe import probe_trees
from gcpo.adapters.scoring import row_of
from gcpo.adapters.term import PART, term_pass, update_of
from gcpo.algorithms import head_gradient_square
from gcpo.methods.base import Term
from gcpo.notices import notice
from gcpo.scoring.attention import tree_attention_on, tree_problem
from gcpo.scoring.rows import PackedRow

logger = logging.getLogger(__name__)

_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def backbone(module: Any) -> Any:
    """The transformer below the language-model head, also where LoRA wraps the model."""
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    return getattr(module, module.base_model_prefix, module)


def state_module(module: Any, layer: int) -> torch.nn.Module:
    """The submodule whose output is the hidden state of ``layer``.

    Args:
        module: a causal language model of transformers.
        layer: -1 (or the number of layers): after the final norm; 0: the embeddings; k: after layer k.

    Raises:
        ValueError: the model has no such layer, or no final norm that is known by name.
    """
    model = backbone(module)
    depth = len(model.layers)
    index = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= index <= depth:
        raise ValueError(f"the model has hidden states 0 to {depth}, and no {layer}: change the layer that is set")
    if index == 0:
        return model.get_input_embeddings()
    if index < depth:
        return model.layers[index - 1]
    for name in _NORM_NAMES:
        if hasattr(model, name):
            return getattr(model, name)
    raise ValueError(f"{type(model).__name__} has no final norm named {' or '.join(_NORM_NAMES)}")


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits divided by the temperature, as verl divides those of its own rows.

    verl rounds the temperature to the type of the logits: 0.7 is 0.69921875 in bfloat16. Packs must do the same, since
    p_c of Eq. 13 comes out of a pack and p_q out of verl's rows.

    Args:
        logits: [K, V].
        temperature: of the rollout.
    """
    return _scale_logits_by_temperature(
        logits,
        torch.tensor([temperature], dtype=torch.float32, device=logits.device),
        is_unit_temperature=_is_scalar_unit_temperature(temperature),
    )


class GCPOFSDPEngine(PaddingFreeEngine):
    """FSDP engine of a language model, with packs, states and the term of a method.

    Attributes:
        term: of the method, set by the worker; ``None``: the loss is verl's.
        method_name: what its metrics begin with.
    """

    term: Term | None = None
    method_name = "gcpo"

    # ---- states and packs -----------------------------------------------------------------------------------------

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        """verl's inputs, or those of a packed tree. A pack of one sequence is a row as verl knows it."""
        layer: Any = tu.get_non_tensor_data(micro_batch, "gcpo_layer", None)
        row = row_of(micro_batch)
        if row is not None and row.is_tree:
            model_inputs, output_args = self._pack_inputs(row, micro_batch), {}
        else:
            model_inputs, output_args = super().prepare_model_inputs(micro_batch)
            if row is not None and not len(row.predict):
                # Only states are wanted: the head is given no place to work on.
                model_inputs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=get_device_id())
        if layer is None:
            return model_inputs, output_args
        captured: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)

        output_args["gcpo_captured"] = captured
        module = state_module(self.module, layer)
        self._hooks.append(module.register_forward_hook(keep))
        if isinstance(row, PerturbedRow):
            self._hooks.append(row.register(module, self.module.get_output_embeddings()))
        return model_inputs, output_args

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool) -> Any:
        """verl's forward pass; its hooks are gone afterwards, also where it failed."""
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            while self._hooks:
                self._hooks.pop().remove()

    @cached_property
    def _hooks(self) -> list[RemovableHandle]:
        """The hooks of the forward pass that is under way."""
        return []

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, torch.Tensor]:
        """verl's outputs; of a pack, flat, its values as ``log_probs`` [1, K] and its ``states`` [1, Q * d].

        The values are those of `gcpo.adapters.scoring.run_packs`.
        """
        row = row_of(micro_batch)
        if row is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        captured = output_args.get("gcpo_captured")
        hidden = captured[-1].flatten(0, -2) if captured else None
        squares = []
        if row.segments and hidden is not None:
            squares = [self._gradient_squares(row, output.logits, hidden, micro_batch)]
        if row.is_tree:
            values = self._tree_log_probs(row, output, micro_batch)
        elif not len(row.predict):
            values = output.logits.new_zeros(0)
        else:
            found = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
            # verl's value at a place is that of the token behind it.
            values = found["log_probs"].values()[row.predict.to(found["log_probs"].device)]
        if hidden is not None and not row.is_tree and "pad_size" in output_args:
            hidden = self._gather_and_unpad_packed(hidden, output_args["pad_size"])
        values = torch.cat([values, *squares])
        model_output = {"log_probs": torch.nested.as_nested_tensor([values], layout=torch.jagged)}
        if hidden is not None:
            states = hidden[row.state_at.to(hidden.device)].float().flatten()
            model_output["states"] = torch.nested.as_nested_tensor([states], layout=torch.jagged)
        return model_output

    def _pack_inputs(self, row: PackedRow, micro_batch: TensorDict) -> dict[str, Any]:
        ids: Any = micro_batch["input_ids"]
        positions: Any = micro_batch["position_ids"]
        input_ids = ids.values()
        return {
            "input_ids": input_ids.unsqueeze(0),
            "attention_mask": None,
            "position_ids": positions.values().unsqueeze(0),
            "logits_to_keep": row.predict.to(input_ids.device),
            "tree_pack": row.pack,
        }

    def _tree_log_probs(self, row: PackedRow, output: Any, micro_batch: TensorDict) -> torch.Tensor:
        temperature: Any = tu.get_non_tensor_data(micro_batch, "temperature", 1.0)
        logits = tempered(output.logits.squeeze(0), temperature)
        if not len(logits):
            # verl's function fails where no log-probability is wanted.
            return logits.new_zeros(0)
        if isinstance(row, PerturbedRow):
            return row.read(logits)
        return logprobs_from_logits(logits, row.labels.to(logits.device))

    def _gradient_squares(
        self, row: PackedRow, logits: torch.Tensor, states: torch.Tensor, micro_batch: TensorDict
    ) -> torch.Tensor:
        """Compute `head_gradient_square` of the segments of a row, for the tempered policy."""
        temperature: Any = tu.get_non_tensor_data(micro_batch, "temperature", 1.0)
        predict = row.predict.to(logits.device)
        logits = logits.flatten(0, -2)
        if not row.is_tree:
            logits = logits[predict]
        labels, segment = (one.to(logits.device) for one in (row.labels, row.segment))
        with torch.autocast(logits.device.type, enabled=False):
            squares = head_gradient_square(
                states[predict], tempered(logits, temperature), labels, segment, row.segments
            )
        return squares / temperature**2

    @cached_property
    def tree_problem(self) -> str | None:
        """Why this engine's model can't be run on packed trees, ``None`` if it can; logged once.

        The configuration is judged first. A model that it has nothing against is probed, which all ranks must do
        together: workers ask for this property when they have loaded the model.
        """
        module = backbone(self.module)
        config = module.config
        if self.use_ulysses_sp:
            problem = "sequences are split over ranks (ulysses_sequence_parallel_size)"
        elif self.engine_config.use_fused_kernels:
            problem = "fused kernels (use_fused_kernels) compute the log-probabilities of whole rows"
        else:
            problem = tree_problem(config, type(module)) or probe_trees(self, config.get_text_config().vocab_size)
        if problem is not None and torch.distributed.get_rank() == 0:
            notice(logger, f"contexts are scored one by one, without shared prefixes: {problem}")
        return problem

    def tree_attention(self) -> AbstractContextManager[None]:
        """Within, the model takes packs; its backward passes belong inside."""
        return tree_attention_on(backbone(self.module).config)

    # ---- the term of a method ---------------------------------------------------------------------------------------

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """verl's pass over its own rows, then one over the rows of the method's term; their gradients add up."""
        run, term = super().forward_backward_batch, self.term
        if forward_only or term is None or term.on_plain_rows or update_of(data) is None:
            return run(data, loss_function, forward_only)
        part = tu.get_non_tensor_data(data, PART, None)
        if part == term.name:
            self._count_tokens(data)
            return term_pass(self, data, term, run)
        output = run(data, loss_function, forward_only)
        if part is None:
            extra = term_pass(self, data, term, run)
            output["loss"] = [*output["loss"], *extra["loss"]]
            output["metrics"].update(extra["metrics"])
        return output

    def max_over_ranks(self, value: int) -> int:
        """The largest ``value`` of all data-parallel ranks."""
        largest = torch.tensor(value, device=get_device_id())
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())
        return int(largest)

    def _count_tokens(self, data: TensorDict) -> None:
        """The number of plain tokens over all ranks, where no plain pass has counted them."""
        count = data["loss_mask"].sum().to(get_device_id())
        torch.distributed.all_reduce(count, group=self.get_data_parallel_group())
        tu.assign_non_tensor(data, batch_num_tokens=count.item())

    # ---- gradient norm of every part of the objective ----------------------------------------------------------------

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        """verl's step; before it, where asked, the gradient norm of each part of the objective by itself.

        The parts are measured in backward passes of their own whose gradients are thrown away, so that a step that
        is measured trains exactly like one that is not.
        """
        update = update_of(data)
        norms: dict[str, float] = {}
        if update is not None and update.parts:
            for part in update.parts:
                tu.assign_non_tensor(data, **{PART: part})
                self.optimizer_zero_grad()
                self.forward_backward_batch(data, loss_function, False)
                norms[f"{self.method_name}/grad_norm/{part}"] = self._grad_norm()
            data.pop(PART)
        output = super().train_batch(data, loss_function)
        output["metrics"].update({name: [value] for name, value in norms.items()})
        return output

    def _grad_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.nn.utils.get_total_norm(gradients)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def register_engine() -> None:
    """Register the engine for the CPU, and for the vendors of accelerators whose general key is verl's own."""
    # On cuda the key without vendor is verl's. A vendor's key is looked up first, so this engine then serves every
    # FSDP run in the environment; without GCPO's fields in the batch it does what its parent does.
    register = partial(EngineRegistry.register, model_type="language_model")
    register(backend=["fsdp", "fsdp2"], device="cpu")(GCPOFSDPEngine)
    register(backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd"])(GCPOFSDPEngine)


register_engine()
