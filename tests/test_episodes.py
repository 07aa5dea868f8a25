"""Episodes in characters and in tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcpo.episodes import EPISODE_PROMPT, split_response, split_text, token_spans
from gcpo.tokens import TokenReader


def texts(text: str, **options: Any) -> list[str]:
    return [text[start:end] for start, end in split_text(text, **options).spans]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("one\n\ntwo", ["one\n\n", "two"]),
        ("one\n \t\n\n two\nmore\n\n", ["one\n \t\n\n", " two\nmore\n\n"]),
        ("\n\none", ["\n\none"]),
        ("one", ["one"]),
        ("  ", ["  "]),
        ("", []),
    ],
)
def test_blank_lines(text: str, pieces: list[str]) -> None:
    """Every character is in one episode, and none holds white space alone if another is there."""
    assert texts(text) == pieces
    assert not split_text(text).tagged and not split_text(text).malformed


def test_tags() -> None:
    """What stands between tags, whatever stands around them; numbers may start anywhere and skip."""
    text = "Well. <episode_1>a\n\nb</episode_1> so <episode_3> c</episode_3> \\boxed{7}"
    assert texts(text) == ["a\n\nb", " c"]
    assert split_text(text).tagged and not split_text(text).malformed


@pytest.mark.parametrize(
    "text",
    [
        "<episode_1>a\n\nb",
        "<episode_1>a</episode_2>\n\nb",
        "<episode_1><episode_2>a</episode_2>\n\n</episode_1>",
        "<episode_2>a</episode_2>\n\n<episode_1>b</episode_1>",
        "<episode_1>a</episode_1>\n\n<episode_2> </episode_2>",
        "</episode_1>a\n\n<episode_1>b",
        "<episode_1>a</episode_1>\n\n<episode_x>b",
        "<Episode_1>a</episode_1>\n\nb",
    ],
)
def test_malformed_tags_fall_back_to_blank_lines(text: str) -> None:
    """Not closed, closed by another, nested, falling, empty, the wrong way round, without a number."""
    split = split_text(text)
    assert split.malformed and not split.tagged
    assert texts(text) == [text[: text.index("\n\n") + 2], text[text.index("\n\n") + 2 :]]


def test_at_most() -> None:
    """The last one holds the rest, with tags and without."""
    assert texts("a\n\nb\n\nc\n\nd", max_episodes=3) == ["a\n\n", "b\n\n", "c\n\nd"]
    tagged = "".join(f"<episode_{k}>{k}</episode_{k}>" for k in range(40))
    pieces = texts(tagged)
    assert len(pieces) == 30 and pieces[28] == "28"
    assert pieces[29].startswith("29</episode_29>") and pieces[29].endswith("39")
    assert len(texts("\n\n".join("abc" * 30))) == 30


def test_another_separator() -> None:
    """The embedded task has a column between two spaces."""
    assert texts("2+9=11 8+1=9 \\boxed{91}", separator=" ") == ["2+9=11 ", "8+1=9 ", "\\boxed{91}"]


def test_the_prompt_names_the_tags() -> None:
    """An example that is copied from it is well-formed."""
    assert split_text(EPISODE_PROMPT).tagged


class Toy:
    """Decodes token ids by a table."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **options: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def spans(*pieces: bytes, ends: tuple[int, ...] = (), **options: Any) -> list[tuple[int, int]]:
    found = split_response(range(len(pieces)), TokenReader(Toy(*pieces)), end_ids=ends, **options)
    assert found.ends == tuple(end - 1 for _, end in found.spans)
    return list(found.spans)


def test_tokens_that_straddle_a_boundary() -> None:
    """A token goes where most of its characters are; equally many: to the earlier; tags and end tokens are outside."""
    assert spans(b"one.", b"\n\n", b"two", b"</s>", ends=(3,)) == [(0, 2), (2, 3)]
    assert spans(b"one", b".\n\ntwo", b"x") == [(0, 2), (2, 3)], "3 of 6 characters: the earlier one"
    assert spans(b"one", b".\n\ntwoo", b"x") == [(0, 1), (1, 3)]
    assert spans(b"<epi", b"sode_1>ab", b"c</", b"episode_1>", b" so") == [(1, 3)]
    assert spans(b"a", b"\n\nb\n\nlong") == [(0, 1), (1, 2)], "an episode without a token of its own is left out"


