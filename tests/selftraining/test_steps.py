"""Where responses are split into steps."""

from __future__ import annotations

import pytest

from gcpo.selftraining.steps import first_step, split


@pytest.mark.parametrize(
    ("pieces", "separator", "length"),
    [
        (["a", "b"], "\n\n", None),
        (["a", ".\n\n", "b"], "\n\n", 2),  # the token ends with the separator
        (["a", "\n", "\n", "b"], "\n\n", 3),  # the separator is two tokens
        (["a", "\n", "\nb", "c"], "\n\n", 2),  # a token goes on after the separator: it begins the next step
        (["8", "=", "8", " \\", "boxed"], " ", 3),
        ([" \\", "boxed"], " ", None),  # a separator before any other text
        (["\n\n", "a", "\n\n"], "\n\n", 3),
        (["\n\n", "\n\n", "a"], "\n\n", None),
        (["x y", "z", " ", "w"], " ", 3),  # one token with text on both sides of the separator is not cut
        ([], " ", None),
    ],
)
def test_first_step(pieces: list[str], separator: str, length: int | None) -> None:
    assert first_step(pieces, separator) == length


def test_split() -> None:
    """Columns of the embedded task; the last piece is the end of the response."""
    pieces = ["2", "+", "9", " ", "8", "+", "1", " \\", "boxed", "{9}", "<end>"]
    assert split(pieces, " ") == [4, 7, 11]
    assert split([], " ") == []


def test_short_steps_are_joined() -> None:
    """A separator before the fourth token ends no step, and neither does one inside of it."""
    pieces = ["a", "\n\n", "b", "c", "\n\nd", "e", "\n\n", "f"]
    assert split(pieces, "\n\n") == [2, 4, 7, 8]
    assert split(pieces, "\n\n", min_tokens=4) == [4, 8]
    assert split(pieces, "\n\n", min_tokens=5) == [7, 8]
    assert first_step(pieces, "\n\n", 8) is None


def test_the_rest_after_a_text_is_one_step() -> None:
    pieces = ["a", "\n\n", "b", "</think>", "\n\n", "c", "\n\n", "d"]
    assert split(pieces, "\n\n") == [2, 5, 7, 8]
    assert split(pieces, "\n\n", until="</think>") == [2, 5, 8]


def test_the_steps_of_the_embedded_model(tokenizer) -> None:
    """The tokens of a worked solution fall into its columns and the box."""
    text = "2+9=11 8+1+1=10 4+3+1=8 \\boxed{801}"
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text
    ends = [0, *split(pieces, " ")]
    steps = ["".join(pieces[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert [step.strip() for step in steps] == text.split(" ")
