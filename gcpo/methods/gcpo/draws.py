"""The auxiliary generations of one group: collider draws, and the responses regenerated from them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gcpo.collider.prompts import CandidatePrompts, GroupPrompts
from gcpo.faults import ServerLostError, one_line
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring.tree import common_prefix
from gcpo.seeding import request_seed, seeded

logger = logging.getLogger(__name__)

KINDS = ("collider", "leave_one_out", "regenerated")
_NAMES = {
    "collider": "a collider draw",
    "leave_one_out": "a leave-one-out draw",
    "regenerated": "a regenerated response",
}
OUTCOMES = ("ok", "failed", "empty", "cut")
MAX_CAUSES = 3
"""Largest number of distinct causes that a group reports."""


@dataclass
class Draw:
    """One auxiliary generation: its tokens, or none if it failed, is empty or was cut."""

    token_ids: list[int]
    kind: str
    outcome: str
    generated: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reward: float | None = None
    cause: str | None = None
    """The reason of its exclusion, in one line, or ``None`` if it is valid."""
    left_out: int | None = None
    """The response that its prompt leaves out."""
    prompt: Sequence[int | Draw] = field(default=(), compare=False, repr=False)
    """The blocks of its prompt in order: indices of responses, and collider draws."""

    @property
    def valid(self) -> bool:
        return self.outcome == "ok"


@dataclass
class GroupResult:
    """The result of the collider stage for one group: tokens by response and context, counts and dumped texts."""

    contexts: list[list[list[int]]]
    outputs: list[list[list[int]]]
    draws: list[Draw]
    stats: dict[str, float]
    kl_weight: list[float]
    """Weight of every response's kappa term; 0: no kappa term."""
    plan: dict[str, Any] | None = None
    """Lengths in tokens of the ``frame`` and of every candidate's block (``blocks``)."""

    @property
    def causes(self) -> dict[str, int]:
        """The first causes of excluded draws, in the order of the requests, with their numbers of draws."""
        counts = Counter(draw.cause for draw in self.draws if draw.cause is not None)
        return dict(itertools.islice(counts.items(), MAX_CAUSES))


