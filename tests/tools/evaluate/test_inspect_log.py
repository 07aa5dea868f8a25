"""Logs of Inspect: the library writes and reads them, in a folder of packages of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from gcpo.tools.evaluate.__main__ import main
from gcpo.tools.evaluate.questions import QuestionSet
from gcpo.tools.evaluate.run import evaluate
from tests.conftest import ROOT
from tests.processes import uv
from tests.tools.evaluate.made import Rule, prompts_of, sums
from tests.tools.evaluate.test_run import MODEL, SETTINGS

PACKAGE = "inspect-ai==0.3.285"
EXPORT_AND_READ = """
import sys
from gcpo.tools.evaluate.__main__ import main
from inspect_ai.log import list_eval_logs, read_eval_log
output = sys.argv[1]
assert main(["evaluate", "inspect", f"tiny={output}", "--sets", sys.argv[2]][1:]) == 0
(info,) = list_eval_logs(output)
print(read_eval_log(info).model_dump_json())
"""


def answer(row: int, index: int) -> str:
    """Question 1 is wrong every time, question 2 once has no answer, and a response to question 3 is cut."""
    if (row, index) == (2, 1):
        return "I don't know"
    return f"{'so ' * 80 * ((row, index) == (3, 0))}\\boxed{{{2 * row + (row == 1)}}}"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuestionSet]:
    """The output of an evaluation whose results count two of three samples, and its set."""
    folder = tmp_path_factory.mktemp("evaluation")
    found, output = sums(folder / "data"), folder / "out"
    for samples in (3, 2):
        settings = replace(SETTINGS, samples=samples)
        evaluate(MODEL, [found], prompts_of(found), settings, output, Rule([found], answer))
    return output, found


@pytest.mark.slow
def test_the_library_reads_what_it_wrote(evaluation: tuple[Path, QuestionSet], tmp_path: Path) -> None:
    output, found = evaluation
    uv("pip", "install", "--python", sys.executable, "--target", str(tmp_path / "packages"), PACKAGE)
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_AND_READ, str(output), str(found.path)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written, text = done.stdout.splitlines()
    assert written == f"written: {output / 'inspect/sums.eval'}"
    log = json.loads(text)
    spec = log["eval"]
    assert (log["status"], spec["task"], spec["model"], spec["config"]["epochs"]) == ("success", "sums", "tiny", 2)
    sampling = [spec["model_generate_config"][key] for key in ("temperature", "top_p", "max_tokens", "seed")]
    assert sampling == [0.6, 0.95, 100, 0]
    assert spec["dataset"]["sample_ids"] == [question.id for question in found.questions]
    scores = {score["name"]: score["metrics"] for score in log["results"]["scores"]}
    metrics = {name: metric["value"] for name, metric in scores["acc"].items()}
    # c of n = 2 samples: 2, 0, 1, 2.
    assert (metrics["pass@1"], metrics["pass@2"], metrics["maj"]) == (5 / 8, 3 / 4, 3 / 4)
    assert metrics["truncated"] == 1 / 8 and scores["format"]["mean"]["value"] == 7 / 8
    assert (log["results"]["total_samples"], log["results"]["completed_samples"]) == (8, 8)

    samples = {(sample["id"], sample["epoch"]): sample for sample in log["samples"]}
    rows = [[samples.pop((question.id, epoch)) for epoch in (1, 2)] for question in found.questions]
    assert not samples
    values = [[sample["scores"]["acc"]["value"] for sample in row] for row in rows]
    assert values == [["C", "C"], ["I", "I"], ["C", "I"], ["C", "C"]]
    first, unanswered, cut = rows[0][0], rows[2][1], rows[3][0]
    line = json.loads((output / "sums.jsonl").read_text().splitlines()[2])
    assert (line["row"], line["sample"]) == (0, 0)
    assert [(one["role"], one["content"]) for one in first["messages"]] == [
        ("user", "What is 0 + 0?"),
        ("assistant", line["text"]),
    ]
    assert [one["content"] for one in first["input"]] == ["What is 0 + 0?"]
    assert (first["target"], first["scores"]["acc"]["answer"], first["output"]["completion"]) == (
        "0",
        "0",
        line["text"],
    )
    assert first["scores"]["score"]["value"] == 1.0 and first["scores"]["acc"]["explanation"] is None
    assert first["output"]["usage"]["output_tokens"] == line["tokens"]
    assert first["metadata"] == {"row": 0, "seed": line["seed"], "data_source": "gcpo/sums"}
    assert unanswered["scores"]["acc"]["explanation"] == "no answer in the response"
    assert cut["scores"]["acc"]["explanation"] == "cut at the token limit"
    assert [one["output"]["choices"][0]["stop_reason"] for one in (first, cut)] == ["stop", "max_tokens"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence on standard error."""
    assert main(["inspect", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_missing_package_is_one_sentence(evaluation, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    assert "pip install 'gcpo[inspect]'" in refusal(capsys, evaluation[0])


def test_wrong_inputs_are_refused_before_anything_is_written(evaluation, tmp_path, monkeypatch, capsys):
    for name in ("inspect_ai", "inspect_ai.log"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["inspect_ai.log"], "write_eval_log", None, raising=False)
    output, found = evaluation
    assert "name the sets with --sets" in refusal(capsys, output)
    assert "holds no results" in refusal(capsys, tmp_path, "--sets", found.path)
    other, changed = sums(tmp_path / "data", name="other"), sums(tmp_path / "data", 3)
    assert f"{output} has no results of the set other" in refusal(capsys, output, "--sets", other.path)
    assert f"{changed.path} is another file" in refusal(capsys, output, "--sets", changed.path)
