"""The embedded task and its warm-started model: what the files hold, and that making them again changes nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.arithmetic import task as arithmetic
from examples.arithmetic import warm_start
from examples.arithmetic.task import (
    LEVELS,
    OPERATIONS,
    NoisySolver,
    PrepError,
    Question,
    draw_question,
    held_out,
    parse_question,
    work_out,
)
from examples.arithmetic.training_data import Arithmetic, Example, Recipe, collate, make_batches, make_examples
from examples.arithmetic.warm_start import make_model, make_tokenizer
from gcpo.collider.prompts import CandidatePrompts, PromptTemplate
from gcpo.rewards import compute_score

FEW = Recipe(hidden_size=32, intermediate_size=48, layers=1, heads=1, plain_examples=40, candidate_examples=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    assert arithmetic.main(["--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(Recipe())


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm start of a few steps."""
    folder = tmp_path_factory.mktemp("models") / "warm"
    warm_start.warm_start(data, folder, FEW)
    return folder


def rows(data: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(data / f"{split}.parquet").to_pylist()


def asked(row: dict[str, Any]) -> Question:
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return parse_question(message["content"])


# The questions


@pytest.mark.parametrize(("split", "count"), [("train", 4096), ("test", 600)])
def test_the_rows_have_verls_schema(data: Path, split: str, count: int) -> None:
    table = rows(data, split)
    assert len(table) == count
    for index, row in enumerate(table):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert (row["data_source"], row["ability"]) == ("gcpo/arithmetic", "math")
        question = asked(row)
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(question.answer)}
        assert row["extra_info"] == {"index": index, "level": question.level, "split": split}


@pytest.mark.parametrize("split", ["train", "test"])
def test_levels_and_operations_are_balanced(data: Path, split: str) -> None:
    counts = Counter((q.level, q.operation) for q in map(asked, rows(data, split)))
    assert set(counts) == {(level, operation) for level in LEVELS for operation in OPERATIONS}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_exercise_stands_twice(data: Path) -> None:
    train, test = ([asked(row).key for row in rows(data, split)] for split in ("train", "test"))
    assert len({*train, *test}) == len(train) + len(test)


def test_a_sum_is_the_same_exercise_with_its_operands_swapped() -> None:
    assert Question(1, "+", 47, 86).key == Question(1, "+", 86, 47).key
    assert Question(1, "-", 86, 47).key != Question(1, "+", 86, 47).key


def test_the_right_solution_of_every_row_is_graded_right_and_needs_a_carry(data: Path) -> None:
    for row in rows(data, "train") + rows(data, "test"):
        solution = work_out(asked(row))
        truth = row["reward_model"]["ground_truth"]
        assert solution.right and any(solution.carries)
        assert compute_score(row["data_source"], solution.text, truth)["score"] == 1.0
        assert compute_score(row["data_source"], solution.text, str(int(truth) + 1))["score"] == 0.0


def test_the_same_bytes_every_time(data: Path, tmp_path: Path) -> None:
    arithmetic.prepare(tmp_path)
    for name in ("train.parquet", "test.parquet"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]


def test_the_held_out_questions_do_not_depend_on_the_size_of_the_training_set(data: Path, tmp_path: Path) -> None:
    arithmetic.prepare(tmp_path, train_size=10)
    assert (tmp_path / "test.parquet").read_bytes() == (data / "test.parquet").read_bytes()
    arithmetic.prepare(tmp_path, train_size=10, seed=1)
    assert (tmp_path / "test.parquet").read_bytes() != (data / "test.parquet").read_bytes()


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (Question(2, "+", 482, 319), r"2+9=11 8+1+1=10 4+3+1=8 \boxed{801}"),
        (Question(2, "+", 999, 999), r"9+9=18 9+9+1=19 9+9+1=19 \boxed{1998}"),
        (Question(1, "-", 82, 47), r"12-7=5 8-4-1=3 \boxed{35}"),
        (Question(3, "-", 2000, 1999), r"10-9=1 10-9-1=0 10-9-1=0 2-1-1=0 \boxed{1}"),
    ],
)
def test_worked_solutions(question: Question, text: str) -> None:
    assert work_out(question).text == text


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (Question(2, "+", 482, 319), r"2+9=11 8+1=9 4+3=7 \boxed{791}"),
        (Question(1, "-", 82, 47), r"12-7=5 8-4=4 \boxed{45}"),
    ],
)
def test_a_forgotten_carry_is_missing_from_the_column_and_the_result(question: Question, text: str) -> None:
    solution = work_out(question, keeps=lambda column: False)
    assert solution.text == text and not solution.right and not any(solution.carries)


