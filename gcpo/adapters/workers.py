"""verl's actor worker, with the scoring stage and the loss of Eq. 10."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu

from gcpo.adapters.fields import nested, split_rows
from gcpo.adapters.losses import gcpo_loss
from gcpo.adapters.scoring import Score, Scorer, ScoreRequest, make_scorer
from gcpo.adapters.weight_socket import OwnSocketWorker
from gcpo.tokens import control_ids

SCORED_KINDS = ("response", "context", "conditioned")
"""What is scored: y_i by itself, y_i or the state of the prompt under x_{i,l}, and O_{i,l,m}."""


class GCPOActorRolloutRefWorker(OwnSocketWorker):
    """Actor, rollout and reference in one worker, for GCPO.

    ``config.gcpo`` holds the resolved ``gcpo:`` group, which the trainer puts there.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """verl's set-up; then the actor's loss gets the kappa term, and its model is probed on packed trees."""
        super().init_model()
        if self._is_actor:
            self.actor.set_loss_fn(partial(gcpo_loss, base=self.loss_fn, config=self.loss_fn.keywords["config"]))
            if self.config.gcpo.scoring.packing == "tree":
                _ = self.actor.engine.tree_problem  # found, and said, before training starts

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def score_contexts(self, data: TensorDict) -> TensorDict:
        """Hidden states and conditioned log-probabilities of the old policy for every row.

        Args:
            data: ``prompts`` and ``responses``; with contexts ``gcpo_contexts``, ``gcpo_context_lengths`` and
                ``gcpo_kl_weight`` (a row of weight 0 needs no log-probabilities), and with conditioned generations
                ``gcpo_outputs``, ``gcpo_output_lengths``; non-tensor ``gcpo_scoring``.

        Returns:
            Nested fields: ``gcpo_z`` [d]; ``gcpo_z_conditioned`` [D * M * d], zero where there is no generation;
            ``gcpo_log_p`` [D * T_i], zero where there is no context or no weight; ``gcpo_scored_tokens`` [4]: this
            rank's tokens through the model, an equal part in every row, and the row's own without sharing, by
            ``SCORED_KINDS``. Fields that ``gcpo_scoring`` does not ask for are absent.
        """
        wanted = SimpleNamespace(**tu.get_non_tensor_data(data, "gcpo_scoring", None))
        engine, actor_config = self.actor.engine, self.loss_fn.keywords["config"]
        scoring = self.config.gcpo.scoring
        scorer = make_scorer(
            engine,
            packing=scoring.packing,
            min_shared=scoring.min_shared_tokens,
            micro_batch_size=None if actor_config.use_dynamic_bsz else actor_config.ppo_micro_batch_size_per_gpu,
            settings={
                "use_remove_padding": engine.use_remove_padding,
                "use_fused_kernels": self.actor.engine_config.use_fused_kernels,
            },
            temperature=tu.get_non_tensor_data(data, "temperature", 1.0),
            layer=wanted.layer,
            max_tokens=int(scoring.max_token_len_per_gpu or actor_config.ppo_max_token_len_per_gpu),
        )
        with engine.eval_mode():
            return score_rows(data, wanted, scorer, self.actor.model_config.tokenizer)


def score_rows(data: TensorDict, wanted: SimpleNamespace, scorer: Scorer, tokenizer: Any) -> TensorDict:
    """Ask ``scorer`` for everything that the rows of ``data`` need, laid out as ``score_contexts`` says."""
    end_ids = control_ids(tokenizer)

    def last(ids: torch.Tensor) -> int:
        at = len(ids) - 1
        while wanted.token == "last_content" and at > 0 and int(ids[at]) in end_ids:
            at -= 1
        return at

    def state_request(context: torch.Tensor, output: torch.Tensor) -> ScoreRequest:
        if wanted.context == "response":
            context = context[:0]
        return ScoreRequest(context, output, state_at=len(context) + last(output))

    requests: list[ScoreRequest] = []
    rows = []

    def ask(request: ScoreRequest, row: dict[str, Any], kind: str) -> int:
        requests.append(request)
        row["tokens"][SCORED_KINDS.index(kind)] += len(request.context) + len(request.target)
        return len(requests) - 1

    # Once for all rows: indexing a nested tensor takes it apart again every time.
    fields = {name: list(value) for name, value in data.items() if isinstance(value, torch.Tensor)}
    for i in range(len(data)):
        prompt, response = fields["prompts"][i], fields["responses"][i]
        row: dict[str, Any] = {"length": len(response), "tokens": [0.0] * len(SCORED_KINDS)}
        if wanted.states:
            row["z"] = ask(state_request(prompt, response), row, "response")
        if wanted.contexts:
            contexts = split_rows(fields["gcpo_contexts"][i], fields["gcpo_context_lengths"][i])
            prompt_states = wanted.conditioned and wanted.source == "prompt"
            log_probs = wanted.log_probs and float(fields["gcpo_kl_weight"][i]) > 0
            row["log_probs"] = log_probs
            if wanted.log_probs or prompt_states:
                row["contexts"] = []
                for context in contexts:
                    if not len(context) or not (log_probs or prompt_states):
                        row["contexts"].append(None)
                        continue
                    state_at = len(context) - 1 if prompt_states else None
                    target = response if log_probs else response[:0]
                    row["contexts"].append(ask(ScoreRequest(context, target, log_probs, state_at), row, "context"))
            if wanted.conditioned and wanted.source == "response":
                row["outputs"] = []
                outputs = split_rows(fields["gcpo_outputs"][i], fields["gcpo_output_lengths"][i])
                per_context = len(outputs) // len(contexts)
                for j, output in enumerate(outputs):
                    request = state_request(contexts[j // per_context], output) if len(output) else None
                    row["outputs"].append(None if request is None else ask(request, row, "conditioned"))
        rows.append(row)
    scores = scorer(requests)
    return _lay_out(rows, scores, wanted, scorer.tokens)


def _lay_out(rows: list[dict[str, Any]], scores: list[Score], wanted: SimpleNamespace, tokens: int) -> TensorDict:
    size = next((len(score.state) for score in scores if score.state is not None), 1)

    def states(indices: list[int | None]) -> torch.Tensor:
        return torch.cat([torch.zeros(size) if at is None else scores[at].state for at in indices])

    fields = {"gcpo_scored_tokens": torch.tensor([[tokens / len(rows), *row["tokens"]] for row in rows])}
    if wanted.states:
        fields["gcpo_z"] = nested([scores[row["z"]].state for row in rows])
    if wanted.contexts and wanted.conditioned:
        kind = "contexts" if wanted.source == "prompt" else "outputs"
        fields["gcpo_z_conditioned"] = nested([states(row[kind]) for row in rows])
    if wanted.contexts and wanted.log_probs:

        def log_probs(row: dict[str, Any]) -> torch.Tensor:
            missing = torch.zeros(row["length"])
            found = [scores[at].log_probs if at is not None and row["log_probs"] else missing for at in row["contexts"]]
            return torch.cat(found)

        fields["gcpo_log_p"] = nested([log_probs(row) for row in rows])
    return TensorDict(fields, batch_size=len(rows))
