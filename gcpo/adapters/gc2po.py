"""GC2PO in verl: trainer mode, advantage estimator and worker, all named ``gc2po``, and the data set with the prompt
that asks for tags."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.debug import marked_timer

from gcpo.adapters.base import GroupTrainer
from gcpo.adapters.engine import backbone
from gcpo.adapters.fields import flat_field, nested, split_rows
from gcpo.adapters.perturbed import EpisodeScore, EpisodeScorer
from gcpo.adapters.weight_socket import OwnSocketWorker
from gcpo.checks import check_gc2po_run
from gcpo.faults import RunStoppedError
from gcpo.methods.gc2po.credit import (
    GroupEpisodes,
    GroupResult,
    batch_metrics,
    effectiveness,
    gaussian_noise,
    group_advantage,
    group_answers,
    group_noise,
)
from gcpo.methods.gc2po.episodes import Episodes, TokenReader, split_response
from gcpo.methods.gc2po.pack import EpisodeRequest
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.seeding import request_seed
from gcpo.tokens import control_ids

_COUNTS = ("path", "branches", "unshared", "tagged", "malformed")
"""What a row counts: this rank's tokens through the model, an equal part in every row, and its tags."""


# ---- the worker ------------------------------------------------------------------------------------------------------


class GC2POActorRolloutRefWorker(OwnSocketWorker):
    """Actor, rollout and reference in one worker, for GC2PO.

    ``config.gc2po`` holds the checked ``gc2po:`` group, which the trainer puts there.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """verl's set-up; a model whose states cannot be perturbed is refused.

        Raises:
            ConfigError: the model has no such layer.
            RuntimeError: its attention cannot be given packed rows.
        """
        super().init_model()
        if self._is_actor:
            self.gc2po = GC2POConfig.from_config(OmegaConf.to_container(self.config.gc2po), n=self.config.rollout.n)
            engine = self.actor.engine
            self.layer = self.gc2po.layer_of(len(backbone(engine.module).layers))
            self.reader = TokenReader(self.actor.model_config.tokenizer)
            if self.gc2po.counterfactual and engine.tree_problem is not None:
                raise RunStoppedError(
                    f"GC2PO perturbs states in packed rows, which this run can't have: {engine.tree_problem}; use "
                    "another model, or gc2po.counterfactual=off"
                )

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def score_episodes(self, data: TensorDict) -> TensorDict:
        """Episodes of every response, and what perturbing their states changes.

        Args:
            data: ``prompts``, ``responses``, and what ``GC2POTrainer`` puts beside them: ``gc2po_place`` [3] (whether
                anything is asked about the row, its group, its place in the batch), ``gc2po_answers`` and
                ``gc2po_answer_lengths``; non-tensor ``gc2po_step``, and ``gc2po_probe``, tokens of the answer prompt.

        Returns:
            Nested fields: ``gc2po_index`` [T_i], the episode of every token, -1 outside; ``gc2po_divergence`` and
            ``gc2po_effectiveness`` [max_episodes], NaN where there is nothing; ``gc2po_counts`` [5], see ``_COUNTS``.
        """
        engine, actor_config = self.actor.engine, self.loss_fn.keywords["config"]
        scorer = EpisodeScorer(
            engine,
            settings={
                "use_remove_padding": engine.use_remove_padding,
                "use_fused_kernels": self.actor.engine_config.use_fused_kernels,
            },
            temperature=tu.get_non_tensor_data(data, "temperature", 1.0),
            layer=self.layer,
            form=self.gc2po.form,
            relative=self.gc2po.perturbation.law == "gaussian",
            max_tokens=int(self.gc2po.max_token_len_per_gpu or actor_config.ppo_max_token_len_per_gpu),
        )
        model_config = self.actor.model_config
        with engine.eval_mode():
            return score_rows(
                data,
                self.gc2po,
                scorer,
                self.reader,
                end_ids=control_ids(model_config.tokenizer),
                size=model_config.hf_config.hidden_size,
                gather=self._gather,
            )

    def _gather(self, states: list[Any]) -> list[Any]:
        """The lists of all ranks as one."""
        group = self.actor.engine.get_data_parallel_group()
        found: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, states, group=group)
        return [entry for part in found for entry in part]


@dataclass(frozen=True)
class _Row:
    """A response of this rank; its seed is made of its tokens, so it is the same wherever the row stands."""

    episodes: Episodes
    length: int
    seed: int
    group: int
    place: int
    request: EpisodeRequest | None
    """With nothing asked about it yet; ``None`` where nothing is to be."""


def score_rows(
    data: TensorDict,
    config: GC2POConfig,
    scorer: Callable[[Sequence[EpisodeRequest]], list[EpisodeScore]],
    reader: TokenReader,
    *,
    end_ids: Collection[int],
    size: int,
    gather: Callable[[list[Any]], list[Any]],
) -> TensorDict:
    """Ask ``scorer`` for everything that the rows of ``data`` need, laid out as ``score_episodes`` says.

    Args:
        data: rows of this rank.
        config: the checked configuration.
        scorer: an ``EpisodeScorer``, or what answers like one.
        reader: of the tokenizer.
        end_ids: tokens that are no text at the end of a response: the control tokens.
        size: d, of a hidden state.
        gather: makes one list of the lists of all ranks.
    """
    step, probe = tu.get_non_tensor_data(data, "gc2po_step", 0), tu.get_non_tensor_data(data, "gc2po_probe", [])
    # At once: to index a nested tensor takes it apart every time.
    names = ["prompts", "responses", "gc2po_place", "gc2po_answers", "gc2po_answer_lengths"]
    columns = [[value.cpu() for value in data[name].unbind()] for name in names]
    rows = [_read(fields, config, reader, end_ids, step, torch.tensor(probe)) for fields in zip(*columns, strict=True)]
    limit = config.episodes.max_episodes
    divergence = torch.full((len(rows), limit), torch.nan, dtype=torch.float64)
    effect = torch.full((len(rows), limit), torch.nan, dtype=torch.float64)
    if config.counterfactual:
        asked = [i for i, row in enumerate(rows) if row.request is not None]
        requests = [rows[i].request for i in asked]
        if config.perturbs and config.perturbation.law == "group":
            states = [score.states for score in scorer(requests)]
            around = gather(
                [(rows[i].group, rows[i].place, rows[i].seed, s[1:]) for i, s in zip(asked, states, strict=True)]
            )
            requests = [_with_group_noise(rows[i], s[1:], around, config) for i, s in zip(asked, states, strict=True)]
            scores = scorer(requests)
        else:
            if config.perturbs:
                requests = [_with_gaussian_noise(rows[i], config, size) for i in asked]
            scores = scorer(requests)
            states = [score.states for score in scores]
        for i, request, state, score in zip(asked, requests, states, scores, strict=True):
            if request.asked:
                divergence[i, list(request.asked)] = score.divergence.mean(-1)
            effect[i, : len(request.ends)] = effectiveness(state)
    counts = torch.tensor([[0.0, 0.0, 0.0, row.episodes.tagged, row.episodes.malformed] for row in rows])
    if config.counterfactual:
        tokens = (scorer.path_tokens, scorer.branch_tokens, scorer.unshared_tokens)
        counts[:, :3] = torch.tensor(tokens) / len(rows)
    fields = {
        "gc2po_index": nested([row.episodes.index(row.length) for row in rows]),
        "gc2po_divergence": nested(list(divergence)),
        "gc2po_effectiveness": nested(list(effect)),
        "gc2po_counts": nested(list(counts)),
    }
    return TensorDict(fields, batch_size=len(rows))


def _read(
    fields: tuple[torch.Tensor, ...],
    config: GC2POConfig,
    reader: TokenReader,
    end_ids: Collection[int],
    step: int,
    probe: torch.Tensor,
) -> _Row:
    """Split a row into episodes."""
    prompt, response, where, answers, lengths = fields
    wanted, group, place = where.tolist()
    if not wanted:
        return _Row(Episodes((), False, False), len(response), 0, group, place, None)
    options = {"separator": config.episodes.separator, "max_episodes": config.episodes.max_episodes}
    episodes = split_response(response.tolist(), reader, end_ids=end_ids, **options)
    seed = request_seed(config.seed, "gc2po", step, prompt.tolist(), response.tolist())
    request = None
    if config.counterfactual and episodes.spans:
        scored = tuple(split_rows(answers, lengths)) if config.form == "inject" else ()
        request = EpisodeRequest(prompt, response, episodes.ends, (), probe, scored, torch.zeros(0, 1, 1))
    return _Row(episodes, len(response), seed, group, place, request)


def _asked(row: _Row, config: GC2POConfig) -> tuple[int, ...]:
    """The episodes to perturb: all or a random subset, and none where there is but one answer to change."""
    number, wanted = len(row.request.ends), config.episodes.scored
    if config.form == "inject" and len(row.request.answers) < 2:
        return ()
    if wanted is None or wanted >= number:
        return tuple(range(number))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(row.seed))
    return tuple(sorted(order[:wanted].tolist()))


def _with_gaussian_noise(row: _Row, config: GC2POConfig, size: int) -> EpisodeRequest:
    asked, perturbation = _asked(row, config), config.perturbation
    noise = gaussian_noise(row.seed, len(asked), perturbation.draws, size, perturbation.sigma)
    return replace(row.request, asked=asked, noise=noise)


def _with_group_noise(row: _Row, states: torch.Tensor, around: list[tuple], config: GC2POConfig) -> EpisodeRequest:
    """Perturbations towards other responses of the group, drawn from an order that their tokens alone decide."""
    others = [entry for entry in around if entry[0] == row.group and entry[1] != row.place]
    others.sort(key=lambda entry: entry[2])
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(row.seed))
    chosen = [others[j][3] for j in order[: config.perturbation.draws].tolist()]
    asked = _asked(row, config) if chosen else ()
    if not asked:
        return replace(row.request, states=False)
    noise = group_noise(states[list(asked)], [_states_at(other, asked) for other in chosen], config.perturbation.eta)
    return replace(row.request, asked=asked, noise=noise, states=False)


def _states_at(states: torch.Tensor, asked: Sequence[int]) -> torch.Tensor:
    """The states [len(asked), d] of another response at the same episodes; its last one where it has fewer."""
    return states[torch.tensor(asked).clamp(max=len(states) - 1)]


# ---- the estimator ---------------------------------------------------------------------------------------------------


@dataclass
class BatchEpisodes:
    """What the estimator ``gc2po`` needs of a batch, and what it found.

    Attributes:
        rows: of every group, in the order of its responses.
        groups: their episodes; ``None``: no answer could be parsed, the group trains with GRPO's advantage.
        results: of the groups that have episodes; the estimator fills it.
    """

    config: GC2POConfig
    rows: list[list[int]]
    groups: list[GroupEpisodes | None]
    results: list[GroupResult] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Metrics of the whole batch under ``gc2po/``."""
        known = [group for group in self.groups if group is not None]
        return batch_metrics(self.results, self.masks, known, len(self.groups) - len(known))


