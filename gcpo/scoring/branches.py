"""Packed rows of responses with questions that branch off after their episodes.

A response goes through the model once, up to the end of its last episode. After an episode that is asked about come
its branches, which share all earlier tokens: with ``hidden_state`` one per perturbation, which begins with a copy
of the episode's last token (the token whose state is perturbed), then the answer prompt, then every answer; with
``lm_head``, only the answer prompt.

The tree of these branches is known, so it is laid out directly. `gcpo.scoring.PrefixForest` would have to search it
among thousands of branches; its search for cuts takes time quadratic in their number, and each branch would be
one attention node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcpo.scoring.tree import BudgetError, TreePack

FUSED_TOKENS = 512
"""A response with its branches of at most this many tokens is one node of the attention, with a mask; a longer one has
one node per episode and one for the branches after it, because a mask grows quadratically."""


@dataclass(frozen=True)
class EpisodeRequest:
    """A request about one response.

    Attributes:
        prompt: token ids [P], P >= 1.
        response: token ids [T].
        ends: index in the response of the last token of every episode, ascending.
        asked: indices of the episodes that branch off.
        probe: token ids of the answer prompt, at least one.
        answers: token ids of the answers, none of them empty; no answers for ``lm_head``.
        noise: [len(asked), M, d], M >= 1: the perturbations after each episode in ``asked``.
        states: whether to return the states at the prompt's end and at ``ends``.
    """

    prompt: Tensor
    response: Tensor
    ends: tuple[int, ...]
    asked: tuple[int, ...]
    probe: Tensor
    answers: tuple[Tensor, ...]
    noise: Tensor
    states: bool = True

    @property
    def path(self) -> int:
        """Number of tokens of the response that go through the model."""
        last = len(self.ends) - 1 if self.states else max(self.asked, default=-1)
        return self.ends[last] + 1 if last >= 0 else 0

    @property
    def copies(self) -> int:
        """Number of copies of a state: 1 + M, the state itself and its perturbations."""
        return 1 + self.noise.shape[1]

    @property
    def branch(self) -> int:
        """Number of tokens after one episode."""
        if not self.answers:
            return len(self.probe)
        return self.copies * (1 + len(self.probe) + sum(map(len, self.answers)))

    @property
    def unshared(self) -> int:
        """Number of tokens of the branches and the path without sharing."""
        answers = [len(answer) for answer in self.answers] or [0]
        copies = self.copies if self.answers else 1
        probes = sum(len(self.prompt) + self.ends[k] + 1 + len(self.probe) for k in self.asked)
        return len(self.prompt) + self.path + copies * (len(answers) * probes + len(self.asked) * sum(answers))


@dataclass(frozen=True)
class EpisodePack:
    """Requests, or parts of requests, in one row.

    Attributes:
        pack: the row.
        requests: the requests in this row, with the episodes that branch off in it.
        state_at: int64: the positions of the requested states, request after request.
        predict: int64: the positions of the requested logits. ``hidden_state``: those that predict ``labels``;
            ``lm_head``: the last token of the answer prompt, 1 + M times per episode.
        labels: int64, of the same length; empty for ``lm_head``.
        perturbed: int64 [J]. ``hidden_state``: the positions of the perturbed copies; ``lm_head``: indices into
            ``predict``.
        noise: [J, d].
        path_tokens: tokens of prompts and responses.
    """

    pack: TreePack
    requests: tuple[tuple[int, tuple[int, ...]], ...]
    state_at: Tensor
    predict: Tensor
    labels: Tensor
    perturbed: Tensor
    noise: Tensor
    path_tokens: int


def pack_requests(
    requests: Sequence[EpisodeRequest], budget: int, *, fused_tokens: int = FUSED_TOKENS
) -> list[EpisodePack]:
    """Pack requests into rows of at most ``budget`` tokens.

    Requests of one question share its prompt if they are in the same row. A request that is too long for a row is
    divided into parts with some of its episodes; all branches of an episode are in one row.

    Raises:
        BudgetError: a response with the branches of a single episode is longer than ``budget``.
    """
    parts: list[tuple[int, EpisodeRequest]] = []
    for i, request in enumerate(requests):
        parts += [(i, part) for part in _parts(i, request, budget)]
    parts.sort(key=lambda part: (part[1].prompt.tolist(), part[0]))
    rows: list[list[tuple[int, EpisodeRequest]]] = []
    size = 0
    for i, part in parts:
        alone = _size(part)
        shares = bool(rows) and torch.equal(rows[-1][-1][1].prompt, part.prompt)
        more = alone - len(part.prompt) if shares else alone
        if rows and size + more <= budget:
            rows[-1].append((i, part))
            size += more
        else:
            rows.append([(i, part)])
            size = alone
    return [_pack(row, fused_tokens) for row in rows]


def _size(request: EpisodeRequest) -> int:
    # A row of logits counts as a token.
    per_episode = max(request.branch, request.copies)
    return len(request.prompt) + request.path + len(request.asked) * per_episode


def _parts(number: int, request: EpisodeRequest, budget: int) -> list[EpisodeRequest]:
    """Return the request, or parts that fit into a row; the last part has the states."""
    if _size(request) <= budget:
        return [request]
    room = budget - len(request.prompt) - (request.ends[-1] + 1)
    at_once = room // max(request.branch, request.copies) if request.asked else 0
    if room < 0 or at_once < 1:
        raise BudgetError(
            f"response {number} takes {len(request.prompt) + request.ends[-1] + 1} tokens with its prompt and "
            f"{request.branch} more after an episode, a row holds {budget}"
        )
    starts = range(0, len(request.asked), at_once)
    return [
        EpisodeRequest(
            request.prompt,
            request.response,
            request.ends,
            request.asked[start : start + at_once],
            request.probe,
            request.answers,
            request.noise[start : start + at_once],
            request.states and start == starts[-1],
        )
        for start in starts
    ]


@dataclass(frozen=True)
class _Stretch:
    """Tokens inside a node that follow another stretch of the node (-1: its beginning)."""

    tokens: Tensor
    position: int
    after: int


class _Row:
    """A row under construction, whose stretches become the nodes of a pack."""

    def __init__(self) -> None:
        self.size = 0
        self.spans: list[tuple[int, int]] = []
        self.parents: list[int] = []
        self.masks: dict[int, Tensor] = {}
        self.tokens: list[Tensor] = []
        self.positions: list[Tensor] = []

    def node(self, parent: int, stretches: Sequence[_Stretch]) -> list[int]:
        """Add a node and return where each of its stretches begins in the row."""
        starts = []
        first = self.size
        for stretch in stretches:
            starts.append(self.size)
            self.tokens.append(stretch.tokens)
            self.positions.append(torch.arange(stretch.position, stretch.position + len(stretch.tokens)))
            self.size += len(stretch.tokens)
        if any(stretch.after != i - 1 for i, stretch in enumerate(stretches)):
            self.masks[len(self.spans)] = _mask(stretches)
        self.spans.append((first, self.size))
        self.parents.append(parent)
        return starts

    def pack(self) -> TreePack:
        return TreePack(
            (),
            torch.cat(self.tokens),
            torch.cat(self.positions),
            tuple(self.spans),
            tuple(self.parents),
            (),
            self.masks,
        )


def _mask(stretches: Sequence[_Stretch]) -> Tensor:
    """Return the mask of a node: a token sees earlier tokens of its stretch and the stretches that it follows."""
    sizes = [len(stretch.tokens) for stretch in stretches]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    mask = torch.zeros(ends[-1], ends[-1], dtype=torch.bool)
    for stretch, size, end in zip(stretches, sizes, ends, strict=True):
        if stretch.after >= 0:
            mask[end - size : end] = mask[ends[stretch.after] - 1]
        mask[end - size : end, end - size : end] = torch.ones(size, size, dtype=torch.bool).tril()
    return mask


@dataclass
class _Wanted:
    """Positions that are collected while a row is laid out."""

    states: list[int]
    predict: list[int]
    labels: list[Tensor]
    perturbed: list[int]
    noise: list[Tensor]


def _pack(parts: Sequence[tuple[int, EpisodeRequest]], fused_tokens: int) -> EpisodePack:
    row, wanted = _Row(), _Wanted([], [], [], [], [])
    path_tokens, prompt, root, start = 0, None, -1, 0
    for _, part in parts:
        if prompt is None or not torch.equal(prompt, part.prompt):
            prompt, root = part.prompt, len(row.spans)
            (start,) = row.node(-1, [_Stretch(prompt, 0, -1)])
            path_tokens += len(prompt)
        path_tokens += part.path
        if part.states:
            wanted.states.append(start + len(prompt) - 1)
        _lay_out(row, root, part, wanted, fused_tokens)
    noise = torch.cat(wanted.noise) if wanted.noise else torch.zeros(0, 1)
    return EpisodePack(
        row.pack(),
        tuple((i, part.asked) for i, part in parts),
        torch.tensor(wanted.states, dtype=torch.int64),
        torch.tensor(wanted.predict, dtype=torch.int64),
        torch.cat(wanted.labels) if wanted.labels else torch.zeros(0, dtype=torch.int64),
        torch.tensor(wanted.perturbed, dtype=torch.int64),
        noise,
        path_tokens,
    )


def _lay_out(row: _Row, root: int, part: EpisodeRequest, wanted: _Wanted, fused_tokens: int) -> None:
    """Add a response and its branches after its prompt's node."""
    stretches: list[_Stretch] = []
    nodes: list[range] = []
    pieces: list[tuple[int, int]] = []  # the stretches of the response and their first indices in it
    branches: list[range] = []
    tip, done = -1, 0
    for cut, k in [*((_cut(part, k), k) for k in part.asked), (part.path, None)]:
        if cut > done:
            stretches.append(_Stretch(part.response[done:cut], len(part.prompt) + done, tip))
            tip = len(stretches) - 1
            pieces.append((tip, done))
            nodes.append(range(tip, tip + 1))
            done = cut
        if k is not None:
            first = len(stretches)
            stretches += _branch(part, k, tip, first)
            branches.append(range(first, len(stretches)))
            nodes.append(branches[-1])
    if sum(len(stretch.tokens) for stretch in stretches) <= fused_tokens:
        nodes = [range(len(stretches))] if stretches else []

    starts: list[int] = []
    node_of: list[int] = []
    for members in nodes:
        above = stretches[members.start].after
        inside = [
            _Stretch(s.tokens, s.position, max(s.after - members.start, -1))
            for s in stretches[members.start : members.stop]
        ]
        starts += row.node(node_of[above] if above >= 0 else root, inside)
        node_of += [len(row.spans) - 1] * len(members)

    if part.states:
        at = 0
        for end in part.ends:
            while at + 1 < len(pieces) and pieces[at + 1][1] <= end:
                at += 1
            wanted.states.append(starts[pieces[at][0]] + end - pieces[at][1])
    for number, members in enumerate(branches):
        _want(part, number, starts[members.start : members.stop], wanted)


