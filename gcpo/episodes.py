"""Splitting a response into episodes, in characters and in the response's own tokens; and the settings of it.

It needs neither torch nor verl.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pydantic import field_validator

from gcpo.settings import Count, Settings
from gcpo.tokens import TokenReader

BLANK_LINES = r"\n\s*\n"
EPISODE_PROMPT = (
    "\n\nWrite every step of your reasoning between tags of its own, numbered from 1: "
    "<episode_1>first step</episode_1>, <episode_2>second step</episode_2> and so on. "
    "Put the final answer in \\boxed{} after the last tag."
)
"""What a user's message ends with so that the response has tags (``data.episode_prompt``)."""

_TAG = re.compile(r"<(/?)episode_(\d+)>")
_LOOKS_LIKE_A_TAG = re.compile(r"</?episode", re.IGNORECASE)


class EpisodesConfig(Settings):
    """How a response is split."""

    separator: str = BLANK_LINES
    """Regular expression of what stands between two episodes where a response has no tags: blank lines."""
    max_episodes: Count = 30
    """A response with more has the rest in its last one."""

    @field_validator("separator")
    @classmethod
    def _splits(cls, separator: str) -> str:
        try:
            matches_nothing = re.compile(separator).match("") is not None
        except re.error as error:
            raise ValueError(f"it is not a regular expression ({error})") from error
        if matches_nothing:
            raise ValueError("it also matches nothing at all; make it longer")
        return separator


@dataclass(frozen=True)
class Split:
    """Episodes of a text as spans [start, end) of characters; ``malformed``: it has tags that do not pair up."""

    spans: tuple[tuple[int, int], ...]
    tagged: bool
    malformed: bool


@dataclass(frozen=True)
class Episodes:
    """Episodes of a response as spans [start, end) of its tokens; see `Split`."""

    spans: tuple[tuple[int, int], ...]
    tagged: bool
    malformed: bool

    def index(self, length: int) -> list[int]:
        """The episode of every token [length], -1 outside."""
        index = [-1] * length
        for k, (start, end) in enumerate(self.spans):
            index[start:end] = [k] * (end - start)
        return index

    @property
    def ends(self) -> tuple[int, ...]:
        """The last token of every episode."""
        return tuple(end - 1 for _, end in self.spans)


def split_text(text: str, *, separator: str = BLANK_LINES, max_episodes: int = 30) -> Split:
    """Split a text by its tags ``<episode_k>...</episode_k>``, else at what ``separator`` matches.

    Tags count where every one that opens is closed by its own number before the next opens, numbers rise, and every
    episode holds more than white space. What follows the separator begins the next episode, so that without tags every
    character is in one. Where there are more than ``max_episodes``, the last one holds the rest.
    """
    tagged = _tagged_spans(text)
    malformed = tagged is None and _LOOKS_LIKE_A_TAG.search(text) is not None
    spans = tagged if tagged is not None else _separated_spans(text, separator)
    if len(spans) > max_episodes:
        spans = [*spans[: max_episodes - 1], (spans[max_episodes - 1][0], spans[-1][1])]
    return Split(tuple(spans), tagged is not None, malformed)


def _tagged_spans(text: str) -> list[tuple[int, int]] | None:
    """What stands between the tags, ``None`` where there are none or they do not pair up."""
    tags = list(_TAG.finditer(text))
    if not tags or len(tags) % 2 or len(tags) != len(_LOOKS_LIKE_A_TAG.findall(text)):
        return None
    spans, last = [], -1
    for opening, closing in zip(tags[::2], tags[1::2], strict=True):
        number = int(opening[2])
        if opening[1] or not closing[1] or int(closing[2]) != number or number <= last:
            return None
        if not text[opening.end() : closing.start()].strip():
            return None
        spans.append((opening.end(), closing.start()))
        last = number
    return spans


def _separated_spans(text: str, separator: str) -> list[tuple[int, int]]:
    starts = [0]
    for match in re.finditer(separator, text):
        # White space alone is no episode: it belongs to the one before, or at the beginning to the first.
        if match.end() > match.start() and text[starts[-1] : match.end()].strip() and text[match.end() :].strip():
            starts.append(match.end())
    return [(start, end) for start, end in zip(starts, [*starts[1:], len(text)], strict=True) if end > start]


def token_spans(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of tokens from spans of characters.

    A token that straddles a boundary belongs to the episode that most of its characters are in, to the earlier of two
    with equally many; one without characters belongs where the token before it does. An episode that gets no token is
    left out.

    Args:
        spans: episodes, in order, as spans of characters.
        offsets: the span of characters of every token.
    """
    owner, first = [], 0
    for start, end in offsets:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        best, most = (owner[-1] if owner and end == start else -1), 0
        k = first
        while k < len(spans) and spans[k][0] < end:
            shared = min(end, spans[k][1]) - max(start, spans[k][0])
            if shared > most:
                best, most = k, shared
            k += 1
        owner.append(best)
    found: dict[int, tuple[int, int]] = {}
    for token, k in enumerate(owner):
        if k >= 0:
            found[k] = (found.get(k, (token, token))[0], token + 1)
    return [found[k] for k in sorted(found)]


def texts_of(ids: Sequence[int], index: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return the text of every episode.

    Args:
        ids: token ids of a response.
        index: the episode of every token; see `Episodes.index`.
        decode: see `gcpo.tokens.plain_decoder`.
    """
    pairs = list(zip(ids, index, strict=True))
    return [decode([token for token, k in pairs if k == episode]) for episode in range(max(index, default=-1) + 1)]


def split_response(
    ids: Sequence[int],
    reader: TokenReader,
    *,
    end_ids: Collection[int] = (),
    separator: str = BLANK_LINES,
    max_episodes: int = 30,
) -> Episodes:
    """The episodes of a response.

    End tokens at its end are outside; a response of at least one token has at least one episode.

    Args:
        ids: the response's own token ids.
        reader: of the tokenizer that they are from.
        end_ids: end and padding tokens.
        separator: see `split_text`.
        max_episodes: see `split_text`.
    """
    ids = list(ids)
    length = len(ids)
    while length and ids[length - 1] in end_ids:
        length -= 1
    text, offsets = reader.read(ids[:length])
    split = split_text(text, separator=separator, max_episodes=max_episodes)
    spans = token_spans(split.spans, offsets)
    if not spans and ids:
        spans = [(0, length or len(ids))]
    return Episodes(tuple(spans), split.tagged, split.malformed)
