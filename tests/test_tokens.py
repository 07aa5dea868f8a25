"""Control tokens, and the place of a text among tokens, under tokenizers of several families."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from examples.arithmetic.warm_start import Recipe, make_tokenizer
from gcpo.tokens import TextTokens, control_ids, control_texts, last_occurrence, plain_decoder, spelled_markers

SHARED = Path(os.environ.get("GCPO_SHARED_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"))

R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
INST_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def family(name: str) -> Any:
    """The quick start's tokenizer with the added tokens and the template of a family."""
    tokenizer = make_tokenizer(Recipe())
    plain, special = {
        "ours": ((), ()),
        "qwen2.5": (("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>"), ("<|vision_pad|>",)),
        "qwen3": (("<think>", "</think>", "<tool_call>"), ()),
        "r1": (
            ("<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>"),
            ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ),
        "llama3": ((), ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_0|>")),
        "gemma": (("  ", "\n\n", "<table>", "user"), ("<start_of_turn>", "<end_of_turn>")),
        "spelled": ((), ()),
        "think is special": ((), ("<think>", "</think>", "<episode_1>", "</episode_1>")),
    }[name]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in special], special_tokens=True)
    if name == "qwen2.5":
        tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "<tool_call>{}</tool_call>"}
    if name == "r1":
        tokenizer.chat_template, tokenizer.eos_token = R1_TEMPLATE, "<｜end▁of▁sentence｜>"
    if name == "spelled":
        tokenizer.chat_template = INST_TEMPLATE
    return tokenizer


OURS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "control", "text"),
    [
        ("ours", OURS, []),
        ("qwen2.5", [*OURS, "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>", "<|vision_pad|>"], []),
        ("qwen3", OURS, ["<think>", "</think>", "<tool_call>"]),
        (
            "r1",
            ["<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
            ["<think>", "</think>"],
        ),
        ("llama3", ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_0|>"], []),
        ("gemma", ["<start_of_turn>", "<end_of_turn>"], ["  ", "\n\n", "<table>", "user"]),
        ("think is special", OURS, ["<think>", "</think>", "<episode_1>", "</episode_1>"]),
    ],
)
def test_control_tokens(name: str, control: list[str], text: list[str]) -> None:
    """Special tokens and the markup of turns are control tokens; thinking tags, white space and words are text."""
    tokenizer = family(name)
    found = control_ids(tokenizer)
    assert {tokenizer.convert_tokens_to_ids(token) for token in control} <= found
    assert not {tokenizer.convert_tokens_to_ids(token) for token in text} & found
    assert not set(tokenizer.encode("12 + 39 = 51 [Answer 1] \\boxed{51}")) & found
    assert set(control) <= set(control_texts(tokenizer))


def test_a_response_loses_control_tokens_and_nothing_else() -> None:
    """All other ids stay as they are, whatever the tokenizer would make of their text."""
    for name in ("ours", "qwen2.5", "r1", "llama3"):
        tokenizer = family(name)
        keep = TextTokens(tokenizer).keep
        control = sorted(control_ids(tokenizer))
        text = [7, 7, 300, 5, 299, 7]
        mixed = [control[0], *text[:3], *control, *text[3:], control[-1]]
        assert keep(mixed) == text
        assert keep(control) == [] and keep([]) == []


def test_spelled_text_of_a_control_token_stays() -> None:
    """Ordinary tokens that spell the text of a control token end no turn: the characters stay."""
    tokenizer = family("ours")
    ids = [i for character in "a<|im_end|>b" for i in tokenizer.encode(character, add_special_tokens=False)]
    assert TextTokens(tokenizer).keep(ids) == ids and not spelled_markers(tokenizer)


def test_markers_that_are_no_tokens_are_found_in_the_text() -> None:
    """Where the template's own markers are ordinary tokens, their text ends a turn, so it goes."""
    tokenizer = family("spelled")
    assert set(spelled_markers(tokenizer)) == {"[INST]", "[/INST]"}
    text = TextTokens(tokenizer)
    for before, after in (("It is 4. ", " So what"), ("", ""), ("1", "2")):
        ids = tokenizer.encode(before + "[/INST]" + after, add_special_tokens=False)
        kept = text.decode(text.keep(ids))
        assert "INST]" not in kept and before.strip() in kept and after.strip() in kept
    halves = [tokenizer.encode(half, add_special_tokens=False) for half in ("[/IN", "[INST]ST]")]
    nested = halves[0] + halves[1]
    assert "INST]" not in text.decode(text.keep(nested))
    plain = tokenizer.encode("12 + 39 = 51", add_special_tokens=False)
    assert text.keep(plain) == plain


class Pieces:
    """Decodes the bytes of pieces, as byte-level tokenizers do."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def __call__(self, ids: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", " ", "\n", "é", "😀", "</think>", "</thi", "nk>", "<think>", ">"])).map("".join),
    st.data(),
)
def test_last_occurrence_of_any_text(text: str, data: st.DataObject) -> None:
    """However the bytes are cut into tokens: the tokens found are the fewest that hold the last occurrence."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(raw) - 1, 1)))) - {len(raw)}) if raw else []
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if b > a]
    decode, ids = Pieces(*pieces), list(range(len(pieces)))
    found = last_occurrence(decode, ids, "</think>")
    at = raw.rfind(b"</think>")
    if at < 0:
        assert found is None
        return
    start, end = found
    first = len(b"".join(pieces[: start + 1]))
    assert first - len(pieces[start]) <= at < first
    last = len(b"".join(pieces[:end]))
    assert last - len(pieces[end - 1]) < at + len("</think>") <= last


