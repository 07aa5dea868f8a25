"""``gcpo show``: one group in the terminal, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gcpo.tools import cli
from tests.tools.groups.made import HOSTILE, draw, response, run_of, write


def test_a_group(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Responses with their numbers, and the draws with the blocks of their prompts."""
    lines = [response("a", i, f"text {i}") for i in range(4)]
    lines += [response("b", i, f"other {i}", question=8) for i in range(4)]
    lines.append(response("b", 4, "a copy", question=8, padding=True))
    draws = [draw("b", 0, "joint"), draw("b", 1, "again", kind="regenerated", left_out=2)]
    draws[1]["prompt"] = ["response 1", "draw 0"]
    write(tmp_path / "rollouts", 3, lines, draws)
    assert cli.main(["show", str(tmp_path), "--step", "3"]) == 0
    shown = capsys.readouterr().out
    assert "step 3, question 8, right answer 35" in shown and "text 0" not in shown and "a copy" not in shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert ["1", "1", "0.866", "1.6", "1.5", "0.0123", "other 1"] in cells
    assert ["1", "regenerated", "2", "ok", "–", "response 1, draw 0", "again"] in cells
    assert cli.main(["show", str(tmp_path), "--step", "3", "--question", "7"]) == 0
    assert "text 3" in (shown := capsys.readouterr().out) and "The dump has no draws of this group." in shown


def test_the_dump_of_another_trainer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """verl's own keys are enough: the group is in the key of the row, the question has its number in the file."""
    keys = ("input", "output", "gts", "score", "step", "uid")
    lines = [response(group, i, f"{group} {i}") for group in ("x_y", "z") for i in range(2)]
    write(tmp_path, 1, [{key: line[key] for key in keys} for line in lines])
    assert cli.main(["show", str(tmp_path), "--step", "1", "--question", "1"]) == 0
    shown = capsys.readouterr().out
    assert "z 1" in shown and "x_y 1" not in shown and "Υ" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "2"], "has no step 2; it has 1"),
        (["--step", "1", "--question", "9"], "step 1 has no question 9; it has 100, 101"),
    ],
)
def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    run_of(tmp_path, ["text"], groups=2)
    assert cli.main(["show", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_dump(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["show", str(tmp_path), "--step", "1"]) == 2
    assert f"has no rollout dump; train with trainer.rollout_data_dir={tmp_path}/rollouts" in capsys.readouterr().err


def test_the_folder_that_the_command_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [
        "python",
        "-m",
        "recipe.gcpo.main_gcpo",
        f"+trainer.rollout_data_dir={tmp_path}/elsewhere",
        "method=gcpo",
    ]
    (tmp_path / "run.json").write_text(json.dumps({"command": command}))
    write(tmp_path / "elsewhere", 1, [response("a", 0, "found")])
    write(tmp_path / "rollouts", 1, [response("a", 0, "of another run")])
    assert cli.main(["show", str(tmp_path), "--step", "1"]) == 0
    assert "found" in capsys.readouterr().out


def test_lines_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, 1, [response("a", 0, "text")])
    with (tmp_path / "1.jsonl").open("ab") as file:
        file.write(b'{"input": \xff}\n[1]\n' + b"[" * 100_000 + b"\n\n")
    assert cli.main(["show", str(tmp_path), "--step", "1"]) == 0
    assert "warning: 3 lines of step 1 are not readable and left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_outputs(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    """Wherever they stand, the terminal gets no control character, and the reader sees that they are there."""
    run_of(tmp_path, [HOSTILE[name]])
    assert cli.main(["show", str(tmp_path), "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    signs = {"terminal": "␛]0;owned␇", "zero": "a␀b", "half a pair": "a⟨U+D800⟩b", "right to left": "abc⟨U+202E⟩dcba"}
    assert signs.get(name, "") in shown
    if name == "terminal":
        assert "[bold]" in shown and ":smile:" in shown
    if name == "long":
        assert len(shown) < 100_000 and "(999,400 more characters)" in re.sub(r"[\s│]+", " ", shown)
