"""GCPO, GRPO and GVPO in one file and one process, on a small transformer, with only torch.

    python -m examples.gcpo_in_one_file --method gcpo --model models/arithmetic-warm --data data/arithmetic \
        --seed 0 --steps 60 --output outputs/one_file [name=value ...]

Read it for the order in which a step uses the equations: `Trainer.sample`, `draw`, `score`, `credit`, `update`. The
numbers are those of "Group Causal Policy Optimization for Post-Training Large Language Models" (arXiv 2508.05428); the
equations themselves are functions of `gcpo.algorithms`, and `examples.small_transformer` reads and writes text, and
`examples.training_run` has the settings and the loop over the steps.

``--output`` receives ``metrics.jsonl``, a line for each step in the format of verl's file logger, and ``model``, which
transformers can load. A run follows from its settings. It cannot be resumed: an interrupted run is repeated.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.nn.utils.rnn import pad_sequence

from examples.small_transformer import Ids, Response, Text, Transformer, generate, log_probs, read
from examples.training_run import RunSettings, chunks, command, grade, means_by_sign, question_ids
from gcpo import algorithms
from gcpo.collider import leave_one_out_plan
from gcpo.collider.prompts import BlockBudget, CandidatePrompts
from gcpo.faults import RunStoppedError
from gcpo.seeding import request_seed
from gcpo.settings import ConfigError


@dataclass
class Group:
    """A question q and its n responses.

    A response has S contexts x_{i,l}: L over the shared draws, then L' over its leave-one-out draws.
    """

    row: dict[str, Any]
    key: tuple[Any, ...]
    prompt: Ids
    responses: list[Response]
    rewards: Tensor  # [n]
    advantage: Tensor = field(init=False)  # [n]
    kappa_weight: Tensor = field(init=False)  # [n], 0: no kappa term
    contexts: dict[tuple[int, int], Text] = field(default_factory=dict)  # by (i, slot), those with a valid draw
    state: Tensor = field(init=False)  # z [n, d]
    context_state: Tensor = field(init=False)  # Z [n, S, M, d]
    has_state: Tensor = field(init=False)  # [n, S, M]
    context_log_p: Tensor = field(init=False)  # [n, S, T]
    has_log_p: Tensor = field(init=False)  # [n, S]
    log_ref: Tensor = field(init=False)  # log pi'_ref [n, T]

    @property
    def old(self) -> Tensor:
        """log pi_old(y_ij | q, y_i<j) [n, T], 0 behind a response; the sampler's own, so no pass recomputes them."""
        return pad_sequence([response.log_p for response in self.responses], batch_first=True)

    @property
    def is_even(self) -> bool:
        """Whether all rewards are equal: A is zero then, and Upsilon changes nothing."""
        return bool((self.rewards == self.rewards[0]).all())


