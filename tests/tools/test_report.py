"""Metrics files and what is made of them. The pixels of the plot are not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gcpo.tools import metrics, report
from gcpo.tools.metrics import EARLIER_METRICS_FILE, METRICS_FILE
from gcpo.tools.metrics import HELD_OUT as HELD_OUT_METRIC

HELD_OUT = "val-core/gcpo/arithmetic/acc/mean@1"


def write(path: Path, records: list[tuple[int, dict]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in records))


def training_run(directory: Path, steps: int = 4, causal: bool = True) -> Path:
    records = [(0, {HELD_OUT: 0.4})]
    for step in range(1, steps + 1):
        data = {
            "critic/score/mean": 0.4 + 0.1 * step,
            "response_length/mean": 20.0,
            "actor/grad_norm": 1.0,
            "timing_s/step": 5.0 + step,
            "timing_s/gen": 1.0,
            "timing_s/old_log_prob": 0.5,
            "timing_s/gcpo_score": 0.3,
            "timing_s/adv": 0.25,
            "timing_s/update_actor": 2.0,
        }
        if causal:
            data |= {"gcpo/upsilon/mean": 1.5, "gcpo/upsilon/spread_in_group": 0.1, "gcpo/reference/kl_mean": 0.02}
        records.append((step, data))
    records.append((steps, {HELD_OUT: 0.65}))
    write(directory / METRICS_FILE, records)
    return directory


def test_last_value_of_a_repeated_step_wins_and_other_keys_stay():
    lines = ['{"step": 2, "data": {"a": 1, "b": 5}}', '{"step": 1, "data": {"a": 7}}', '{"step": 2, "data": {"a": 3}}']
    assert metrics.merge_lines(lines) == {2: {"a": 3.0, "b": 5.0}, 1: {"a": 7.0}}


@pytest.mark.parametrize("line", ["", "{", '{"step": 1}', '{"step": "x", "data": {}}', "[1]", '{"step": 1, "data": 3}'])
def test_lines_that_are_no_metrics_are_left_out(line):
    assert metrics.parse_line(line) is None


def test_values_that_are_no_finite_numbers_are_left_out():
    line = '{"step": 3, "data": {"a": null, "b": true, "c": "x", "d": NaN, "e": 2, "f": Infinity}}'
    assert metrics.parse_line(line) == (3, {"e": 2.0})


def test_earlier_starts_come_first(tmp_path):
    write(tmp_path / EARLIER_METRICS_FILE, [(0, {"a": 1}), (1, {"a": 1, "b": 2})])
    write(tmp_path / METRICS_FILE, [(1, {"a": 9}), (2, {"a": 2})])
    assert metrics.read_metrics(tmp_path) == {0: {"a": 1.0}, 1: {"a": 9.0, "b": 2.0}, 2: {"a": 2.0}}


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ([HELD_OUT, "val-aux/x/reward/mean@1"], HELD_OUT),
        (["val-aux/num_turns/mean", "val-core/gcpo/aime/acc/mean@16"], "val-core/gcpo/aime/acc/mean@16"),
        (["val-aux/gsm8k/reward/mean@4"], "val-aux/gsm8k/reward/mean@4"),
        (["critic/score/mean"], None),
    ],
)
def test_held_out_key(keys, found):
    assert HELD_OUT_METRIC.name_in(keys) == found


def test_stages_do_not_count_nested_timers_twice(tmp_path):
    run = report.load_run(training_run(tmp_path))
    assert metrics.stage_seconds(run.steps[1]) == {"generate": 1.0, "score": 0.75, "update": 2.0}


def test_a_run_without_held_out_accuracy(tmp_path, capsys):
    write(tmp_path / METRICS_FILE, [(1, {"critic/score/mean": 0.5}), (2, {"timing_s/step": 3.0})])
    assert report.main([str(tmp_path)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if tmp_path.name in line and "│" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["2", "–", "–", "–", "0.500 → 0.500", "3.0"]


def test_panels_without_data_are_left_out(tmp_path):
    grpo = report.load_run(training_run(tmp_path / "grpo", causal=False))
    titles = report.plot([grpo], tmp_path / "grpo.png")
    assert len(titles) == 5 and not any("Υ" in title or "κ" in title for title in titles)
    both = [report.load_run(training_run(tmp_path / "gcpo")), grpo]
    titles = report.plot(both, tmp_path / "plots" / "both.png")
    assert len(titles) == 7 and titles[-1] == "seconds per step"
    assert (tmp_path / "plots" / "both.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(report.ReportError, match="hold nothing to draw"):
        report.plot([report.Run(tmp_path, {1: {"other": 1.0}})], tmp_path / "x.png")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    directories = [training_run(tmp_path / seed / "run") for seed in ("a", "b")]
    assert [run.name for run in report.load_runs(directories)] == ["a/run", "b/run"]
    assert [run.name for run in report.load_runs(directories[:1])] == ["run"]


def test_checkpoint_of(tmp_path):
    assert report.checkpoint_of(tmp_path) is None
    (tmp_path / "checkpoints" / "global_step_20").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    assert report.checkpoint_of(tmp_path) == tmp_path / "checkpoints" / "global_step_20"
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("30")
    assert report.checkpoint_of(tmp_path) is None


def test_command_line(tmp_path, capsys):
    assert report.main([str(training_run(tmp_path / "run"))]) == 0
    shown = capsys.readouterr().out
    for text in (
        "40.0 % (step 0)",
        "65.0 % (step 4)",
        "+25.0 points",
        "0.500 → 0.800",
        "curves.png",
        "checkpoint: none",
    ):
        assert text in shown
    assert "\x1b" not in shown
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert (
        capsys.readouterr().err == f"error: there is no directory {tmp_path / 'nothing'}; give the --output of a run\n"
    )
