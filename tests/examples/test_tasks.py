"""The tasks: their questions, their solver with its errors, their rewards, and a tiny warm start."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from examples.arithmetic import warm_start
from examples.arithmetic.task import Question
from examples.arithmetic.warm_start import make_once
from examples.tasks.__main__ import main
from examples.tasks.arithmetic_hard import FORGET, REMINDED, ArithmeticHard, LongQuestion
from examples.tasks.base import SPLITS, Worked
from examples.tasks.code import INPUTS, LESS, MORE, OPERATIONS, OPPOSITE, Code, Function
from examples.tasks.code import work as written_function
from examples.tasks.complement import FACTS, Complement, Sum
from examples.tasks.contradict import Contradict, Expression
from examples.tasks.recipes import RECIPES, TASKS
from gcpo.checks.model import CPU_HEAD_SIZES
from gcpo.rewards import grade_many, grader_of, problem_of

SIZES = {"test": 30, "ood": 20, "train": 60}


@pytest.mark.parametrize("name", TASKS)
def test_the_questions_follow_from_the_seed(name: str) -> None:
    first, again = (TASKS[name]().splits(SIZES) for _ in range(2))
    assert first == again and first != TASKS[name]().splits(SIZES, seed=1)
    more = TASKS[name]().splits({**SIZES, "train": 90})
    assert more["test"] == first["test"] and more["ood"] == first["ood"]


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_two_splits(name: str) -> None:
    keys = [question.key for drawn in TASKS[name]().splits(SIZES).values() for question in drawn]
    assert len(set(keys)) == len(keys) == sum(SIZES.values())


def answer(solution: Worked) -> Any:
    """The part that is graded: errors of the working may cancel each other out."""
    if solution.text.startswith("```python"):
        scope: dict[str, Any] = {}
        exec(solution.text.strip("`").removeprefix("python"), scope)
        return [scope["f"](n) for n in INPUTS]
    return solution.text.partition(r"\boxed")[2]


@pytest.mark.parametrize("name", TASKS)
def test_right_solutions_are_rewarded_and_wrong_ones_not(name: str) -> None:
    task, rng = TASKS[name](), random.Random(0)
    rows, solutions, expected = [], [], []
    for question in task.splits(SIZES)["test"][: 10 if name == "code" else None]:  # each program has a sandbox
        right = task.right(question)
        for one in (right, *(task.candidate(question, rng, 1.0) for _ in range(4))):
            rows.append(task.row(question, 0, "test"))
            solutions.append(one.text)
            expected.append(float(answer(one) == answer(right)))
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    graded = grade_many(solutions, truths, [row["data_source"] for row in rows])
    assert [grades["score"] for grades in graded] == expected and expected.count(0.0) > len(rows) / 5
    assert problem_of(rows[0]["data_source"], truths[0]) is None


@pytest.mark.parametrize("name", TASKS)
def test_the_lengths_of_the_experiment(name: str, recipe_config: Callable[..., Any]) -> None:
    """Every question and every right response fits, those out of distribution too."""
    task, config = TASKS[name](), recipe_config(f"experiment={name}", name="gcpo_quickstart")
    tokenizer = warm_start.make_tokenizer(RECIPES[name], task)
    for question in chain(*task.splits(SIZES).values()):
        messages = [{"role": "user", "content": question.text}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert len(tokenizer.encode(asked)) <= config.data.max_prompt_length
        assert len(tokenizer.encode(task.right(question).text)) < config.data.max_response_length


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"complement"}))
def test_vllm_has_kernels_for_the_model(name: str) -> None:
    """docs/tasks.md says that ``complement`` does not train through verl on a CPU, and why."""
    recipe = RECIPES[name]
    assert recipe.hidden_size % recipe.heads == 0 and recipe.hidden_size // recipe.heads in CPU_HEAD_SIZES


def test_complement_by_hand() -> None:
    question = Sum(((4, 7), (3, 9)))
    assert question.text == "Add modulo ten: a four seven b three nine"
    assert Complement().right(question).text == r"\boxed{a four seven one b three nine two}"


def test_contradict_by_hand() -> None:
    question, task = Expression((8, 3), x=4, y=7, z=2, late=True), Contradict()
    assert question.text == "There are 8 pens and 3 cups. What is 4 + 7 * 2?"
    assert task.right(question).text == r"7*2=14 4+14=18 \boxed{18}" and task.truth(question) == "18"
    drawn = Counter(task.candidate(question, random.Random(seed), 1.0).text for seed in range(200))
    assert drawn[r"4+7=11 11*2=22 \boxed{22}"] > 40
    early = replace(question, late=False)
    assert early.text.endswith("7 * 2 + 4?") and task.right(early).text == r"7*2=14 14+4=18 \boxed{18}"


def test_code_by_hand() -> None:
    question, task = Function(((0, 7), (4, 4), (3, 9))), Code()
    assert question.text == "Write f(n): add 7, keep at most 4, take from 9"
    lines = ["```python", "def f(n):", "    n = n + 7", "    n = min(n, 4)", "    n = 9 - n", "    return n", "```"]
    assert task.right(question).text == "\n".join(lines)
    assert [question.value(n) for n in (-10, 0, 50)] == [12, 5, 5]
    wrong = written_function(question, (MORE, OPPOSITE, LESS)).text.splitlines()
    assert wrong[2:5] == ["    n = n + 8", "    n = max(n, 4)", "    n = 8 - n"]


def test_every_error_of_one_step_fails_a_test_of_code() -> None:
    for operation in range(len(OPERATIONS)):
        for k in (2, 5, 9):
            question = Function(((operation, k),))
            for error in (OPPOSITE, MORE, LESS):
                assert answer(written_function(question, (error,))) != answer(Code().right(question)), (operation, k)


def test_the_experiment_of_code_has_its_sandbox(recipe_config: Callable[..., Any]) -> None:
    """The rows are graded as programs; a program that breaks out of its function is wrong."""
    task, config = Code(), recipe_config("experiment=code", name="gcpo_quickstart")
    assert config.data.train_files == "data/code/train.parquet"
    row = task.row(task.splits(SIZES)["ood"][0], 0, "ood")
    truth, source = row["reward_model"]["ground_truth"], row["data_source"]
    assert grader_of(source, truth) == "code" and row["ability"] == "code"
    hostile = "```python\nimport os\nos._exit(0)\n```"
    assert grade_many([hostile], [truth], [source])[0]["score"] == 0.0


def test_most_candidates_of_contradict_agree_on_an_error() -> None:
    """The majority, and the joint answer that follows it, are right less often than a candidate."""
    task, rng = Contradict(), random.Random(0)
    right, joint = 0, 0
    for question in task.splits(SIZES | {"train": 400})["train"]:
        drawn = [task.candidate(question, rng, 1.0) for _ in range(8)]
        right += sum(one == task.right(question) for one in drawn)
        joint += task.joint(question, rng, drawn) == task.right(question)
    assert joint / 400 < right / 3200 - 0.03


def test_arithmetic_hard_by_hand() -> None:
    """A carry is forgotten at the rate of the module, and less often where a candidate applies it."""
    task, rng = ArithmeticHard(), random.Random(0)
    question = LongQuestion(Question(3, "+", 4821, 3190))
    right = task.right(question)
    assert question.text == "What is 4821 + 3190?" and right.parts == (0, 0, 1, 1)
    assert right.text == r"1+0=1 2+9=11 8+1+1=10 4+3+1=8 \boxed{8011}"
    alone = [task.candidate(question, rng, 1.0).parts[2] for _ in range(4000)]
    reminded = [task.joint(question, rng, [right]).parts[2] for _ in range(4000)]
    assert abs(sum(alone) / 4000 - (1 - FORGET["+"])) < 0.03 and abs(sum(reminded) / 4000 - (1 - REMINDED)) < 0.03
    assert LongQuestion(question.exercise, ood=True).text == "Please work out 4821 + 3190 now."


def test_sums_out_of_distribution_are_longer_and_in_other_words() -> None:
    splits = Complement().splits(SIZES)
    assert {len(question.columns) for question in splits["ood"]} <= {10, 11, 12}
    for split in ("train", "test"):
        assert {len(question.columns) for question in splits[split]} <= {6, 7, 8, 9}
    assert not {q.text[:15] for q in splits["ood"]} & {q.text[:15] for q in splits["train"]}


def test_slips_are_independent_and_shared_errors_are_shared() -> None:
    task, rng = Complement(), random.Random(0)
    slipping = [key for key, (errors, _) in task.slips.table.items() if errors.slip == 0.35]
    shared = [(key, value) for key, (errors, value) in task.slips.table.items() if errors.shared > 0.9]
    assert len(slipping) == 50 and len(shared) == 2 and len(task.slips.table) == len(FACTS.keys)
    question = Sum(tuple(slipping[:2]))
    drawn = [task.candidate(question, rng, 1.0).parts for _ in range(4000)]
    first, second = (sum(bool(parts[k]) for parts in drawn) / 4000 for k in range(2))
    both = sum(all(parts) for parts in drawn) / 4000
    assert abs(first - 0.35) < 0.03 and abs(second - 0.35) < 0.03 and abs(both - 0.35**2) < 0.025
    (key, value), *_ = shared
    assert sum(task.slips.draw(key, rng) == value for _ in range(1000)) > 880


def test_the_joint_answer_takes_each_sum_from_most_candidates() -> None:
    task, question = Complement(), Sum(((1, 1), (2, 2), (3, 3)))
    seen = [replace(task.right(question), parts=parts) for parts in ((5, 0, 0), (0, 6, 0), (0, 0, 7))]
    assert task.joint(question, random.Random(0), seen) == task.right(question)


def test_a_tiny_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A making that is cut off, and one that was killed, leave no model."""
    task = TASKS["complement"]()
    task.prepare(tmp_path / "data", SIZES)
    assert [len(pq.read_table(tmp_path / "data" / f"{split}.parquet")) for split in SPLITS] == [30, 20, 60]
    few = replace(RECIPES["complement"], plain_examples=8, candidate_examples=4, hidden_size=24, layers=1)
    (tmp_path / ".warm.part" / "model").mkdir(parents=True)
    (tmp_path / ".warm.part" / "model" / "model.safetensors").write_text("half")

    def interrupted(*_: object) -> None:
        assert not (tmp_path / ".warm.part" / "model").exists()
        (tmp_path / ".warm.part" / "trainer").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(warm_start, "train", interrupted)
        make_once(tmp_path / "warm", few, task, set)
    assert {path.name for path in tmp_path.iterdir()} <= {"data", ".warm.lock"}
    for _ in range(2):
        make_once(tmp_path / "warm", few, task, set)
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "warm", ".warm.lock"}
    assert (tmp_path / "warm" / "model.safetensors").is_file()


def test_an_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["complements"])
    assert "invalid choice: 'complements'" in capsys.readouterr().err