class Trainer:
    """One run."""

    def __init__(self, settings: RunSettings) -> None:
        from transformers import AutoTokenizer

        self.settings = s = settings
        self.model, self.reference = Transformer(Path(s.model)), Transformer(Path(s.model))
        self.parameters = list(self.model.weights.values())
        self.optimizer = torch.optim.AdamW(self.parameters, s.lr, weight_decay=s.weight_decay)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(s.model)
        self.prompts = CandidatePrompts(self.tokenizer, BlockBudget(s.max_response))
        self.metrics: dict[str, Any] = {}
        self.target = s.target if s.method == "gcpo" else "off"
        self.kappa = s.kappa if s.method == "gcpo" else 0.0
        self.others = s.num_leave_one_out_draws if s.scheme == "leave_one_out" else 0
        self.slots = s.num_draws + self.others
        if s.method == "gcpo" and self.slots < 2:
            raise ConfigError("num_draws is 1: one shared draw makes the causal part zero by construction; set it to 2")

    def generate(self, texts: Sequence[Text], *name: Any, temperature: float | None = None) -> list[Response]:
        """Responses of the current policy; ``name`` and the seed of the run are their seed."""
        s, end = self.settings, self.tokenizer.eos_token_id
        temperature = s.temperature if temperature is None else temperature
        return generate(self.model, texts, s.max_response, temperature, end, request_seed(s.seed, *name))

    def step(self, step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Train on some questions; returns the metrics."""
        start, self.metrics = time.perf_counter(), {"training/global_step": step}
        groups = self.sample(step, rows)
        for station in (self.draw, self.score, self.credit, self.update):
            station(groups)
        return {**self.metrics, "timing_s/step": time.perf_counter() - start}

    # ---- sample ------------------------------------------------------------------------------------------------------

    def sample(self, step: int, rows: Sequence[dict[str, Any]]) -> list[Group]:
        """y_0 .. y_{n-1} ~ pi_old(. | q) and their rewards r_i."""
        n, prompts = self.settings.n, [question_ids(self.tokenizer, row) for row in rows]
        responses = self.generate([[prompt] for prompt in prompts for _ in range(n)], "sample", step)
        rewards = grade(self.tokenizer, [row for row in rows for _ in range(n)], responses, "score")
        lengths = torch.tensor([len(response.ids) for response in responses])
        self.metrics |= {
            "critic/score/mean": float(rewards.mean()),
            "response_length/mean": float(lengths.float().mean()),
            "response_length/clip_ratio": sum(response.is_cut for response in responses) / len(responses),
            "perf/total_num_tokens": int(lengths.sum()) + n * sum(map(len, prompts)),
            "tokens/generated": int(lengths.sum()),
        }
        return [
            Group(row, (step, row["extra_info"]["index"]), prompt, responses[at : at + n], rewards[at : at + n])
            for at, (row, prompt) in zip(range(0, len(responses), n), zip(rows, prompts, strict=True), strict=True)
        ]

    # ---- draw --------------------------------------------------------------------------------------------------------

    def draw(self, groups: Sequence[Group]) -> None:
        """Collider draws y_n, and the contexts x_{i,l} = {q} + {y_k : k != i} + {y_{n,l}} over them (Step 2).

        Shared draws y_{n,l} ~ pi_old(. | q, y_0 .. y_{n-1}), l < L, are the same for all i. Leave-one-out draws of i,
        l >= L, are ~ pi_old(. | q, {y_k : k != i}): the mean over them is the conditional expectation Phi of Eq. 2.
        """
        s, layouts = self.settings, [self._layout(group) for group in groups]
        asked = [(group, i, text) for group, texts in zip(groups, layouts, strict=True) for i, text in texts.items()]
        asked = [ask for ask in asked for _ in range(s.num_draws if ask[1] is None else self.others)]
        if not asked:
            return
        draws = self.generate([text for _, _, text in asked], "draw", groups[0].key[0])
        valid = [not y.is_cut and bool(self.prompts.text_ids(y.ids)) for y in draws]
        self._count("draws", len(draws), sum(valid))
        self._measure_draws([(group, i) for group, i, _ in asked], draws, valid)
        queue = iter(zip(draws, valid, strict=True))
        for group, texts in zip(groups, layouts, strict=True):
            # They are exchangeable: the first valid one is l = 0.
            shared = sorted(itertools.islice(queue, s.num_draws if texts else 0), key=lambda draw: not draw[1])
            for i, (*start, tail) in texts.items():
                if i is not None:
                    for slot, (y, is_valid) in enumerate([*shared, *itertools.islice(queue, self.others)]):
                        if is_valid:
                            group.contexts[i, slot] = [*start, (*self.prompts.collider_block(y.ids), *tail)]

    def _layout(self, group: Group) -> dict[int | None, Text]:
        """The prompts of the shared draws (None) and of the leave-one-out draws of each i that needs contexts."""
        s, n, group.kappa_weight = self.settings, self.settings.n, torch.zeros(self.settings.n)
        if self.kappa:  # some of the terms stand for all, so that the gradient is the same in expectation
            noise = np.random.default_rng(request_seed(s.seed, *group.key, "kappa"))
            chosen = noise.choice(n, max(1, round(s.subsample * n)), replace=False)
            group.kappa_weight[chosen] = n / len(chosen)
        weighted = self.target == "projection" and not group.is_even
        needed = [i for i in range(n) if weighted or group.kappa_weight[i] > 0]
        if not needed:
            return {}
        blocks = [tuple(self.prompts.candidate_block(k, y.ids)) for k, y in enumerate(group.responses)]
        order = np.random.default_rng(request_seed(s.seed, "order", *group.key)).permutation(n).tolist()
        # x is a set; the plan orders it so that the contexts begin with as much text in common as they can.
        plan = leave_one_out_plan(n, self.slots, lengths=[*map(len, blocks)], permutation=order, leaves=needed)
        frame, (*most, last) = self.prompts.frame(group.row["prompt"]), plan.collider_order()
        layout: dict[int | None, Text] = {None: [frame.head, *(blocks[k] for k in most), (*blocks[last], *frame.tail)]}
        for i in plan.depth_first():
            layout[i] = [frame.head, *(blocks[k] for k in plan.candidate_order(i)), frame.tail]
        return layout

    def _measure_draws(
        self, places: Sequence[tuple[Group, int | None]], draws: Sequence[Response], valid: list
    ) -> None:
        """Tokens and rewards of the draws; rewards are for the metrics alone."""
        rewards = grade(self.tokenizer, [group.row for group, _ in places], draws, "score").tolist()
        for name, is_shared in (("collider", True), ("leave_one_out", False)):
            mine = [at for at, (_, i) in enumerate(places) if (i is None) == is_shared]
            tokens = self.metrics[f"gcpo/tokens/generated/{name}"] = sum(len(draws[at].ids) for at in mine)
            self.metrics["tokens/generated"] += tokens
            if graded := [rewards[at] for at in mine if valid[at]]:
                self.metrics[f"gcpo/reward/{name}"] = sum(graded) / len(graded)

    def _count(self, part: str, asked: int, there: int) -> None:
        """Count what is missing: it is left out, and never replaced by zeros."""
        self.metrics[f"gcpo/missing/{part}_frac"] = 1 - there / max(asked, 1)
        if asked and not there:
            raise RunStoppedError(f"none of the {asked} {part} of a step is valid; set max_response higher")

    # ---- score -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> None:
        """States and conditioned log-probabilities of pi_old."""
        s = self.settings
        if self.target != "off":  # Step 1: z_i is the state of the last token of y_i, fed back by itself
            _, states = read(self.model, [[y.ids] for group in groups for y in group.responses])
            for group, state in zip(groups, states.split(s.n), strict=True):
                group.state = state
        places = [(group, i, slot) for group in groups for i, slot in group.contexts]
        for group in groups:
            length, generations = group.old.shape[1], s.num_generations if s.source == "response" else 1
            group.context_state = torch.zeros(s.n, self.slots, generations, self.model.config["hidden_size"])
            group.has_state = torch.zeros(s.n, self.slots, generations, dtype=torch.bool)
            group.context_log_p = torch.zeros(s.n, self.slots, length)
            group.has_log_p = torch.zeros(s.n, self.slots, dtype=torch.bool)
        if not places:
            return
        texts = [group.contexts[i, slot] for group, i, slot in places]
        targets = [group.responses[i].ids if group.kappa_weight[i] > 0 else () for group, i, _ in places]
        log_p, states = log_probs(self.model, texts, targets, s.temperature)
        for (group, i, slot), target, values, state in zip(places, targets, log_p, states, strict=True):
            group.context_log_p[i, slot, : len(target)] = values[: len(target)]
            group.has_log_p[i, slot] = len(target) > 0
            if s.source == "prompt":  # Z is the state at the end of x_{i,l}
                group.context_state[i, slot], group.has_state[i, slot] = state, True
        if s.source == "response" and self.target == "projection":
            for group in groups:
                self._regenerate(group)

    def _regenerate(self, group: Group) -> None:
        """Step 2: O_{i,l,m} ~ pi_old(. | x_{i,l}), m < M, and Z, the state of its last token, fed back by itself."""
        m = self.settings.num_generations
        if group.is_even or not group.contexts:
            return
        places = [(i, slot, k) for i, slot in group.contexts for k in range(m)]
        outputs = self.generate([text for text in group.contexts.values() for _ in range(m)], "regenerate", *group.key)
        _, states = read(self.model, [[output.ids] for output in outputs])
        for place, output, state in zip(places, outputs, states, strict=True):
            if not output.is_cut:
                group.context_state[place], group.has_state[place] = state, True
        tokens = sum(len(output.ids) for output in outputs)
        self.metrics["tokens/generated"] += tokens

    # ---- credit ------------------------------------------------------------------------------------------------------

    def credit(self, groups: Sequence[Group]) -> None:
        """Advantages A_i (Eq. 8), B_i = A_i Upsilon_i (Eq. 11), and the causal reference (Eq. 13)."""
        for group in groups:
            label = torch.zeros(self.settings.n, dtype=torch.long)
            group.advantage = algorithms.group_relative_advantage(group.rewards, label)
        if self.target != "off":
            weights = self._upsilon(groups)
            before = torch.cat([group.advantage for group in groups])
            for group, weight in zip(groups, weights, strict=True):
                group.advantage = algorithms.causal_advantage(group.advantage, weight)
            after = torch.cat([group.advantage for group in groups])
            self.metrics["gcpo/advantage/cosine_to_grpo"] = float(torch.cosine_similarity(before, after, dim=0))
        if self.kappa:
            self._reference(groups)

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the S contexts those over shared draws, and those over leave-one-out draws if there are any."""
        shared = self.settings.num_draws
        return tensor[:, :shared], tensor[:, shared:] if self.others else None

    def _upsilon(self, groups: Sequence[Group]) -> list[Tensor]:
        """Steps 3 to 5: Upsilon_i = alpha sim(z_i, Zbar_i - Zbar'_i + zbar) (Eq. 11)."""
        s, weights, known = self.settings, [], []
        for group in groups:
            if self.target == "group_mean":
                target, has_target = algorithms.group_mean_target(group.state), torch.ones(s.n, dtype=torch.bool)
            else:
                states, others = self._split(group.context_state)
                valid, others_valid = self._split(group.has_state)
                target, has_target = algorithms.causal_target(
                    group.state, states, valid, z_marginal=others, valid_marginal=others_valid
                )
            options = {"alpha": s.alpha, "similarity": s.similarity}
            weights.append(algorithms.causal_weight(group.state, target, has_target, **options))
            known.append(has_target)
        asked = [has for group, has in zip(groups, known, strict=True) if not group.is_even]
        self._count("targets", s.n * len(asked), sum(int(has.sum()) for has in asked))
        every = torch.cat([weight[has] for weight, has in zip(weights, known, strict=True)])
        if not len(every):
            return weights
        # A response without a target gets the mean: with 1 it would take a smaller step than all others.
        weights = [torch.where(has, weight, every.mean()) for weight, has in zip(weights, known, strict=True)]
        self.metrics |= {f"gcpo/upsilon/{kind}": float(getattr(every, kind)()) for kind in ("mean", "min", "max")}
        advantage = torch.cat([group.advantage[has] for group, has in zip(groups, known, strict=True)])
        self.metrics |= means_by_sign("gcpo/upsilon/mean", every, advantage)
        if spread := [float(weight[has].std()) for weight, has in zip(weights, known, strict=True) if has.sum() > 1]:
            self.metrics["gcpo/upsilon/spread_in_group"] = sum(spread) / len(spread)
        return self._ablated(groups, weights, known)

    def _ablated(self, groups: Sequence[Group], weights: list[Tensor], known: list[Tensor]) -> list[Tensor]:
        """Whether Upsilon is more than a step size: without its differences, or with those of other responses."""
        if self.settings.ablation == "mean":
            matters = [weight[group.advantage != 0] for group, weight in zip(groups, weights, strict=True)]
            return [torch.full_like(weight, float(torch.cat(matters or weights).mean())) for weight in weights]
        if self.settings.ablation == "shuffled":
            noise = torch.Generator().manual_seed(request_seed(self.settings.seed, "control", groups[0].key[0]))
            for weight, has in zip(weights, known, strict=True):
                weight[has] = weight[has][torch.randperm(int(has.sum()), generator=noise)]
        return weights

    def _reference(self, groups: Sequence[Group]) -> None:
        """pi'_ref = pi(y | x_i) - mean_l pi(y | x_{i,l}) + pi(y | q) of every token (Eq. 13)."""
        asked = there = 0
        for group in groups:
            log_p, others = self._split(group.context_log_p)
            valid, others_valid = self._split(group.has_log_p)
            group.log_ref, _, has_reference = algorithms.causal_reference(
                log_p, group.old, valid, log_p_marginal=others, valid_marginal=others_valid
            )
            asked += int((group.kappa_weight > 0).sum())
            group.kappa_weight = group.kappa_weight * has_reference
            there += int((group.kappa_weight > 0).sum())
        self._count("references", asked, there)

    # ---- update ------------------------------------------------------------------------------------------------------

    def update(self, groups: Sequence[Group]) -> None:
        """An optimizer step on each mini-batch of whole questions."""
        s, means = self.settings, {}
        minis = list(chunks(groups, -(-len(groups) // (s.mini_batches or (4 if s.method == "gvpo" else 1)))))
        for mini in minis:
            self.optimizer.zero_grad(set_to_none=False)
            found = {"actor/pg_loss": self._policy_backward(mini)}
            gradients: list[Any] = [p.grad for p in self.parameters]
            policy = [gradient.clone() for gradient in gradients]
            if self.kappa:
                found["gcpo/grad_norm/policy"] = float(get_total_norm(policy))
                found["gcpo/kl_loss"] = self._kappa_backward(mini)
                kappa = [both - part for both, part in zip(gradients, policy, strict=True)]
                found["gcpo/grad_norm/kappa"] = float(get_total_norm(kappa))
            found["actor/grad_norm"] = float(clip_grad_norm_(self.parameters, s.max_grad_norm))
            if not found["actor/grad_norm"] < float("inf"):
                raise RunStoppedError(f"the norm of a gradient is {found['actor/grad_norm']}; lower lr")
            self.optimizer.step()
            means = {name: means.get(name, 0.0) + value / len(minis) for name, value in found.items()}
        self.metrics |= means

    def _policy_backward(self, groups: Sequence[Group]) -> float:
        """The gradient of Eq. 10 without its kappa term (Eq. 6 with B for A), or of GVPO; returns the loss."""
        s, total, count = self.settings, 0.0, len(groups)
        if s.method != "gvpo" and not s.kl:  # an advantage of zero has no gradient
            groups = [group for group in groups if group.advantage.any()]
        for some in chunks(groups, 4):
            responses = [y for group in some for y in group.responses]
            texts, ids = [[group.prompt] for group in some for _ in group.responses], [y.ids for y in responses]
            log_p, _ = log_probs(self.model, texts, ids, s.temperature)
            old = pad_sequence([y.log_p for y in responses], batch_first=True)
            if s.method == "gvpo":
                ratios = (log_p - old).sum(1).view(-1, s.n)
                losses = [algorithms.gvpo_loss(g.rewards, d, beta=s.beta) for g, d in zip(some, ratios, strict=True)]
                loss = torch.stack(losses).sum() / count
            else:
                advantage = torch.cat([group.advantage for group in some])[:, None]
                loss = mean_over_tokens(surrogate(log_p, old, advantage, s.clip), responses) / (count * s.n)
            if s.kl:  # Eq. 7
                with torch.no_grad():
                    log_ref, _ = log_probs(self.reference, texts, ids, s.temperature)
                divergence = algorithms.causal_kl(log_p, log_ref)
                loss = loss + s.kl * mean_over_tokens(divergence, responses) / (count * s.n)
            loss.backward()
            total += float(loss.detach())
        return total

    def _kappa_backward(self, groups: Sequence[Group]) -> float:
        """The gradient of kappa KL' (Eq. 12), pi_theta under x_{i,0}; returns the term before kappa."""
        s, total = self.settings, 0.0
        for some in chunks(groups, 4):
            rows = [(group, i) for group in some for i in range(s.n) if group.kappa_weight[i] > 0]
            if not rows:
                continue
            responses = [group.responses[i] for group, i in rows]
            texts, ids = [group.contexts[i, 0] for group, i in rows], [y.ids for y in responses]
            log_p, _ = log_probs(self.model, texts, ids, s.temperature)
            log_ref = pad_sequence([group.log_ref[i, : len(group.responses[i].ids)] for group, i in rows], True)
            divergence = torch.stack([group.kappa_weight[i] for group, i in rows])[:, None] * algorithms.causal_kl(
                log_p, log_ref
            )
            term = mean_over_tokens(divergence, responses) / (len(groups) * s.n)
            (self.kappa * term).backward()
            total += float(term.detach())
        return total


def mean_over_tokens(values: Tensor, responses: Sequence[Response]) -> Tensor:
    """sum_i (1 / T_i) sum_j of values [R, T] that are 0 behind a response."""
    return (values.sum(1) / torch.tensor([len(response.ids) for response in responses])).sum()


def surrogate(log_p: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """- min(R B, clip(R, 1 - eps, 1 + eps) B) of every token (Eq. 10, or 6 with A for B), R of Eq. 9, as verl has it.

    verl bounds R by e^20, and where B is negative the whole by -3 B (its dual clip).
    """
    ratio = (log_p - old).clamp(-20, 20).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(old == 0, 0, torch.where(advantage < 0, torch.minimum(loss, -3 * advantage), loss))


if __name__ == "__main__":
    sys.exit(command(Trainer))