def test_characters_of_several_tokens() -> None:
    """The tokens of one character stay together, and bytes that are no text take no time and break nothing."""
    ids, reader = range(5), TokenReader(Toy(b"a", b"\xe2", b"\x82", b"\xac", b"b"))
    assert reader.read(ids) == ("a\N{EURO SIGN}b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)])
    broken = [b"a\n\n", *[b"\x82"] * 100, b"b"]
    text, offsets = TokenReader(Toy(*broken)).read(range(len(broken)))
    assert len(offsets) == len(broken) and offsets[-1][1] == len(text) and text.endswith("b")
    assert spans(*broken) == [(0, 1), (1, 102)]
    assert spans(b"a", b"\xe2\x82") == [(0, 2)]


def test_responses_without_content() -> None:
    """A response of at least one token has an episode, an empty one has none."""
    assert spans() == []
    assert spans(b"</s>", ends=(0,)) == [(0, 1)]
    assert spans(b" ", b"\n", b"</s>", ends=(2,)) == [(0, 2)]
    assert spans(b"", b"", b"</s>", ends=(2,)) == [(0, 2)]


def test_index() -> None:
    """-1 outside, also beyond the last token."""
    found = split_response(range(3), TokenReader(Toy(b"a\n\n", b"b", b"</s>")), end_ids=(2,))
    assert found.index(5) == [0, 1, -1, -1, -1]


def test_empty_tokens_belong_to_what_they_follow() -> None:
    """A token without characters does not open an episode."""
    assert token_spans([(0, 3), (3, 5)], [(0, 3), (3, 3), (3, 5)]) == [(0, 2), (2, 3)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", " ", "\n", "\n\n", "<episode_1>", "</episode_1>", "é", "😀", "\\boxed{1}"])).map(
        "".join
    ),
    st.data(),
)
def test_any_tokens_of_any_text(text: str, data: st.DataObject) -> None:
    """However the bytes are cut into tokens: offsets tile the text, and spans are in order, disjoint and not empty."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(raw) - 1, 1)))) - {len(raw)}) if raw else []
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if b > a]
    found, offsets = TokenReader(Toy(*pieces)).read(range(len(pieces)))
    assert found == text and len(offsets) == len(pieces)
    edges = list(dict.fromkeys(offsets))
    assert [a for a, _ in edges] == [0, *(b for _, b in edges)][: len(edges)]
    episodes = spans(*pieces)
    assert bool(episodes) == bool(pieces)
    flat = [place for span in episodes for place in span]
    assert flat == sorted(flat) and all(a < b for a, b in episodes)


def test_a_real_tokenizer(tokenizer: Any) -> None:
    """The text is what the tokenizer decodes, and the ids are the ones that were given, not those it would make."""
    text = "2+9=11\n\n8+1+1=10 \\boxed{801}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    reader = TokenReader(tokenizer)
    found, offsets = reader.read([*ids, tokenizer.eos_token_id])
    assert found == tokenizer.decode([*ids, tokenizer.eos_token_id])
    assert [found[a:b] for a, b in offsets[:4]] == ["2", "+", "9", "="]
    digits = [i for character in text for i in tokenizer.encode(character, add_special_tokens=False)]
    assert digits != ids
    split = split_response(digits, reader, end_ids={tokenizer.eos_token_id})
    (_, first), (second, last) = split.spans
    assert tokenizer.decode(digits[:first]) == "2+9=11\n\n" and (second, last) == (first, len(digits))


def test_tags_whose_tokens_merge_with_their_neighbours() -> None:
    """Tags are found in the text: no token has to begin or end with them."""
    from tokenizers import AddedToken

    from examples.arithmetic.warm_start import Recipe, make_tokenizer

    merging = make_tokenizer(Recipe())
    merged = [">2", ">\n\n", " <", "1</", ">9", "1>2"]
    merging.add_tokens([AddedToken(token, normalized=False) for token in merged])
    text = "<episode_1>2+9=11</episode_1>\n\n<episode_2>9+1=10</episode_2> \\boxed{101}"
    ids = merging.encode(text, add_special_tokens=False)
    pieces = [merging.decode([token]) for token in ids]
    assert {"1>2", "1</", ">9", ">\n\n"} <= set(pieces)
    split = split_response(ids, TokenReader(merging))
    assert split.tagged and not split.malformed
    assert ["".join(pieces[a:b]) for a, b in split.spans] == ["1>2+9=11</", ">9+1=10"]
