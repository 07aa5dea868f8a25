"""The command as a user calls it, with a stand-in for the trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from gcpo.tools import cli
from gcpo.tools.compare import execution
from tests.processes import is_alive

Experiment = Callable[..., Path]


def starts(place: Path) -> list[str]:
    """Method and seed of every process of the trainer, in order."""
    path = place / "started.txt"
    return [line.rpartition(" ")[0] for line in path.read_text().splitlines()] if path.is_file() else []


def arm(method: str, **overrides: object) -> dict:
    return {"method": method, "overrides": overrides}


def test_tables_of_known_numbers(experiment, place, capsys):
    path = experiment()
    assert cli.main(["compare", str(path)]) == 0
    text = (place / "out/comparison.md").read_text()
    assert text in capsys.readouterr().out
    # 0.60, 0.61 and 0.62, and 0.05 more: t(0.975, 2) = 4.3027, so the half-width is 4.3027 / sqrt(3) = 2.48 points.
    assert "| grpo | 61.0 ± 2.5 | 41.0 ± 2.5 | 3 ok |" in text
    assert "| gcpo | 66.0 ± 2.5 | 46.0 ± 2.5 | 3 ok |" in text
    assert "| gcpo | +5.0 ± 0.0 | +5.0 ± 0.0 |" in text
    # 1,000 tokens are step 3 1/3 of GCPO: 0.5 + 0.10 * 2 / 3 + seed / 100.
    assert "arithmetic 1,000" in text and "| gcpo | 57.7 ± 2.5 | 37.7 ± 2.5 |" in text
    assert "| gcpo | -3.3 ± 0.0 | -3.3 ± 0.0 |" in text
    assert "| gcpo | 300 (3.00 ×) | 0.50 (1.00 ×) |" in text
    assert "| gcpo, arithmetic | 1.800 ± 0.000 | 1.690 ± 0.025 | **+0.110 ± 0.025** |" in text
    assert f"3 seeds, 10 steps. Command: `gcpo compare {path}`. Commit: " in text
    for section in text.split("## ")[1:]:
        assert "Trainer: the one-file trainer (only torch). Seeds: 0, 1, 2. Runs: 6 ok." in section
    for name in ("learning", "gradient_norm", "upsilon"):
        assert (place / f"out/{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in text
    runs, curves = (pd.read_csv(place / f"out/{name}.csv") for name in ("runs", "curves"))
    assert runs.query("arm == 'gcpo' and seed == 2")["held_out"].item() == pytest.approx(0.67)
    assert len(curves) == 6 * 11


def test_finished_runs_are_not_repeated(experiment, place):
    assert cli.main(["compare", str(experiment(seeds=[0])), "--jobs", "2"]) == 0
    first = starts(place)
    assert sorted(first) == ["gcpo 0", "grpo 0"]
    assert cli.main(["compare", str(experiment(seeds=[0, 1]))]) == 0
    assert sorted(starts(place)[2:]) == ["gcpo 1", "grpo 1"]


def test_a_failed_run_is_kept_and_shown(experiment, place, capsys):
    path = experiment(methods={"grpo": arm("grpo"), "gcpo": arm("gcpo", fail=1)})
    assert cli.main(["compare", str(path)]) == 1
    text = (place / "out/comparison.md").read_text()
    assert "| gcpo | 66.0 ± 12.7 (n = 2) | 46.0 ± 12.7 (n = 2) | 2 ok, 1 failed |" in text
    assert "| gcpo | +5.0 ± 0.0 (n = 2) |" in text and text.count("Runs: 5 ok, 1 failed.") == text.count("Trainer:")
    reason = "gcpo_in_one_file: settings.alpha is -1; it must be at least 0; exit code 2"
    assert f"* arithmetic, gcpo, seed 1: {reason} (out/runs/arithmetic/gcpo/seed-1)" in text
    assert f"failed: {reason}" in capsys.readouterr().out
    assert cli.main(["compare", str(path)]) == 1 and len(starts(place)) == 6  # it is not repeated


def test_retry_failed(experiment, place):
    path = experiment(methods={"grpo": arm("grpo"), "gcpo": arm("gcpo", fail="once")}, seeds=[0, 1])
    assert cli.main(["compare", str(path)]) == 1
    (place / "mended").touch()
    assert cli.main(["compare", str(path), "--retry-failed"]) == 0
    assert sorted(starts(place)[4:]) == ["gcpo 0", "gcpo 1"]
    assert "Runs: 4 ok." in (place / "out/comparison.md").read_text()


def test_a_run_that_stops_early_failed(experiment, place):
    assert cli.main(["compare", str(experiment(methods={"grpo": arm("grpo", short=0)}, seeds=[0, 1]))]) == 1
    assert "its metrics end at step 9 of 10" in (place / "out/comparison.md").read_text()


def test_quick_has_a_folder_of_its_own(experiment, place):
    path = experiment()
    assert cli.main(["compare", str(path), "--quick"]) == 0
    text = (place / "out-quick/comparison.md").read_text()
    assert f"2 seeds, 5 steps. Command: `gcpo compare {path} --quick`" in text and not (place / "out").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_one_sentence_each(experiment, place, capsys):
    path = str(experiment(seeds=[0]))
    assert "out has no run that has ended; start the same command without" in refused(capsys, path, "--tables-only")
    assert "can't be read as yaml" in refused(capsys, "none.yaml")
    assert cli.main(["compare", path]) == 0
    capsys.readouterr()

    line = refused(capsys, str(experiment(seeds=[0], steps=12)))
    assert "another configuration (steps was 10 and is now 12); give another output" in line
    overrides = experiment(seeds=[0], overrides={"lr": 1})
    assert "(overrides was {} and is now {'lr': 1})" in refused(capsys, str(overrides), "--tables-only")
    (place / "data/arithmetic/train.parquet").write_bytes(b"other questions")
    assert "another configuration (inputs was " in refused(capsys, str(experiment(seeds=[0])))
    (place / "data/arithmetic/train.parquet").write_bytes(b"questions")

    record = place / "out/runs/arithmetic/gcpo/seed-0/record.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "gcpo": "0.1.0"}))
    assert "was made with gcpo 0.1.0, and this is " in refused(capsys, str(experiment(seeds=[0])), "--tables-only")
    record.write_text("{")
    assert "is no record of a run; remove " in refused(capsys, str(experiment(seeds=[0])))
    assert len(starts(place)) == 2

    (place / "models/arithmetic-warm/config.json").unlink()
    line = refused(capsys, str(experiment()), "--tables-only")
    assert "models/arithmetic-warm is missing; make them first, with `python -m examples.tasks arithmetic`" in line


def test_a_missing_task_is_made(experiment, place, capfd):
    (place / "models/arithmetic-warm/config.json").unlink()
    path = experiment(seeds=[0])
    assert cli.main(["compare", str(path)]) == 0
    shown = capfd.readouterr().out
    assert "models/arithmetic-warm is missing: making the task" in shown and "made by the stand-in" in shown
    assert cli.main(["compare", str(path)]) == 0
    assert "made by" not in capfd.readouterr().out and len(starts(place)) == 2


def test_a_task_that_cannot_be_made(experiment, place, capsys):
    (place / "data/arithmetic/train.parquet").unlink()
    line = refused(capsys, str(experiment()))
    assert line.endswith("can't be made: `python -m examples.tasks arithmetic` ended with exit code 3")
    assert not starts(place)


def test_other_commits_are_named(experiment, place):
    path = experiment(seeds=[0])
    assert cli.main(["compare", str(path)]) == 0
    record = place / "out/runs/arithmetic/gcpo/seed-0/record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "commit": "abc1234"}))
    assert cli.main(["compare", str(path), "--tables-only"]) == 0
    text = (place / "out/comparison.md").read_text()
    assert "abc1234 (1 runs)" in text and "**The runs differ in commit.**" in text


def test_missing_runs_are_counted(experiment, place):
    assert cli.main(["compare", str(experiment(seeds=[0]))]) == 0
    assert cli.main(["compare", str(experiment(seeds=[0, 1])), "--tables-only"]) == 0
    text = (place / "out/comparison.md").read_text()
    assert "60.0 ± ? (n = 1)" in text and "| 1 ok, 1 missing |" in text and "Runs: 2 ok, 2 missing." in text


def test_two_folders_of_results(experiment, place):
    assert cli.main(["compare", str(experiment())]) == 0
    first = (place / "experiment.yaml").rename(place / "first.yaml")
    other = experiment(output="other", seeds=[3, 4, 5], methods={"grpo": arm("grpo")})
    assert cli.main(["compare", str(other)]) == 0
    assert cli.main(["compare", str(first), "--tables-only", "--against", str(other)]) == 0
    text = (place / "out/comparison.md").read_text()
    # Both have a standard deviation of 0.01: t(0.975, 4) = 2.7764 times 0.01 * sqrt(2 / 3).
    assert "| grpo, arithmetic | 61.0 ± 2.5 (n = 3) | 64.0 ± 2.5 (n = 3) | **-3.0 ± 2.3** |" in text
    assert "| gcpo, arithmetic | 66.0" not in text.split("## Do the two agree?")[1]


def test_the_shorter_comparison_gives_the_step(experiment, place):
    """Of two comparisons of unequal length, the longer one is read at its evaluation after step 5."""
    first, methods = experiment(methods={"grpo": arm("grpo")}).rename(place / "first.yaml"), {"grpo": arm("grpo")}
    assert cli.main(["compare", str(first)]) == 0
    other = experiment(output="other", seeds=[3, 4, 5], methods=methods, steps=5)
    assert cli.main(["compare", str(other)]) == 0
    for ours, theirs, row in [(first, other, "56.0 ± 2.5 (n = 3) | 59.0"), (other, first, "59.0 ± 2.5 (n = 3) | 56.0")]:
        assert cli.main(["compare", str(ours), "--tables-only", "--against", str(theirs)]) == 0
        text = (place / ("out" if ours == first else "other") / "comparison.md").read_text()
        assert f"| grpo, arithmetic | {row}" in text and "Held-out accuracy after 5 steps." in text

    other = experiment(output="third", methods=methods, steps=7)
    assert cli.main(["compare", str(other)]) == 0
    assert cli.main(["compare", str(first), "--tables-only", "--against", str(other)]) == 0
    sentence = "The two comparisons have no task and method in common that both evaluate after 7 steps."
    assert sentence in (place / "out/comparison.md").read_text()


def test_figure_3(experiment, place):
    methods = {"grpo": arm("grpo"), "gcpo": arm("gcpo", alpha=2)}
    path = experiment(methods=methods, varied="gcpo", vary={"alpha": [1, 2]}, seeds=[0, 1])
    assert cli.main(["compare", str(path), "--jobs", "2"]) == 0
    text = (place / "out/comparison.md").read_text()
    assert "| alpha=1 | 65.5 ± 6.4 |" in text and "| alpha=2 | 65.5 ± 6.4 |" in text
    assert (place / "out/sensitivity.png").is_file() and len(starts(place)) == 6


# ---- interruption ----------------------------------------------------------------------------------------------------

COMMAND = (
    "import sys; from gcpo.tools.compare import runs; runs.MODULES['one_file'] = 'tests.tools.compare.standin'; "
    "from gcpo.tools.cli import main; sys.exit(main(['compare', *sys.argv[1:]]))"
)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruption(experiment, place, number):
    """The children end with the command; the next start runs what has no record, from its beginning."""
    hanging = {"grpo": arm("grpo"), "gcpo": arm("gcpo", hang=1)}
    path = experiment(methods=hanging, seeds=[0, 1])
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path), "--jobs", "2"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a command in the background of a script
    )
    until(lambda: len(starts(place)) == 4)
    until(lambda: (place / "out/runs/arithmetic/grpo/seed-1/record.json").is_file())
    children = [int(line.split()[-1]) for line in (place / "started.txt").read_text().splitlines()]
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number != signal.SIGKILL else -number)
    assert (b"stopped; the same command goes on" in error) == (number != signal.SIGKILL)
    until(lambda: not any(map(is_alive, children)))
    assert not (place / "out/runs/arithmetic/gcpo/seed-1/record.json").exists()

    record = place / "out/runs/arithmetic/gcpo/seed-0/record.json"
    assert json.loads(record.read_text())["state"] == "ok"
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(path)], stderr=subprocess.DEVNULL)
    until(lambda: len(starts(place)) == 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert starts(place)[4] == "gcpo 1"


def test_a_run_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(execution, "GRACE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    execution._stop([child])
    assert child.returncode == -signal.SIGKILL


def test_two_in_one_folder(experiment, place, capsys):
    """The second one waits."""
    path = experiment(seeds=[0])
    code = (
        "import time, pathlib, gcpo.files\nwith gcpo.files.lock(pathlib.Path('out')): print(flush=True); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert cli.main(["compare", str(path)]) == 0
    assert "another gcpo compare runs in out; waiting for its end" in capsys.readouterr().out