def _cut(part: EpisodeRequest, k: int) -> int:
    """Return where the branches of episode k leave the response: with ``hidden_state`` they copy its last token."""
    return part.ends[k] if part.answers else part.ends[k] + 1


def _branch(part: EpisodeRequest, k: int, tip: int, first: int) -> list[_Stretch]:
    """Return the stretches after episode k that follow stretch ``tip``, numbered from ``first``."""
    end = part.ends[k]
    position = len(part.prompt) + end
    if not part.answers:
        return [_Stretch(part.probe, position + 1, tip)]
    opening = torch.cat([part.response[end : end + 1], part.probe])
    found: list[_Stretch] = []
    for _ in range(part.copies):
        copy = first + len(found)
        found.append(_Stretch(opening, position, tip))
        found += [_Stretch(answer, position + len(opening), copy) for answer in part.answers]
    return found


def _want(part: EpisodeRequest, number: int, starts: Sequence[int], wanted: _Wanted) -> None:
    """Collect the positions of the ``number``-th requested episode, whose branches' stretches begin at ``starts``."""
    noise = part.noise[number]
    if not part.answers:
        last = starts[0] + len(part.probe) - 1
        wanted.perturbed += range(len(wanted.predict) + 1, len(wanted.predict) + part.copies)
        wanted.predict += [last] * part.copies
    else:
        per_copy = 1 + len(part.answers)
        for copy in range(part.copies):
            opening, *answers = starts[copy * per_copy : (copy + 1) * per_copy]
            if copy:
                wanted.perturbed.append(opening)
            for start, answer in zip(answers, part.answers, strict=True):
                wanted.predict += [opening + len(part.probe), *range(start, start + len(answer) - 1)]
                wanted.labels.append(answer)
    wanted.noise.append(noise)
