"""Relations of tokens to text: control tokens of a tokenizer, and the position of a text in token ids.

Token ids are never encoded again: the functions select some of the given ids, or locate them in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

_TAG_OF_A_RESPONSE = re.compile(r"</?(think|episode_\d+)>")
"""Some tokenizers have these as added or even special tokens. They structure a response and do not delimit turns."""
_PIPED = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>")
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\{[^{}\s]+\}")
_MARKER = re.compile(rf"{_PIPED.pattern}|\[/?[A-Z][A-Z_]+\]|<</?[A-Z]+>>")
_MOST_TOKENS_OF_A_CHARACTER = 8
"""A character has at most four bytes; a longer sequence of bytes is not a character."""


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Return ids of the control tokens of a tokenizer, which structure a conversation and are not part of its text.

    These are all tokens that the tokenizer calls special (end, padding, begin of a turn, ...), and the added tokens
    that it does not call special, but whose text has the form ``<|...|>`` or is a markup of the chat template
    (``<｜User｜>`` of DeepSeek-R1, ``<tool_call>`` of Qwen2.5). Added tokens of white space or plain words, and the
    tags ``<think>`` and ``<episode_k>`` with their closing tags, are text.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """
    template = _template_text(tokenizer)
    ends = [getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")]
    ids = {int(i) for i in [*ends, *getattr(tokenizer, "all_special_ids", ())] if i is not None}
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        text = str(token).strip()
        written = _PIPED.fullmatch(text) or (_MARKUP.fullmatch(text) and text in template)
        if getattr(token, "special", False) or written:
            ids.add(int(token_id))
        if _TAG_OF_A_RESPONSE.fullmatch(text):
            ids.discard(int(token_id))
    return frozenset(ids)


def control_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts that become control tokens when a text is encoded, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {str(added[i]) for i in control_ids(tokenizer) if i in added}
    return tuple(sorted((text for text in texts if text.strip()), key=lambda text: (-len(text), text)))


def spelled_markers(tokenizer: Any) -> tuple[str, ...]:
    """Markers of the chat template that are not added tokens, so that ordinary tokens spell them.

    Such a marker delimits turns wherever its text occurs (``[INST]`` if it is not a token of the tokenizer).
    Markers that are added tokens are excluded, because ordinary tokens that spell their text delimit nothing.
    """
    added = {str(token).strip() for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return tuple(sorted({m for m in _MARKER.findall(_template_text(tokenizer)) if m not in added}))


def _template_text(tokenizer: Any) -> str:
    """Return the source of the chat template, or of all templates if there are several."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template)


def plain_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return the tokenizer's ``decode`` with all tokens shown and white space unchanged."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


def last_occurrence(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> tuple[int, int] | None:
    """Return the tokens [start, end) that hold the last occurrence of ``text`` in the decoded ``ids``, or ``None``.

    The first and the last token may also hold characters before and after the text. The number of decodes grows
    with the logarithm of the number of tokens.

    Args:
        decode: see `plain_decoder`.
        ids: token ids.
        text: a non-empty ASCII text, which no part of a divided character can match.
    """
    if text not in decode(ids):
        return None
    start, behind = 0, len(ids)  # ids[start:] contain the text, ids[behind:] do not
    while behind - start > 1:
        middle = (start + behind) // 2
        start, behind = (middle, behind) if text in decode(ids[middle:]) else (start, middle)
    # One token can contain the text and the beginning of its next occurrence.
    number, end = decode(ids[start:]).count(text), start + 1
    while decode(ids[start:end]).count(text) < number:
        end += 1
    return start, end


class TokenReader:
    """Maps every token of a response to its characters, for any tokenizer that can decode.

    Token ids are decoded in a sliding window, so the ids are not changed and the time is linear.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = lru_cache(maxsize=1 << 18)(plain_decoder(tokenizer))

    def read(self, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the span [start, end) of characters of every token.

        Tokens that together form one character all have the span of that character.
        """
        ids, text, spans = list(ids), [], []
        at = prefix = read = 0
        for end in range(1, len(ids) + 1):
            before, after = self._decode(tuple(ids[prefix:read])), self._decode(tuple(ids[prefix:end]))
            unfinished = after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before)
            if unfinished and end < len(ids) and end - read < _MOST_TOKENS_OF_A_CHARACTER:
                continue
            piece = after[len(before) :]
            text.append(piece)
            spans += [(at, at + len(piece))] * (end - read)
            at += len(piece)
            prefix, read = read, end
        return "".join(text), spans


class TextTokens:
    """Removes the tokens of a response that structure a conversation, and keeps all others unchanged.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.control = control_ids(tokenizer)
        self.decode = plain_decoder(tokenizer)
        self._markers = spelled_markers(tokenizer)
        self._reader = TokenReader(tokenizer) if self._markers else None

    def keep(self, ids: Sequence[int]) -> list[int]:
        """Remove control tokens from ``ids``, and ordinary tokens that spell a marker of the chat template.

        A token with a part of such a marker and other text stays, so that no text is lost, unless all tokens of
        the marker are of this kind, in which case all are removed.
        """
        kept = [int(token) for token in ids if int(token) not in self.control]
        while self._markers and any(marker in self.decode(kept) for marker in self._markers):
            rest = self._without_markers(kept)
            if len(rest) == len(kept):
                break
            # A removal can join the halves of another marker.
            kept = rest
        return kept

    def _without_markers(self, ids: list[int]) -> list[int]:
        assert self._reader is not None  # there are markers
        text, spans = self._reader.read(ids)
        left_out: set[int] = set()
        for match in re.finditer("|".join(map(re.escape, self._markers)), text):
            first, last = match.span()
            touching = [k for k, (start, end) in enumerate(spans) if start < last and end > first]
            outside = {k: text[spans[k][0] : first] + text[last : max(last, spans[k][1])] for k in touching}
            inside = [k for k in touching if not outside[k].strip()]
            left_out.update(inside or touching)
        return [token for k, token in enumerate(ids) if k not in left_out]
