"""Prompts that contain the candidates of a group, built by joining token ids.

A prompt with candidates is ``head + block + ... + block + tail``. Head and tail are the chat-templated question
split where the blocks are inserted; a block is a label followed by the response's own token ids. A response is
never decoded and encoded again, so a block has the same tokens in every prompt and position, which
allows prompts to share prefixes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from gcpo.collider.plan import LeaveOneOutPlan, leave_one_out_plan
from gcpo.notices import notice
from gcpo.tokens import TextTokens, control_texts, last_occurrence

logger = logging.getLogger(__name__)

Truncation = Literal["keep_end", "keep_start", "answer"]

_ANSWER = "\\boxed{"
_THINK_END = "</think>"

# A text that no chat template and no question contains; it is removed before tokenisation.
_SPLIT = "\u241egcpo-blocks\u241e"


@dataclass(frozen=True)
class PromptTemplate:
    """The fixed texts around the candidate blocks."""

    intro: str = "\n\nOther answers to this question:"
    candidate: str = "\n[Answer {label}]\n"
    collider: str = "\n[Joint answer]\n"
    outro: str = "\n\nWrite your own answer."


@dataclass(frozen=True)
class BlockBudget:
    """The part of a response that a block may contain.

    Attributes:
        max_tokens: largest number of response tokens in a block, without its label.
        truncation: ``keep_end`` keeps the end, which holds the answer; ``keep_start`` the beginning; ``answer`` the
            text from the last ``\\boxed{`` on, even of a response that would fit.
        drop_think: drop the text up to the last ``</think>`` if the whole response does not fit. A response
            that never closes its thinking part, or has only white space after it, is cut by ``truncation`` instead.
            The tag is searched in the text. A token with its end and more text (``>The``) stays, since a token
            cannot be divided and no answer text may be lost; one that adds only white space (``>\\n\\n``) is dropped.
    """

    max_tokens: int = 1024
    truncation: Truncation = "keep_end"
    drop_think: bool = True


@dataclass(frozen=True)
class Frame:
    """The token ids before (``head``) and after (``tail``) the candidate blocks."""

    head: tuple[int, ...]
    tail: tuple[int, ...]


class CandidatePrompts:
    """Builds the prompts of the collider draws and of the leave-one-out contexts.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        budget: the part of each response that a block may contain.
        template: the fixed texts.
        chat_template_kwargs: passed to ``apply_chat_template`` (verl's ``data.apply_chat_template_kwargs``).

    Raises:
        ValueError: the tokenizer has no chat template, or the budget is below one token.
    """

    def __init__(
        self,
        tokenizer: Any,
        budget: BlockBudget | None = None,
        template: PromptTemplate | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.budget = budget or BlockBudget()
        self.template = template or PromptTemplate()
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, and GCPO puts the candidates into the last user message: "
                "set actor_rollout_ref.model.custom_chat_template"
            )
        if self.budget.max_tokens < 1:
            raise ValueError(f"blocks.max_tokens is {self.budget.max_tokens}: a block must hold at least one token")
        self._encode = lru_cache(maxsize=1024)(self._encode_uncached)
        self._text_tokens = TextTokens(tokenizer)
        self._control_texts = control_texts(tokenizer)
        self._warned = False

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end or pad a response and are not part of its text."""
        ids = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        return frozenset(i for i in ids if i is not None)

    def frame(self, messages: Sequence[Mapping[str, Any]]) -> Frame:
        """Return the chat-templated question, split where the blocks are inserted: at the end of the last user message.

        The text of the messages is encoded as verl encodes plain prompts: if it spells a control token
        (``<|im_end|>``), the prompt contains that token. The first such question is reported in the log.

        Raises:
            ValueError: there is no user message, its content is empty or not text.
        """
        messages = copy.deepcopy([dict(message) for message in messages])
        users = [message for message in messages if message.get("role") == "user"]
        if not users:
            raise ValueError(f"the prompt has no user message (roles: {[m.get('role') for m in messages]})")
        content = users[-1].get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError("the last user message of the prompt is empty or is not plain text")
        self._warn_of_control_texts(messages)
        users[-1]["content"] = content + self.template.intro + _SPLIT + self.template.outro
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )
        head, split, tail = text.partition(_SPLIT)
        if not split:
            raise ValueError("the chat template drops the user's text, so candidates cannot be put into the prompt")
        return Frame(self._encode_uncached(head), self._encode_uncached(tail))

    def _warn_of_control_texts(self, messages: Sequence[Mapping[str, Any]]) -> None:
        texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
        spelled = next((control for control in self._control_texts if any(control in text for text in texts)), None)
        if spelled is None or self._warned:
            return
        self._warned = True
        notice(
            logger,
            f"a question contains the text {spelled!r}, which the tokenizer turns into a control token in every prompt "
            "of that question, as verl does in the plain prompt; the message may end there. Remove it from the data. "
            "(Reported once.)",
        )

    def text_ids(self, response_ids: Sequence[int]) -> list[int]:
        """Return the tokens of a response that are its text: all but the control tokens of the tokenizer and its chat
        template, which would end the user's turn in the middle of the prompt (see `gcpo.tokens.control_ids`)."""
        return self._text_tokens.keep(response_ids)

    def trim(self, response_ids: Sequence[int]) -> list[int]:
        """Return the part of a response for a block: no control tokens, at most ``budget.max_tokens`` tokens."""
        ids = self.text_ids(response_ids)
        limit = self.budget.max_tokens
        if self.budget.truncation == "answer":
            found = last_occurrence(self._text_tokens.decode, ids, _ANSWER)
            ids = ids[found[0] :] if found else ids
        if len(ids) > limit and self.budget.drop_think:
            ids = self._without_thinking(ids)
        if len(ids) > limit:
            ids = ids[:limit] if self.budget.truncation == "keep_start" else ids[-limit:]
        return ids

    def _without_thinking(self, ids: list[int]) -> list[int]:
        """Return the tokens after the last ``</think>``; all of ``ids`` if these are only white space or missing."""
        decode = self._text_tokens.decode
        found = last_occurrence(decode, ids, _THINK_END)
        if found is None:
            return ids
        start, end = found
        in_last_token = decode(ids[start:end]).rpartition(_THINK_END)[2].strip()
        rest = ids[end - 1 :] if in_last_token else ids[end:]
        return rest if in_last_token or decode(rest).strip() else ids

    def candidate_block(self, k: int, response_ids: Sequence[int]) -> list[int]:
        """Return the block of response ``k``; its label identifies the response, not the position of the block."""
        return list(self._encode(self.template.candidate.format(label=k + 1))) + self.trim(response_ids)

    def collider_block(self, response_ids: Sequence[int]) -> list[int]:
        """Return the block of a collider draw."""
        return list(self._encode(self.template.collider)) + self.trim(response_ids)

    @staticmethod
    def join(frame: Frame, blocks: Sequence[Sequence[int]]) -> list[int]:
        """Return the prompt ``head + blocks + tail``."""
        return [*frame.head, *(token for block in blocks for token in block), *frame.tail]

    def group(
        self,
        messages: Sequence[Mapping[str, Any]],
        responses: Sequence[Sequence[int]],
        *,
        draws: int = 1,
        permutation: Sequence[int] | None = None,
        leaves: Collection[int] | None = None,
    ) -> GroupPrompts:
        """Return the prompts of one group.

        Args:
            messages: the question as chat messages.
            responses: token ids of the n >= 2 responses, by index.
            draws: number of collider draws; see `leave_one_out_plan`, also for ``permutation`` and ``leaves``.

        Raises:
            ValueError: `leave_one_out_plan` or `frame` refuses its arguments.
        """
        blocks = tuple(tuple(self.candidate_block(k, ids)) for k, ids in enumerate(responses))
        lengths = [len(block) for block in blocks]
        plan = leave_one_out_plan(len(blocks), draws, lengths=lengths, permutation=permutation, leaves=leaves)
        return GroupPrompts(self.frame(messages), blocks, plan)

    def max_label_tokens(self, n: int) -> int:
        """Return the number of tokens of the longest block label in a group of ``n``."""
        labels = [self.template.candidate.format(label=k + 1) for k in range(n)] + [self.template.collider]
        return max(len(self._encode(label)) for label in labels)


@dataclass(frozen=True)
class GroupPrompts:
    """The prompts of one group, which use one plan.

    Attributes:
        frame: head and tail of the question.
        candidates: block of every response, by index.
        plan: the order of the blocks.
    """

    frame: Frame
    candidates: tuple[tuple[int, ...], ...]
    plan: LeaveOneOutPlan

    def collider_prompt(self) -> list[int]:
        """Return the prompt of a shared collider draw: the question and all n responses."""
        return CandidatePrompts.join(self.frame, [self.candidates[k] for k in self.plan.collider_order()])

    def leave_one_out_prompt(self, i: int) -> list[int]:
        """Return the prompt of a leave-one-out collider draw y_n^(i): the question and every response but ``i``."""
        return CandidatePrompts.join(self.frame, [self.candidates[k] for k in self.plan.candidate_order(i)])

    def context(self, i: int, slot: int, collider: Sequence[int], replaced: Sequence[int] | None = None) -> list[int]:
        """Return the prompt x_{i,l}: the question, every response but ``i``, and the block of one collider draw.

        Args:
            i: the response that is left out.
            slot: l, the index of the draw in the plan.
            collider: the block of the draw.
            replaced: the block of y_n if ``reference.collider_context`` is ``append``: it then stands before
                the block of the draw instead of being replaced by it.
        """
        blocks: list[Sequence[int]] = []
        for kind, index in self.plan.orders[i][slot]:
            if kind == "candidate":
                blocks.append(self.candidates[index])
            else:
                blocks.extend([collider] if replaced is None else [replaced, collider])
        return CandidatePrompts.join(self.frame, blocks)
