"""The mathematics sets: their places on the hub, and the conversion of their rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from data_prep.answers import answers_of, boxed, encode, text_of
from data_prep.schema import DataSet, Drop, Hub, Row, Schema
from gcpo.rewards import same_answer

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
LAST_YEAR = 2023
"""Last year of AIME problems for training; those of 2024 are an evaluation set."""

LONGEST = 200
"""Largest length of a NuminaMath answer; longer ones are sentences or lists that no grader can compare."""

Raw = Mapping[str, Any]


def problem(question: Any, answer: Any, details: Mapping[str, Any], held_out: bool = False) -> Row:
    """Return a row from a question and its answer in any form."""
    text, answers = text_of(question), answers_of(answer)
    note = "several answers, or forms of one" if len(answers) > 1 else None
    return Row(text, encode(answers), details=details, held_out=held_out, note=note)


def kept(row: Raw, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns with these names that have a value."""
    return {name.lower().replace(" ", "_"): row[name] for name in names if row.get(name) not in (None, "")}


def columns(question: str, answer: str, *details: str) -> Schema:
    """Return a schema with a question and an answer column."""
    return Schema((question, answer), lambda row: problem(row[question], row[answer], kept(row, details)), details)


def worked(question: str, solution: str, *details: str) -> Schema:
    r"""Return a schema without an answer column: the answer is the content of the last ``\boxed{}`` of the solution."""
    return Schema(
        (question, solution), lambda row: problem(row[question], boxed(row[solution]), kept(row, details)), details
    )


def aime(question: str, answer: str, year: str, *details: str) -> Schema:
    """Return a schema with the year of the exam, which decides whether a row may be trained on."""

    def convert(row: Raw) -> Row:
        try:
            when = int(row[year])
        except (TypeError, ValueError, OverflowError):
            raise Drop("no year") from None
        return problem(row[question], row[answer], {**kept(row, details), "year": when}, held_out=when > LAST_YEAR)

    return Schema((question, answer, year), convert, details)


def numina_cot(row: Raw) -> Row:
    r"""Convert a row of NuminaMath-CoT, which has no answer column and sentences in some boxes."""
    return numina(row, boxed(row["solution"]), ("source",))


def numina_15(row: Raw) -> Row:
    """Convert a row of NuminaMath-1.5, whose columns mark proofs and invalid rows."""
    if str(row.get("question_type") or "").lower() == "proof":
        raise Drop("a proof is asked for")
    if str(row.get("problem_is_valid") or "Yes") != "Yes" or str(row.get("solution_is_valid") or "Yes") != "Yes":
        raise Drop("the set says that the problem or its solution is not valid")
    return numina(row, row["answer"], ("source", "question_type"))


def numina(row: Raw, answer: Any, details: tuple[str, ...]) -> Row:
    """Return a row of NuminaMath; an answer of more than `LONGEST` characters is dropped."""
    if isinstance(answer, str) and len(answer.strip()) > LONGEST:
        raise Drop(f"an answer of more than {LONGEST} characters")
    return problem(row["problem"], answer, kept(row, details))


def gsm8k(row: Raw) -> Row:
    """Convert a row of GSM8K, whose answer follows ``####`` at the end of the solution."""
    solution = row["answer"]
    if not isinstance(solution, str) or "####" not in solution:
        raise Drop("no #### before the answer")
    return problem(row["question"], solution.rpartition("####")[2], {})


def minerva(row: Raw) -> Row:
    """Convert a row of MinervaMATH: the box of the solution counts, with the forms of an agreeing answer column.

    In some rows of DeepScaleR's copy that column has the answer of another part of the question.
    """
    box = boxed(row["solution"])
    box = re.sub(r"\bnp\.([a-z]+)", r"\\\1", box)  # np.arcsin(10/13)
    forms = answers_of(row["answer"]) if row.get("answer") else []
    agree = not forms or any(_same_form(box, form) for form in forms)
    read = problem(row["problem"], [box, *forms] if agree else box, kept(row, MINERVA_DETAILS))
    return read if agree else replace(read, note="the answer column differs from the box of the solution, which counts")


def _same_form(one: str, other: str) -> bool:
    bare = [re.sub(r"[\s(){}]|\\left|\\right", "", answer) for answer in (one, other)]
    return bare[0] == bare[1] or same_answer(one, other)