_episodes: ContextVar[BatchEpisodes | None] = ContextVar("gc2po_episodes", default=None)


@contextmanager
def batch_episodes(batch: BatchEpisodes) -> Iterator[None]:
    """Give the estimator ``gc2po`` the episodes of the batch that verl is about to compute advantages for."""
    token = _episodes.set(batch)
    try:
        yield
    finally:
        _episodes.reset(token)


@register_adv_est("gc2po")
def compute_gc2po_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token advantages from episode rewards; verl's GRPO advantage in groups without a parsable answer.

    Args:
        token_level_rewards: [B, T], whose sum over a row is the outcome reward.
        response_mask: [B, T].
        index: [B], the group of every row.
        config: verl's algorithm configuration.

    Returns:
        (advantages, returns), both [B, T]; zeros in padding rows.

    Raises:
        RuntimeError: outside the trainer mode ``gc2po``, where nothing finds episodes.
    """
    batch = _episodes.get()
    if batch is None:
        raise RuntimeError(
            "algorithm.adv_estimator=gc2po works in the trainer mode gc2po alone: set trainer.v1.trainer_mode=gc2po"
        )
    grpo, _ = compute_grpo_outcome_advantage(token_level_rewards, response_mask, index)
    outcome = token_level_rewards.sum(-1)
    advantages = torch.zeros_like(grpo)
    for rows, group in zip(batch.rows, batch.groups, strict=True):
        if group is None:
            advantages[rows] = grpo[rows]
            continue
        result = group_advantage(group, outcome[rows], response_mask[rows], batch.config)
        advantages[rows] = result.advantage.to(advantages)
        batch.results.append(result)
        batch.masks.append(response_mask[rows])
    return advantages, advantages


# ---- the trainer -----------------------------------------------------------------------------------------------------


@register_trainer("gc2po")
class GC2POTrainer(GroupTrainer):
    """Trainer mode ``gc2po``.

    Between verl's old log-probabilities and its advantages the actor splits the responses into episodes and perturbs
    their states; the advantages then go through verl's clipped objective.
    """

    mode = "gc2po"
    worker_class = GC2POActorRolloutRefWorker

    def __init__(self, config: Any) -> None:
        self.gc2po = check_gc2po_run(config)
        self._episodes: BatchEpisodes | None = None
        super().__init__(config)

    def _setup(self) -> None:
        # Workers are given actor_rollout_ref alone.
        with open_dict(self.config):
            self.config.actor_rollout_ref.gc2po = OmegaConf.create(self.gc2po.to_dict())
        super()._setup()

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Whole groups meet in a mini-batch, where they share their prompt."""
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        self._keep_groups_together(batch, metrics)
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's old log-probabilities, then the episodes."""
        self._count_reward_errors(batch, metrics)
        batch = super()._compute_old_log_prob(batch, metrics)
        with marked_timer("gc2po_score", self.timing_raw, color="blue"):
            answers = self._ask(batch)
        with marked_timer("gc2po_stage", self.timing_raw, color="brown"):
            self._episodes = self._collect(batch, answers, metrics)
        return batch

    def _ask(self, batch: KVBatchMeta) -> dict[str, Any]:
        """Let the actor score the episodes; the final answers of every group."""
        config, groups = self.gc2po, self._groups(batch)
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["responses", "reward_model"]
        )
        responses = [row.tolist() for row in data["responses"].unbind()]
        gold = [entry.get("ground_truth") for entry in list(data["reward_model"])]
        wanted = [[0, -1, row, []] for row in range(len(batch))]
        answers = {}
        for number, (uid, rows) in enumerate(groups.items()):
            texts = self.tokenizer.batch_decode([responses[row] for row in rows], skip_special_tokens=True)
            found = group_answers(texts, gold[rows[0]], config.answers.max_answers)
            tokens = {answer: self._encode(answer + config.answers.suffix) for answer in found.candidates}
            kept = {a: ids for a, ids in tokens.items() if len(ids) <= config.answers.max_tokens}
            answers[uid] = replace(found, candidates=tuple(kept))
            for row in rows:
                wanted[row] = [int(found.parsable), number, row, list(kept.values()) if config.needs_answers else []]
        fields = [
            {
                "gc2po_place": torch.tensor(entry[:3]),
                # One piece at least: a row of nested tensors must not be empty.
                **flat_field("gc2po_answers", "gc2po_answer_lengths", entry[3] or [[]]),
            }
            for entry in wanted
        ]
        columns = {name: nested([entry[name] for entry in fields]) for name in fields[0]}
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(columns, batch_size=len(batch))
        )
        self.actor_rollout_wg.score_episodes(
            KVBatchMeta(
                partition_id=batch.partition_id,
                keys=list(batch.keys),
                tags=list(batch.tags),
                fields=["prompts", "responses", *columns],
                extra_info={
                    "temperature": self.config.actor_rollout_ref.rollout.temperature,
                    "gc2po_step": self.global_steps,
                    "gc2po_probe": tuple(self._encode(config.answers.prompt)),
                },
            )
        )
        return answers

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _collect(self, batch: KVBatchMeta, answers: dict[str, Any], metrics: dict) -> BatchEpisodes:
        """What the estimator needs, from the fields that the actor wrote."""
        names = ["gc2po_index", "gc2po_divergence", "gc2po_effectiveness", "gc2po_counts", "old_log_probs"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        index = data["gc2po_index"].to_padded_tensor(-1)
        old = data["old_log_probs"].to_padded_tensor(0.0)
        divergence, effect, counts = (torch.stack(list(data[name])) for name in names[1:4])
        groups = self._groups(batch)
        collected = [
            GroupEpisodes(divergence[rows], effect[rows], index[rows], old[rows], answers[uid])
            if answers[uid].parsable
            else None
            for uid, rows in groups.items()
        ]
        real = [row for rows in groups.values() for row in rows]
        tokens = counts.sum(0).tolist()
        metrics |= {f"gc2po/tokens/{name}": value for name, value in zip(_COUNTS[:3], tokens, strict=False)}
        metrics["gc2po/tokens/scored"] = tokens[0] + tokens[1]
        for at, name in ((3, "tagged"), (4, "malformed")):
            metrics[f"gc2po/episodes/{name}_share"] = float(counts[real, at].mean())
        return BatchEpisodes(self.gc2po, list(groups.values()), collected)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's advantage stage; the estimator ``gc2po`` finds the episodes of this batch."""
        with batch_episodes(self._episodes):
            batch = super()._compute_advantage(batch, metrics)
        metrics.update(self._episodes.metrics())
        return batch


# ---- the prompt ------------------------------------------------------------------------------------------------------


class EpisodePromptDataset(RLHFDataset):
    """verl's data set; what ``data.episode_prompt`` says stands at the end of every question.

    It is named by ``data.custom_cls``.
    """

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """verl's filter, of the questions with the addition."""
        addition, key = self.config.get("episode_prompt") or "", self.prompt_key

        def add(row: dict[str, Any]) -> dict[str, Any]:
            *before, last = row[key]
            return {key: [*before, {**last, "content": last["content"] + addition}]}

        return super().maybe_filter_out_long_prompts(dataframe.map(add) if addition else dataframe)