class ColliderSampler:
    """A sampler of the collider draws and the regenerated responses of one group.

    Args:
        config: the resolved ``gcpo:`` group.
        prompts: builder of the prompts.
        generate: ``(prompt_ids, sampling_params) -> TokenOutput``-like, awaitable; raises ``ServerLostError`` if
            the server is lost.
        sampling_params: parameters of the plain rollout (temperature, top-p, top-k), without lengths and seeds.
        max_model_len: longest sequence that the server supports.
        end_ids: tokens that end a response.
    """

    def __init__(
        self,
        config: GCPOConfig,
        prompts: CandidatePrompts,
        generate: Callable[[list[int], dict[str, Any]], Awaitable[Any]],
        sampling_params: dict[str, Any],
        max_model_len: int | None,
        end_ids: frozenset[int],
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.generate = generate
        self.sampling_params = sampling_params
        self.max_model_len = max_model_len
        self.end_ids = end_ids
        self._blocks: dict[tuple[int, int], list[int | Draw]] = {}

    async def draw(self, kind: str, prompt_ids: list[int], seed_parts: Sequence[Any]) -> Draw:
        """Generate one draw, with its outcome.

        Args:
            kind: one of ``KINDS``.
            prompt_ids: its prompt.
            seed_parts: values that identify the request within the run; see `seeded`.

        Raises:
            ServerLostError: the server is lost, which is not a failure of the draw.
        """
        name, section = _NAMES[kind], "regenerated" if kind == "regenerated" else "collider"
        max_tokens = getattr(self.config, section).max_tokens
        if self.max_model_len is not None:
            max_tokens = min(max_tokens, self.max_model_len - len(prompt_ids))
        if max_tokens < 1:
            cause = f"a prompt leaves no room for {name} in the context of {self.max_model_len} tokens"
            return Draw([], kind, "failed", prompt_tokens=len(prompt_ids), cause=cause)
        params = {**self.sampling_params, "max_tokens": max_tokens, "logprobs": False}
        params = seeded(params, self.config.seed, *seed_parts)
        try:
            output = await self.generate(prompt_ids, params)
        except ServerLostError:
            raise
        except Exception as error:
            logger.warning("gcpo: %s failed and is left out: %s", name, error)
            cause = f"{name} failed ({one_line(error)})"
            return Draw([], kind, "failed", prompt_tokens=len(prompt_ids), cause=cause)
        token_ids = [int(token) for token in output.token_ids]
        cached = output.extra_fields.get("num_cached_tokens") or 0
        outcome, cause = "ok", None
        if output.stop_reason == "aborted":
            outcome, cause = "failed", f"the server aborted {name}"
        elif not self.prompts.text_ids([token for token in token_ids if token not in self.end_ids]):
            outcome, cause = "empty", f"{name} is empty"
        elif len(token_ids) >= max_tokens and token_ids[-1] not in self.end_ids:
            outcome, cause = "cut", f"{name} was cut (gcpo.{section}.max_tokens and the context limit it)"
        return Draw(token_ids, kind, outcome, len(token_ids), len(prompt_ids), int(cached), cause=cause)

    async def run(
        self,
        messages: Sequence[dict[str, Any]],
        responses: Sequence[Sequence[int]],
        *,
        seed_parts: tuple[Any, ...],
        equal_rewards: bool,
    ) -> GroupResult:
        """Make all auxiliary generations of one group.

        Args:
            messages: the question as chat messages.
            responses: token ids of the n responses, by index.
            seed_parts: values that identify this group within the run and determine its seeds.
            equal_rewards: whether all advantages are zero, so that Upsilon has no effect.
        """
        config, n = self.config, len(responses)
        order = np.random.default_rng(request_seed(config.seed, "order", *seed_parts)).permutation(n).tolist()
        slots = config.collider.num_draws + config.leave_one_out_draws

        def parts(*place: Any) -> tuple[Any, ...]:
            return (*seed_parts, *place)

        kl_weight, wanted = self._needs(n, request_seed(config.seed, *parts("kappa")), equal_rewards)
        group = self.prompts.group(messages, responses, draws=slots, permutation=order, leaves=wanted or None)
        chosen = group.plan.depth_first() if wanted else ()
        sizes = [len(block) for block in group.candidates]
        frame = len(group.frame.head) + len(group.frame.tail)
        generations = config.collider.num_generations
        contexts: list[list[list[int]]] = [[[] for _ in range(slots)] for _ in range(n)]
        outputs: list[list[list[int]]] = [[[] for _ in range(slots * generations)] for _ in range(n)]
        draws: list[Draw] = []
        started = time.monotonic()
        if chosen:
            draws = await self._draw_colliders(group, chosen, parts, contexts)
            if config.needs_generations and not equal_rewards:
                draws += await self._generate(chosen, parts, contexts, outputs)
        stats = _count(draws)
        stats["skipped"] = float(not draws)
        stats["equal_rewards"] = float(equal_rewards)
        stats["frame_tokens"] = float(frame)
        stats["block_tokens"] = float(np.mean(sizes))
        stats["responses"] = float(n)
        stats["response_tokens"] = float(np.mean([len(ids) for ids in responses]))
        stats["common_prefix_tokens"] = _mean_common_prefix(responses)
        joint = [draw.token_ids for draw in draws if draw.valid and draw.kind != "regenerated"]
        if len(joint) > 1:
            stats["common_prefix_draw_tokens"] = _mean_common_prefix(joint)
        stats["response_variance"] = float(np.var([len(ids) for ids in responses], ddof=1))
        stats["seconds"] = time.monotonic() - started
        layout = {"frame": frame, "blocks": sizes}
        return GroupResult(contexts, outputs, draws, stats, kl_weight, layout)

    def failed(self, n: int, error: Exception, *, seed_parts: tuple[Any, ...], equal_rewards: bool) -> GroupResult:
        """Return the result of a group of ``n`` responses whose stage raised: all its draws count as failed."""
        config = self.config
        kl_weight, wanted = self._needs(n, request_seed(config.seed, *seed_parts, "kappa"), equal_rewards)
        slots = config.collider.num_draws + config.leave_one_out_draws
        cause = f"the collider stage of a group failed ({one_line(error)})"
        kinds = ["collider"] * config.collider.num_draws + ["leave_one_out"] * (
            config.leave_one_out_draws * len(wanted)
        )
        draws = [Draw([], kind, "failed", cause=cause) for kind in kinds] if wanted else []
        stats = {**_count(draws), "stage_failed": 1.0, "equal_rewards": float(equal_rewards), "responses": float(n)}
        empty = [[[]] * slots] * n, [[[]] * (slots * config.collider.num_generations)] * n
        return GroupResult(*empty, draws, stats, kl_weight)

    def _needs(self, n: int, seed: int, equal_rewards: bool) -> tuple[list[float], list[int]]:
        """Return the weights of the kappa terms, and the responses whose contexts are needed.

        The contexts of a response without Upsilon and kappa term are not needed, and if all
        advantages are zero Upsilon has no effect.
        """
        kl_weight = self._kl_weight(n, seed)
        weighted = self.config.causal_target_on and not equal_rewards
        return kl_weight, [i for i in range(n) if weighted or kl_weight[i] > 0]

    async def _draw_colliders(
        self, group: GroupPrompts, chosen: Sequence[int], parts: Callable[..., tuple], contexts: list[list[list[int]]]
    ) -> list[Draw]:
        """Generate the shared and the leave-one-out draws, and put the prompts that contain them into ``contexts``."""
        num_shared, num_leave_one_out = self.config.collider.num_draws, self.config.leave_one_out_draws
        prompt = group.collider_prompt()
        draws = await asyncio.gather(
            *(self.draw("collider", prompt, parts("collider", slot)) for slot in range(num_shared)),
            *(
                self.draw("leave_one_out", group.leave_one_out_prompt(i), parts("leave_one_out", i, slot))
                for i in chosen
                for slot in range(num_leave_one_out)
            ),
        )
        # Shared draws are exchangeable. Valid draws come first, so that l = 0, on which p_c, Zbar_i and the policy's
        # context are based, is valid whenever any draw is valid.
        shared, rest = sorted(draws[:num_shared], key=lambda draw: not draw.valid), draws[num_shared:]
        for draw in shared:
            draw.prompt = group.plan.collider_order()
        for at, i in enumerate(chosen):
            leave_one_out = rest[at * num_leave_one_out : (at + 1) * num_leave_one_out]
            for draw in leave_one_out:
                draw.left_out, draw.prompt = i, group.plan.candidate_order(i)
            contexts[i] = self._contexts(group, i, shared, leave_one_out)
        return draws

    async def _generate(
        self,
        chosen: Sequence[int],
        parts: Callable[..., tuple],
        contexts: list[list[list[int]]],
        outputs: list[list[list[int]]],
    ) -> list[Draw]:
        """Generate the regenerated responses, and put the valid ones into ``outputs``."""
        generations = self.config.collider.num_generations
        places = [
            (i, slot, m)
            for i in chosen
            for slot, context in enumerate(contexts[i])
            if context
            for m in range(generations)
        ]
        draws = await asyncio.gather(
            *(self.draw("regenerated", contexts[i][slot], parts("regenerated", i, slot, m)) for i, slot, m in places)
        )
        for (i, slot, m), draw in zip(places, draws, strict=True):
            draw.left_out, draw.prompt = i, self._blocks[i, slot]
            if draw.valid:
                outputs[i][slot * generations + m] = draw.token_ids
        return draws

    def _kl_weight(self, n: int, seed: int) -> list[float]:
        """Return the weight n / m for m of the n responses, drawn without replacement, and 0 for the others."""
        if not self.config.reference_on:
            return [0.0] * n
        count = max(1, round(self.config.reference.subsample * n))
        weight = [0.0] * n
        for i in np.random.default_rng(seed).choice(n, count, replace=False):
            weight[i] = n / count
        return weight

    def _contexts(
        self,
        group: GroupPrompts,
        i: int,
        shared: Sequence[Draw],
        leave_one_out: Sequence[Draw],
    ) -> list[list[int]]:
        """Return the prompts x_{i,l} of the shared, then of the leave-one-out draws; empty for invalid draws."""
        append = self.config.reference.collider_context == "append"
        contexts: list[list[int]] = []
        for slot, draw in enumerate([*shared, *leave_one_out]):
            own = slot < len(shared)
            if not draw.valid:
                contexts.append([])
                continue
            replaced = None
            if append and own and slot > 0 and shared[0].valid:
                replaced = self.prompts.collider_block(shared[0].token_ids)
            block = self.prompts.collider_block(draw.token_ids)
            contexts.append(group.context(i, slot, block, replaced))
            colliders = [draw] if replaced is None else [shared[0], draw]
            order = [[k] if kind == "candidate" else colliders for kind, k in group.plan.orders[i][slot]]
            self._blocks[i, slot] = [block for blocks in order for block in blocks]
        return contexts


def _mean_common_prefix(responses: Sequence[Sequence[int]]) -> float:
    """Return the mean length of the common prefix over pairs of responses, in tokens."""
    return float(np.mean([common_prefix(a, b) for a, b in itertools.combinations(responses, 2)]))


def _count(draws: Sequence[Draw]) -> dict[str, float]:
    """Counts by kind: draws, outcomes, and tokens generated, prefilled and cached."""
    counts: Counter[str] = Counter()
    for draw in draws:
        counts[f"{draw.kind}/draws"] += 1
        counts[f"{draw.kind}/{draw.outcome}"] += 1
        counts[f"{draw.kind}/generated_tokens"] += draw.generated
        counts[f"{draw.kind}/prompt_tokens"] += draw.prompt_tokens
        counts[f"{draw.kind}/cached_tokens"] += draw.cached_tokens
    return {name: float(value) for name, value in counts.items()}