def test_a_reminded_solver_forgets_less() -> None:
    rng = random.Random(0)
    solver = NoisySolver(forget_carry=0.6, forget_borrow=0.6, miscount=0.0)
    columns = frozenset(range(4))
    drawn = [draw_question(rng, 2, "-") for _ in range(400)]
    alone, reminded = (
        sum(solver.solve(question, rng, seen).right for question in drawn) for seen in (frozenset(), columns)
    )
    assert alone < 0.5 * len(drawn) < 0.85 * len(drawn) < reminded


def test_questions_are_read_back() -> None:
    for question in held_out(60):
        assert parse_question(question.text) == question
    with pytest.raises(ValueError):
        parse_question("What is 3 * 4?")


@pytest.mark.parametrize("option", ["--train-size", "--test-size"])
@pytest.mark.parametrize("size", ["0", "-3"])
def test_sizes_must_be_positive(option: str, size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arithmetic.main(["--output", str(tmp_path / "new"), option, size]) == 2
    assert_one_sentence(capsys, "positive")
    assert not (tmp_path / "new").exists()


def test_more_questions_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arithmetic.main(["--output", str(tmp_path / "new"), "--train-size", "40000"]) == 2
    assert_one_sentence(capsys, "ask for fewer")


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert arithmetic.main(["--output", str(taken)]) == 2
    assert_one_sentence(capsys, str(taken))
    assert taken.read_text() == "mine"


def assert_one_sentence(capsys: pytest.CaptureFixture[str], part: str) -> None:
    error = capsys.readouterr().err
    assert part in error and len(error.strip().splitlines()) == 1


# The tokenizer


@pytest.mark.parametrize(
    "text",
    ["What is 482 + 319?", r"2+9=11 8+1+1=10 \boxed{80}", "Grüße, 日本語 🙂\n\ttabs  and   spaces", "\x00\x7f", ""],
)
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_is_small_and_knows_its_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) < 400
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for name in ("<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(name, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(name)]


def test_a_digit_is_a_token(tokenizer: Any) -> None:
    digits = tokenizer.encode("0123456789", add_special_tokens=False)
    assert len(set(digits)) == 10
    assert [i for i in tokenizer.encode("9+13=22", add_special_tokens=False) if i in digits] == [
        digits[i] for i in (9, 1, 3, 2, 2)
    ]


def test_the_fixed_texts_are_a_handful_of_tokens(tokenizer: Any) -> None:
    template = PromptTemplate()
    for text in (template.intro, template.candidate.format(label=8), template.collider, template.outro):
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= 8
    question = held_out(3)[2]
    assert len(tokenizer.encode(question.text, add_special_tokens=False)) <= 20
    assert len(tokenizer.encode(work_out(question).text, add_special_tokens=False)) < 48


def test_the_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 47 + 86?"}]
    opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert opened == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 47 + 86?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert opened.startswith(tokenizer.apply_chat_template(messages, tokenize=False))


def test_the_tokenizer_is_the_same_every_time(tokenizer: Any) -> None:
    assert make_tokenizer(Recipe()).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


# The examples


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> tuple[list[Example], list[Example]]:
    recipe = replace(Recipe(), plain_examples=300, candidate_examples=300)
    plain, candidates = make_examples(recipe, tokenizer, {question.key for question in held_out()}, Arithmetic(recipe))
    return plain, candidates


def test_no_example_is_about_a_held_out_question(tokenizer: Any, examples: tuple[list[Example], ...]) -> None:
    taken = {question.key for question in held_out()}
    for example in [*examples[0], *examples[1]]:
        text = tokenizer.decode(example.prompt)
        assert parse_question(text[text.index("What is") : text.index("?") + 1]).key not in taken


def test_examples_with_candidates_are_prompts_of_the_rollout(
    tokenizer: Any, examples: tuple[list[Example], ...]
) -> None:
    prompts, template = CandidatePrompts(tokenizer), PromptTemplate()
    blocks: Counter[int] = Counter()
    joint = right = wrong = 0
    for example in examples[1]:
        text = tokenizer.decode(example.prompt)
        question = parse_question(text[text.index("What is") : text.index("?") + 1])
        frame = prompts.frame([{"role": "user", "content": question.text}])
        assert tuple(example.prompt[: len(frame.head)]) == frame.head
        assert tuple(example.prompt[-len(frame.tail) :]) == frame.tail
        middle = tokenizer.decode(example.prompt[len(frame.head) : -len(frame.tail)])
        parts = middle.split("\n[")[1:]
        labels = [part.partition("]\n")[0] for part in parts]
        assert len(set(labels)) == len(labels) and len(parts) <= 8
        known = {template.collider, *(template.candidate.format(label=k) for k in range(1, 9))}
        assert {f"\n[{label}]\n" for label in labels} <= known
        blocks[len(parts)] += 1
        joint += "Joint answer" in labels
        for part in parts:
            if compute_score("", part, str(question.answer))["score"]:
                right += 1
            else:
                wrong += 1
    assert set(blocks) == set(range(1, 9))
    assert 0.3 < joint / len(examples[1]) < 0.7
    assert 0.2 < right / (right + wrong) < 0.9


def test_candidates_make_the_trained_answers_better(tokenizer: Any, examples: tuple[list[Example], ...]) -> None:
    def accuracy(of: list[Example]) -> float:
        graded = 0.0
        for example in of:
            text = tokenizer.decode(example.prompt)
            question = parse_question(text[text.index("What is") : text.index("?") + 1])
            assert example.response[-1] == tokenizer.eos_token_id
            graded += compute_score("", tokenizer.decode(example.response[:-1]), str(question.answer))["score"]
        return graded / len(of)

    assert accuracy(examples[0]) < 0.6 < 0.7 < accuracy(examples[1])


def test_batches_hold_every_example_once_within_the_budget(examples: tuple[list[Example], ...]) -> None:
    batches = make_batches([*examples[0], *examples[1]], 1024, random.Random(0))
    assert sorted(id(e) for batch in batches for e in batch) == sorted(id(e) for kind in examples for e in kind)
    assert all(len(batch) * max(e.size for e in batch) <= 1024 for batch in batches)


def test_the_loss_is_on_the_responses_alone() -> None:
    batch = collate([[Example([5, 6, 7], [8, 2]), Example([5], [9, 9, 2])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 9, 9, 2, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 2], [-100, 9, 9, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


# The model


def test_the_model_is_small_and_holds_eight_candidates(tokenizer: Any) -> None:
    model = make_model(Recipe(), tokenizer)
    assert model.num_parameters() < 3_000_000 and model.config.tie_word_embeddings
    assert model.config.hidden_size // model.config.num_attention_heads in {32, 64, 128}
    longest = max(len(tokenizer.encode(work_out(question).text)) for question in held_out())
    assert 9 * (longest + 16) + 64 < model.config.max_position_embeddings


def test_the_folder_loads_like_any_other(model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loaded, saved = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    messages = [{"role": "user", "content": "What is 47 + 86?"}]
    template = PromptTemplate()
    for text in (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        template.intro + template.candidate.format(label=3) + r"8+1+1=10 \boxed{0}" + template.outro,
    ):
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert saved.config.architectures == ["Qwen2ForCausalLM"] and saved.num_parameters() > 0
    assert {str(parameter.dtype) for parameter in saved.parameters()} == {"torch.float32"}
    assert GenerationConfig.from_pretrained(model).eos_token_id == tokenizer.eos_token_id


def test_a_second_call_does_nothing(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    capsys.readouterr()
    warm_start.warm_start(data, model, FEW)
    said = capsys.readouterr().out
    assert len(said.strip().splitlines()) == 1 and str(model) in said
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_the_same_recipe_makes_the_same_weights_and_another_one_others(data: Path, model: Path, tmp_path: Path) -> None:
    weights = {}
    for name, recipe in (("again", FEW), ("other", replace(FEW, seed=FEW.seed + 1))):
        warm_start.warm_start(data, tmp_path / "warm", recipe)
        assert json.loads((tmp_path / "warm" / "recipe.json").read_text())["hash"] == recipe.hash
        weights[name] = (tmp_path / "warm" / "model.safetensors").read_bytes()
    first = (model / "model.safetensors").read_bytes()
    assert weights["again"] == first != weights["other"]


def test_an_interrupted_run_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_start.warm_start(data, tmp_path / "warm", FEW)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warm_start.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "warm")]) == 2
    assert_one_sentence(capsys, "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.parquet").write_text("not parquet")
    assert warm_start.main(["--data", str(tmp_path), "--output", str(tmp_path / "warm")]) == 2
    assert_one_sentence(capsys, "test.parquet")


def test_questions_of_another_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"prompt": [[{"role": "user", "content": "Name a prime."}]]})
    pq.write_table(table, tmp_path / "test.parquet")
    assert warm_start.main(["--data", str(tmp_path), "--output", str(tmp_path / "warm")]) == 2
    assert_one_sentence(capsys, "examples.arithmetic.task")


def test_a_folder_of_somebody_else_is_not_replaced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert warm_start.main(["--data", str(data), "--output", str(tmp_path)]) == 2
    assert_one_sentence(capsys, str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_damaged_recipe_is_made_again(data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    warm_start.warm_start(data, tmp_path, FEW)
    assert json.loads((tmp_path / "recipe.json").read_text())["hash"] == FEW.hash


def test_a_model_folder_that_cannot_be_made(data: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(PrepError, match="taken"):
        warm_start.warm_start(data, tmp_path / "taken" / "warm", FEW)
