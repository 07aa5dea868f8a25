"""The layout of episodes and their branches, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gcpo.scoring import BudgetError
from gcpo.scoring.branches import EpisodePack, EpisodeRequest, pack_requests


def request(**changes: Any) -> EpisodeRequest:
    """Two episodes that end at 1 and 3; the response's last token is outside."""
    values = {
        "prompt": torch.tensor([10, 11]),
        "response": torch.tensor([20, 21, 22, 23, 24]),
        "ends": (1, 3),
        "asked": (0, 1),
        "probe": torch.tensor([30]),
        "answers": (torch.tensor([40, 41]), torch.tensor([50])),
        "noise": torch.arange(8.0).view(2, 2, 2),
    }
    return EpisodeRequest(**{**values, **changes})


def seen(found: EpisodePack) -> list[list[int]]:
    """For every token of a row the tokens that it sees, itself last, with their positions checked."""
    pack = found.pack
    visible = []
    for node, path in enumerate(pack.paths):
        start, end = pack.spans[node]
        above = [i for ancestor in path[:-1] for i in range(*pack.spans[ancestor])]
        mask = pack.masks.get(node, torch.ones(end - start, end - start).tril())
        for row in range(end - start):
            places = above + [start + i for i in torch.nonzero(mask[row]).flatten().tolist()]
            assert pack.position_ids[places].tolist() == list(range(len(places)))
            visible.append(pack.token_ids[places].tolist())
    return visible


@pytest.mark.parametrize("fused_tokens", [0, 512])
def test_inject(fused_tokens: int) -> None:
    """Every branch begins with a copy of the episode's last token, at its position, and sees the prompt, what is before
    that token, the answer prompt and its own answer."""
    (found,) = pack_requests([request()], 4096, fused_tokens=fused_tokens)
    visible = seen(found)
    tokens = found.pack.token_ids
    assert len(found.pack) == 2 + 4 + 2 * 3 * (1 + 1 + 2 + 1) and found.path_tokens == 6
    assert [visible[i] for i in found.state_at] == [[10, 11], [10, 11, 20, 21], [10, 11, 20, 21, 22, 23]]
    before = [[10, 11, 20, 21], [10, 11, 20, 21, 22, 23]]
    assert [visible[i] for i in found.perturbed] == [b for b in before for _ in range(2)]
    assert found.noise.tolist() == request().noise.flatten(0, 1).tolist()
    expected = [[*b, 30, *answer] for b in before for _ in range(3) for answer in ([], [40], [])]
    assert [visible[i] for i in found.predict] == expected
    assert found.labels.tolist() == [40, 41, 50] * 6
    assert len({int(i) for i in found.state_at} & {int(i) for i in found.perturbed}) == 0
    assert int((tokens == 30).sum()) == 6 and len(found.pack.spans) == (2 if fused_tokens else 6)


@pytest.mark.parametrize("fused_tokens", [0, 512])
def test_head(fused_tokens: int) -> None:
    """One answer prompt after every episode; its last token is asked for the state as it is and every perturbation."""
    (found,) = pack_requests([request(answers=())], 4096, fused_tokens=fused_tokens)
    visible = seen(found)
    assert len(found.pack) == 2 + 4 + 2
    assert [visible[i] for i in found.predict] == [[10, 11, 20, 21, 30]] * 3 + [[10, 11, 20, 21, 22, 23, 30]] * 3
    assert found.perturbed.tolist() == [1, 2, 4, 5] and not len(found.labels)


def test_an_episode_of_one_token_at_the_beginning() -> None:
    """Its branches hang on the prompt."""
    (found,) = pack_requests([request(ends=(0,), asked=(0,), noise=torch.zeros(1, 1, 2))], 4096, fused_tokens=0)
    visible = seen(found)
    assert [visible[i] for i in found.perturbed] == [[10, 11, 20]]
    assert [visible[i] for i in found.state_at] == [[10, 11], [10, 11, 20]]


def test_requests_of_one_question_share_its_prompt() -> None:
    """A prompt stands once in a row; a response without episodes has the prompt's state alone; a subset branches."""
    other = request(prompt=torch.tensor([12]))
    none = request(ends=(), asked=(), noise=torch.zeros(0, 2, 2))
    part = request(asked=(1,), noise=torch.zeros(1, 2, 2))
    (found,) = pack_requests([request(), other, none, part], 4096)
    tokens = found.pack.token_ids.tolist()
    assert tokens.count(10) == 1 and tokens.count(12) == 1 and tokens.count(20) == 3
    assert found.requests == ((0, (0, 1)), (2, ()), (3, (1,)), (1, (0, 1)))
    visible = seen(found)
    assert [visible[i] for i in found.state_at][3:5] == [[10, 11], [10, 11]]


def test_a_budget() -> None:
    """No row exceeds it; what does not fit is asked in parts, whose last one has the states; all the branches of an
    episode stay together; one that cannot fit is an error in words."""
    whole = len(pack_requests([request()], 4096)[0].pack)
    rows = pack_requests([request(), request()], whole)
    assert [row.requests for row in rows] == [((0, (0, 1)),), ((1, (0, 1)),)]
    rows = pack_requests([request(), request()], whole - 1)
    assert max(len(row.pack) for row in rows) < whole
    assert [row.requests for row in rows] == [((0, (0,)),), ((0, (1,)),), ((1, (0,)),), ((1, (1,)),)]
    assert [len(row.state_at) for row in rows] == [0, 3, 0, 3]
    assert rows[0].noise.tolist() == request().noise[0].tolist() and rows[0].path_tokens == 4
    with pytest.raises(BudgetError, match="response 0 takes 6 tokens with its prompt and 15 more after an episode"):
        pack_requests([request()], 20)


def test_what_it_would_take_without_sharing() -> None:
    """Every (episode, perturbation, answer) a sequence of its own, and the response once more for its states."""
    assert request().unshared == 6 + 3 * (2 * (5 + 7) + 2 * 3)
    assert request(answers=()).unshared == 6 + 5 + 7
