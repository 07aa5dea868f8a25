"""The table of several runs, with numbers that can be worked out by hand."""

from __future__ import annotations

import csv
import io
import math

import pytest

from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.metrics import Question
from gcpo.tools.evaluate.table import AVERAGE, comma_separated, make_table, markdown, parse_runs, show

MATH = ("aime24", "aime25", "amc23", "math500", "minerva")


def found(*right: int, samples: int = 4, prefix: str = "q") -> list[Question]:
    return [
        Question(f"{prefix}{i}", samples, count, float(count > samples / 2), 1, 100 * samples, float(samples))
        for i, count in enumerate(right)
    ]


def test_difference_is_taken_question_by_question():
    # Per question 1/4, 1/4, 1/4, 1/2 better: mean 0.3125, s = 0.125, t(3) = 3.18245, half = 3.18245 * 0.125 / 2
    base, other = found(0, 1, 3, 2), found(1, 2, 4, 4)
    cell = make_table({"base": {"aime24": base}, "new": {"aime24": other}}).cells["new", "aime24"]
    assert cell.difference.mean == pytest.approx(0.3125)
    assert cell.difference.reach == pytest.approx(3.18245 * 0.0625, rel=1e-5)
    assert cell.outside is True
    # Unpaired, the same numbers would be far inside the noise: the intervals of the two runs overlap.
    assert cell.value.low < 0.375 < cell.value.mean


def test_the_order_of_the_questions_does_not_matter():
    base, other = found(0, 1, 3, 2), found(1, 2, 4, 4)
    one = make_table({"base": {"aime24": base}, "new": {"aime24": other}})
    two = make_table({"base": {"aime24": base[::-1]}, "new": {"aime24": other}})
    assert one.cells["new", "aime24"].difference == two.cells["new", "aime24"].difference


def test_a_difference_inside_the_noise():
    table = make_table({"base": {"aime24": found(0, 4, 2)}, "new": {"aime24": found(4, 0, 3)}})
    assert table.cells["new", "aime24"].outside is False


def test_other_questions_can_not_be_compared():
    table = make_table({"base": {"aime24": found(0, 4)}, "new": {"aime24": found(4, 4, prefix="other")}})
    cell = table.cells["new", "aime24"]
    assert cell.difference.mean == 0.5 and math.isnan(cell.difference.low) and cell.outside is None
    assert "(+50.0?)" in markdown(table) and "the questions are not the same" in markdown(table)


def test_average_is_that_of_the_paper():
    base = {name: found(0, 4) for name in MATH}
    base["aime24"] = found(4, 4, 4, 4, 4, 4)  # six questions weigh as much as two
    table = make_table({"base": base, "new": {name: found(4, 4) for name in MATH} | {"aime24": found(*[4] * 6)}})
    assert table.columns == [*MATH, AVERAGE] and table.title(AVERAGE) == "Avg."
    assert table.cells["base", AVERAGE].value.mean == pytest.approx((1 + 4 * 0.5) / 5)
    assert table.cells["new", AVERAGE].difference.mean == pytest.approx(0.4)


def test_average_is_over_what_all_runs_have():
    table = make_table(
        {
            "base": {"aime24": found(1, 2), "amc23": found(2, 2), "math500": found(4, 4), "humaneval": found(4, 0)},
            "new": {"aime24": found(1, 2), "amc23": found(4, 4), "humaneval": found(0, 4)},
        }
    )
    assert table.columns == ["aime24", "amc23", "math500", AVERAGE, "humaneval"]
    assert table.title(AVERAGE) == "Avg. of 2"
    assert table.cells["new", AVERAGE].value.mean == pytest.approx((0.375 + 1) / 2)
    text = markdown(table)
    assert "the average is over AIME 2024, AMC 2023, which all runs have" in text
    new = next(line for line in text.splitlines() if line.startswith("| new"))
    assert new.split(" | ")[3] == "–"


def test_average_without_any_spread_has_no_interval():
    table = make_table({"base": {"aime24": found(0, 0), "amc23": found(0, 0, 0)}})
    assert math.isnan(table.cells["base", AVERAGE].value.low)
    assert "| 0.0 |" in markdown(table).splitlines()[2]


def test_one_set_has_no_average():
    assert make_table({"a": {"aime24": found(1, 2), "humaneval": found(1)}}).columns == ["aime24", "humaneval"]


def test_markdown():
    text = markdown(make_table({"base": {"aime24": found(0, 1, 3, 2)}, "a|b": {"aime24": found(1, 2, 4, 4)}}))
    lines = text.splitlines()
    assert lines[0] == "| run | AIME 2024 |" and lines[1] == "| --- | ---: |"
    assert lines[2].startswith("| base | 37.5 ±") and lines[2].endswith(" |")
    assert lines[3].startswith("| a\\|b | **68.8 ±") and lines[3].endswith(" (+31.2†)** |")
    assert "| base | AIME 2024 | 4 | 4 | 37.5 | 0.0 to 88.9 | 75.0 | 25.0 | 25.0 | 100 | 100.0 |" in lines
    assert all(line.count("|") - line.count("\\|") == lines[0].count("|") for line in lines[:4])


def test_csv():
    table = make_table({"base": {"aime24": found(0, 1, 3, 2)}, "new": {"aime24": found(1, 2, 4, 4)}})
    base, new = csv.DictReader(io.StringIO(comma_separated(table)))
    assert base["run"] == "base" and base["set"] == "aime24" and base["questions"] == "4" and base["samples"] == "4"
    assert float(base["pass@1"]) == 0.375 and float(base["pass@4"]) == 0.75 and base["difference"] == ""
    assert float(new["difference"]) == 0.3125 and new["outside_noise"] == "yes"
    assert float(new["truncated"]) == 0.25 and float(new["tokens"]) == 100


def test_code_has_no_majority(capsys):
    questions = [Question("a", 2, 1, None, 0, 20, None), Question("b", 2, 2, None, 0, 20, None)]
    table = make_table({"run": {"humaneval": questions}})
    row = next(csv.DictReader(io.StringIO(comma_separated(table))))
    assert row["maj"] == "" and row["format"] == ""
    show(table)
    assert "HumanEval 0-shot" in capsys.readouterr().out


def test_terminal_shows_every_run_and_set(capsys):
    runs = {f"run-{i}": {name: found(i, 4) for name in (*MATH, "humaneval", "mine")} for i in range(4)}
    show(make_table(runs))
    shown = capsys.readouterr().out
    for title in ("AIME 2024", "AIME 2025", "AMC 2023", "MATH500", "MinervaMATH", "Avg.", "HumanEval 0-shot", "mine"):
        assert title in shown
    assert "…" not in shown and shown.count("run-3") >= 8 and "(+37.5" in shown


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["a/x", "b/y"], ["x", "y"]),
        (["a/x", "b/x/"], ["a/x", "b/x"]),
        (["base=a/x", "b/x"], ["base", "b/x"]),
        (["new=b/y", "base=a/x"], ["new", "base"]),
    ],
)
def test_names_of_runs(arguments, names):
    assert list(parse_runs(arguments)) == names


@pytest.mark.parametrize("arguments", [["a/x", "a/x"], ["x=a", "x=b"]])
def test_two_runs_of_one_name(arguments):
    with pytest.raises(EvaluationError, match="two runs are called"):
        parse_runs(arguments)
