"""Prompts with candidates, built by joining token ids."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from examples.arithmetic.warm_start import Recipe, make_tokenizer
from gcpo.collider.plan import leave_one_out_plan
from gcpo.collider.prompts import BlockBudget, CandidatePrompts, GroupPrompts, PromptTemplate

QUESTION = [{"role": "user", "content": "What is 12 + 39?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(Recipe())


def contains(sequence: list[int], piece: list[int]) -> int:
    return sum(sequence[i : i + len(piece)] == piece for i in range(len(sequence) - len(piece) + 1))


def test_frame_is_the_chat_template_with_the_blocks_cut_out(tokenizer) -> None:
    """Head and tail around nothing decode to the question with intro and outro."""
    prompts = CandidatePrompts(tokenizer)
    frame = prompts.frame([{"role": "system", "content": "Be brief."}, *QUESTION])
    text = tokenizer.decode(prompts.join(frame, []))
    assert "Be brief." in text and "What is 12 + 39?" in text
    assert text.index("Other answers") < text.index("Write your own answer.") < text.index("assistant")


def test_where_the_blocks_go(tokenizer) -> None:
    """Between intro and outro, in the last user message; the question itself is not changed."""
    question = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}, *QUESTION]
    before = [dict(message) for message in question]
    template = PromptTemplate(intro=" [intro]", outro=" [outro]")
    frame = CandidatePrompts(tokenizer, template=template).frame(question)
    assert question == before
    assert tokenizer.decode(frame.head).endswith("What is 12 + 39? [intro]")
    assert tokenizer.decode(frame.tail).startswith(" [outro]") and "First?" in tokenizer.decode(frame.head)


def test_the_template_gets_its_arguments() -> None:
    """What ``data.apply_chat_template_kwargs`` holds reaches the chat template."""
    tokenizer = make_tokenizer(Recipe())
    tokenizer.chat_template += "{% if enable_thinking %}{{ '<think>' }}{% endif %}"
    for value in (True, False):
        frame = CandidatePrompts(tokenizer, chat_template_kwargs={"enable_thinking": value}).frame(QUESTION)
        assert tokenizer.decode(frame.tail).endswith("<think>") == value


def test_a_block_is_the_same_tokens_wherever_it_stands(tokenizer) -> None:
    """Ids that no text would give survive: a response is never decoded and encoded again."""
    weird = [7, 7, 300, 5, 299, 7]
    responses = [weird, [9, 10, 11], [12, 13], [14]]
    prompts = CandidatePrompts(tokenizer)
    blocks = tuple(tuple(prompts.candidate_block(k, ids)) for k, ids in enumerate(responses))
    plan = leave_one_out_plan(4, 2, lengths=[len(b) for b in blocks], permutation=[2, 0, 3, 1])
    group = GroupPrompts(prompts.frame(QUESTION), blocks, plan)
    assert all(contains(group.collider_prompt(), list(block)) == 1 for block in blocks)
    collider = prompts.collider_block([21, 22])
    for i in range(4):
        for slot in range(2):
            context = group.context(i, slot, collider)
            assert [contains(context, list(block)) for block in blocks] == [int(k != i) for k in range(4)]
            assert contains(context, collider) == 1
        assert contains(group.leave_one_out_prompt(i), list(blocks[i])) == 0


def test_append_keeps_y_n_before_the_draw(tokenizer) -> None:
    """``collider_context: append`` puts y_{n,l} after y_n."""
    prompts = CandidatePrompts(tokenizer)
    blocks = tuple(tuple(prompts.candidate_block(k, [40 + k])) for k in range(3))
    group = GroupPrompts(prompts.frame(QUESTION), blocks, leave_one_out_plan(3, 2))
    first, second = prompts.collider_block([50]), prompts.collider_block([51])
    assert contains(group.context(0, 1, second, first), first + second) == 1


def test_labels_are_identities(tokenizer) -> None:
    """The label names the response, so it is the same in every prompt, and differs between responses."""
    prompts = CandidatePrompts(tokenizer)
    assert tokenizer.decode(prompts.candidate_block(4, [22])).strip().startswith("[Answer 5]")
    assert prompts.candidate_block(0, [22]) != prompts.candidate_block(1, [22])


def test_budget(tokenizer) -> None:
    """End tokens go; the end or the beginning stays."""
    end = tokenizer.eos_token_id
    keep_end = CandidatePrompts(tokenizer, BlockBudget(3))
    assert keep_end.trim([5, 6, 7, 8, end]) == [6, 7, 8]
    assert CandidatePrompts(tokenizer, BlockBudget(3, "keep_start")).trim([5, 6, 7, 8, end]) == [5, 6, 7]
    assert keep_end.trim([end]) == [] and keep_end.trim([5, end, end]) == [5]


def test_the_answer_alone(tokenizer) -> None:
    """``answer`` keeps what stands from the last boxed answer on; without one the end, as far as the budget goes."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    end = tokenizer.eos_token_id
    response = ids("1+1=2 \\boxed{2} 5+1=6 \\boxed{") + ids("6}")
    kept = CandidatePrompts(tokenizer, BlockBudget(50, "answer")).trim([*response, end])
    assert tokenizer.decode(kept).strip().startswith("\\boxed{") and kept == response[-len(kept) :]
    assert tokenizer.decode(kept).count("boxed") == 1 and "6}" in tokenizer.decode(kept)
    assert CandidatePrompts(tokenizer, BlockBudget(2, "answer")).trim(response) == kept[-2:]
    assert CandidatePrompts(tokenizer, BlockBudget(3, "answer")).trim([5, 6, 7, 8, end]) == [6, 7, 8]