MINERVA_DETAILS = ("type", "idx")
GSM8K = (Schema(("question", "answer"), gsm8k),)
DEEPSCALER_DETAILS = ("aime_number", "problem_number", "difficulty")
DEEPSCALER_AIME = aime("problem", "answer", "year", *DEEPSCALER_DETAILS)
HUB_AIME = aime("Question", "Answer", "Year", "ID", "Problem Number", "Part")
NUMINA_15 = ("source", "question_type", "problem_is_valid", "solution_is_valid")
MATH_DETAILS = ("subject", "type", "level", "unique_id")
MATH = columns("problem", "answer", *MATH_DETAILS)
MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
ANY = (
    columns("problem", "answer", "id", "url", "year", *DEEPSCALER_DETAILS),
    columns("question", "answer", "id", "url"),
    columns("Problem", "Answer", "ID"),
    worked("problem", "solution", "id", "url"),
)
"""The spellings of evaluation sets on the hub and in local files."""
MINERVA = (
    columns("question", "answer"),
    Schema(("problem", "solution"), minerva, ("answer", *MINERVA_DETAILS)),
    columns("problem", "answer", *MINERVA_DETAILS),
)


def _set(
    name: str,
    kind: Literal["train", "eval"],
    title: str,
    schemas: tuple[Schema, ...],
    *hubs: Hub,
    rows: tuple[int, ...] = (),
    **options: Any,
) -> DataSet:
    return DataSet(name, title, kind, "math", schemas, hubs, rows, instruction=INSTRUCTION, **options)


SETS = (
    _set(
        "aime",
        "train",
        f"AIME 1983 to {LAST_YEAR}, the paper's 919 problems; later years go to test.parquet",
        (HUB_AIME, DEEPSCALER_AIME),
        Hub("di-zhang-fdu/AIME_1983_2024", "train"),
        rows=(933, 975),
    ),
    _set(
        "deepscaler_aime",
        "train",
        "AIME 1983 to 2023 as DeepScaleR has it, 975 problems",
        (DEEPSCALER_AIME,),
        rows=(975,),
        found_in="deepscaler/data/train/aime.json of github.com/agentica-project/deepscaler",
    ),
    _set(
        "numinamath",
        "train",
        "4,000 problems drawn from NuminaMath-CoT (or NuminaMath-1.5)",
        (Schema(("problem", "answer"), numina_15, NUMINA_15), Schema(("problem", "solution"), numina_cot, ("source",))),
        Hub("AI-MO/NuminaMath-CoT", "train"),
        Hub("AI-MO/NuminaMath-1.5", "train"),
        sample=4000,
    ),
    _set(
        "gsm8k_train",
        "train",
        "GSM8K, training part",
        GSM8K,
        Hub("openai/gsm8k", "train", ("main",)),
        rows=(7473,),
    ),
    _set(
        "math_train",
        "train",
        "MATH, training part",
        (MATH, worked("problem", "solution", *MATH_DETAILS)),
        Hub("DigitalLearningGmbH/MATH-lighteval", "train"),
        Hub("EleutherAI/hendrycks_math", "train", MATH_SUBJECTS),
        rows=(7500,),
    ),
    _set(
        "aime24",
        "eval",
        "AIME 2024, I and II",
        ANY,
        Hub("math-ai/aime24", "test"),
        Hub("HuggingFaceH4/aime_2024", "train"),
        Hub("Maxwell-Jia/AIME_2024", "train"),
        rows=(30,),
    ),
    _set(
        "aime25",
        "eval",
        "AIME 2025, I and II",
        ANY,
        Hub("math-ai/aime25", "test"),
        Hub("opencompass/AIME2025", "test", ("AIME2025-I", "AIME2025-II")),
        Hub("yentinglin/aime_2025", "train"),
        rows=(30,),
    ),
    _set(
        "amc23",
        "eval",
        "AMC 2023, 40 problems (or DeepScaleR's 83 of 2022 and 2023)",
        ANY,
        Hub("math-ai/amc23", "test"),
        Hub("AI-MO/aimo-validation-amc", "train"),
        rows=(40, 83),
    ),
    _set(
        "math500",
        "eval",
        "MATH500",
        (MATH,),
        Hub("HuggingFaceH4/MATH-500", "test"),
        Hub("math-ai/math500", "test"),
        rows=(500,),
    ),
    _set("minerva", "eval", "MinervaMATH", MINERVA, Hub("math-ai/minervamath", "test"), rows=(272,)),
    _set("gsm8k", "eval", "GSM8K, test part", GSM8K, Hub("openai/gsm8k", "test", ("main",)), rows=(1319,)),
)