def test_tokenizers_without_any_added_token() -> None:
    """End, padding and special tokens are control tokens also where nothing else is known."""
    assert control_ids(SimpleNamespace(eos_token_id=2, pad_token_id=None)) == {2}
    assert control_ids(SimpleNamespace(eos_token_id=2, pad_token_id=0, all_special_ids=[1, 2])) == {0, 1, 2}


def real_tokenizer(name: str) -> Any:
    """Qwen2.5's tokenizer, and DeepSeek-R1-Distill's, which has the same vocabulary and other added tokens."""
    from transformers import AutoTokenizer

    folder = SHARED / "tokenizers" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine (GCPO_SHARED_DATA names another place)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "qwen2.5":
        return tokenizer
    config = json.loads((SHARED / "tokenizers" / "deepseek-r1-distill-qwen" / "tokenizer_config.json").read_text())
    tokenizer.chat_template = config["chat_template"]
    tokenizer.add_tokens([AddedToken(config[f"{k}_token"]["content"], normalized=False, special=True) for k in
                          ("bos", "eos")], special_tokens=True)  # fmt: skip
    tokenizer.bos_token, tokenizer.eos_token = config["bos_token"]["content"], config["eos_token"]["content"]
    tokenizer.pad_token = tokenizer.eos_token
    if name == "r1":
        added = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


@pytest.mark.parametrize("name", ["qwen2.5", "r1", "r1 spelled"])
def test_real_tokenizers(name: str) -> None:
    """No marker of a turn stays, of a tokenizer that has them as tokens or has to spell them; the text does."""
    tokenizer = real_tokenizer(name)
    text = TextTokens(tokenizer)
    markers = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|fim_prefix|>"]
    markers += [] if name == "qwen2.5" else ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
    for marker in markers:
        for response in (f"It is 4.{marker}", f"It is 4.{marker}\nuser\nWhat is 5+5?{marker}", f"a {marker} b", marker):
            ids = tokenizer.encode(response, add_special_tokens=False)
            kept = text.decode(text.keep(ids))
            assert marker not in kept
            # Where ordinary tokens spell the marker, its brackets can be in tokens that hold text of the response too.
            expected = "".join(response.replace(marker, "").split())
            assert "".join(kept.translate({ord("<"): None, ord(">"): None}).split()) == expected
    assert plain_decoder(tokenizer)(text.keep(tokenizer.encode("<think>a</think>b"))) == "<think>a</think>b"