def test_thinking_goes_first(tokenizer) -> None:
    """A response that does not fit loses its thinking part; one that never closes it keeps its end."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    answer = ids(" 5+1=6")
    long = ids("<think>1+1=2 2+2=4 3+3=6</think>") + answer
    prompts = CandidatePrompts(tokenizer, BlockBudget(len(answer)))
    assert prompts.trim(long) == answer
    assert CandidatePrompts(tokenizer, BlockBudget(len(long))).trim(long) == long
    unclosed = ids("<think>1+1=2 2+2=4 3+3=6")
    assert prompts.trim(unclosed) == unclosed[-len(answer) :]


CONTINUATIONS = [
    ("\n\n5+1=6", "5+1=6"),
    ("\n5+1=6", "5+1=6"),
    (" 5+1=6", " 5+1=6"),
    ("5+1=6", ">5+1=6"),
    ("**5+1=6**", "**5+1=6**"),
    ("$5+1$", ">$5+1$"),
    (". 5+1=6", ">. 5+1=6"),
    ("<b>5</b>", "><b>5</b>"),
    ("\n\n\n5+1=6", "\n5+1=6"),
    ("\u00e9", "\u00e9"),
]
"""What follows ``</think>``, and what a block then begins with: of a token that holds more than the tag's end, the text
stays, and white space goes."""


@pytest.fixture(scope="module")
def merging(tokenizer):
    """A tokenizer whose tokens cross the borders of tags, as those of Qwen2.5 do."""
    tokenizer = make_tokenizer(Recipe())
    merged = [">\n\n", ">\n", ">5", ">$", ">.", "><", "1</", " </", ".</"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in merged])
    return tokenizer


@pytest.mark.parametrize(("continuation", "kept"), CONTINUATIONS)
def test_the_end_of_thinking_is_found_in_the_text(merging, continuation: str, kept: str) -> None:
    """Whatever the last token of the tag merges with; the block is made of the response's own tokens."""
    response = merging.encode("<think>1+1=2 2+2=4 so 1</think>" + continuation, add_special_tokens=False)
    trimmed = CandidatePrompts(merging, BlockBudget(len(response) - 1)).trim(response)
    assert trimmed and trimmed == response[-len(trimmed) :]
    assert merging.decode(trimmed) == kept


def test_the_last_end_of_thinking_counts(merging) -> None:
    """As in the chat templates; without text behind the tag there is nothing else to show, and the end is kept."""
    prompts = CandidatePrompts(merging, BlockBudget(8))

    def trimmed(text: str) -> str:
        return merging.decode(prompts.trim(merging.encode(text, add_special_tokens=False)))

    long = "1+1=2 2+2=4 3+3=6 4+4=8"
    assert trimmed(f"<think>{long}</think>\n\n{long}</think>\n\n5+1=6") == "5+1=6"
    for nothing in ("", "\n\n", " \n"):
        assert trimmed(f"<think>{long}</think>{nothing}").strip().endswith("</think>")
    added = make_tokenizer(Recipe())
    added.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    response = added.encode(f"<think>{long}</think>\n\n5+1=6", add_special_tokens=False)
    assert added.decode(CandidatePrompts(added, BlockBudget(8)).trim(response)).strip() == "5+1=6"
    assert CandidatePrompts(added, BlockBudget(len(response))).trim(response) == response


def test_control_tokens_do_not_end_the_turn(tokenizer) -> None:
    """However many a response and a draw hold: every prompt has those of the chat template and no more."""
    end, start, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    prompts = CandidatePrompts(tokenizer)
    plain = prompts.join(prompts.frame(QUESTION), [])
    responses = [[22, end, 9, start, 30, end], [23, eos, 24], [end, 25], [end, end]]
    assert [prompts.trim(ids) for ids in responses] == [[22, 9, 30], [23, 24], [25], []]
    blocks = tuple(tuple(prompts.candidate_block(k, ids)) for k, ids in enumerate(responses))
    group = GroupPrompts(prompts.frame(QUESTION), blocks, leave_one_out_plan(4, 2))
    draw = prompts.collider_block([start, 26, end, 27, end])
    for prompt in (group.collider_prompt(), group.leave_one_out_prompt(0), group.context(1, 1, draw)):
        assert [prompt.count(token) for token in (end, start, eos)] == [plain.count(t) for t in (end, start, eos)]


def test_a_question_with_the_text_of_a_control_token(tokenizer, caplog) -> None:
    """It is encoded as in the plain prompt, where verl encodes it too, and reported once."""
    question = [{"role": "user", "content": "What does <|im_end|> mean?"}]
    prompts = CandidatePrompts(tokenizer)
    with caplog.at_level(logging.WARNING, logger="gcpo.collider.prompts"):
        frames = [prompts.frame(messages) for messages in (QUESTION, question, question)]
    assert [record.getMessage().count("'<|im_end|>'") for record in caplog.records] == [1]
    plain = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompts.join(frames[1], []).count(end) == plain.count(end) == 2


def test_errors(tokenizer) -> None:
    """No chat template, no user, nothing asked, no room: each is one sentence."""
    bare = SimpleNamespace(chat_template=None, eos_token_id=2, pad_token_id=0)
    with pytest.raises(ValueError, match="no chat template"):
        CandidatePrompts(bare)
    with pytest.raises(ValueError, match="at least one token"):
        CandidatePrompts(tokenizer, dataclasses.replace(BlockBudget(), max_tokens=0))
    prompts = CandidatePrompts(tokenizer)
    with pytest.raises(ValueError, match="no user message"):
        prompts.frame([{"role": "system", "content": "x"}])
    for content in ("", "  ", [{"type": "image"}]):
        with pytest.raises(ValueError, match="empty or is not plain text"):
            prompts.frame([{"role": "user", "content": content}])
