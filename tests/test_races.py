"""Places that two runs of one checkout make at once: data, the warm-started model, sets, merged checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.data_prep.made import AIME_ROWS, write

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = {
    "data": """
        from examples.arithmetic import task as arithmetic
        write = arithmetic.write_atomically
        def write_alone(path, content):
            (folder / "writing").mkdir()  # fails where another process is writing
            time.sleep(0.2)
            write(path, content)
            (folder / "writing").rmdir()
        arithmetic.write_atomically = write_alone
        arithmetic.prepare(folder / "arithmetic", train_size=60, test_size=12)
    """,
    "model": """
        from examples.arithmetic.task import prepare
        from examples.arithmetic.warm_start import Recipe, warm_start
        prepare(folder / "arithmetic", train_size=60, test_size=12)
        few = dict(hidden_size=32, intermediate_size=48, layers=1, heads=1, plain_examples=40, candidate_examples=2)
        warm_start(folder / "arithmetic", folder / "warm", Recipe(**few))
    """,
    "set": """
        from data_prep import core, output
        from data_prep.sets import SETS
        write = output._write_staged
        def write_alone(*arguments):
            (folder / "writing").mkdir()
            time.sleep(0.2)
            changed = write(*arguments)
            (folder / "writing").rmdir()
            return changed
        output._write_staged = write_alone
        core.prepare(SETS["aime"], folder / "sets" / "aime", [str(folder / "rows.json")])
    """,
    "merged": """
        from gcpo.tools.evaluate import models
        def merger(actor, target):
            (target / "config.json").write_text("{}")
            time.sleep(0.5)
            with (folder / "merges").open("a") as file:
                file.write("x")
        models._run_merger = merger
        models.merge(folder / "global_step_2" / "actor")
    """,
    "evaluation": """
        from gcpo.tools.evaluate import EvaluationError
        from gcpo.tools.evaluate.samples import alone_in
        try:
            with alone_in(folder / "evaluation"):
                (folder / "evaluation" / "samples").write_text("x")
                time.sleep(2)
                print("wrote")
        except EvaluationError as error:
            print("refused:", error)
    """,
}


def checkpoint(folder: Path) -> None:
    actor = folder / "global_step_2" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "config.json").write_text("{}")
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": 1}))
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"x")


def run_at_once(folder: Path, program: str, count: int = 3) -> list[str]:
    """Start the program ``count`` times at the same moment; what each printed."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\nsys.stdin.read(1)\n"
        + textwrap.dedent(PROGRAMS[program])
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for process in processes:
        process.stdin.write("g")
        process.stdin.flush()
    done = [process.communicate(timeout=240) for process in processes]
    for process, (_, error) in zip(processes, done, strict=True):
        assert process.returncode == 0, error[-2000:]
    return [shown for shown, _ in done]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_data_of_the_quick_start(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run_at_once(tmp_path, "data")
    assert left(tmp_path / "arithmetic") == {"train.parquet", "test.parquet"}
    assert pq.read_table(tmp_path / "arithmetic" / "train.parquet").num_rows == 60


def test_the_warm_started_model_is_made_once(tmp_path: Path) -> None:
    shown = run_at_once(tmp_path, "model")
    assert sum("parameters" in text for text in shown) == 1
    assert left(tmp_path) == {"arithmetic", "warm"} and (tmp_path / "warm" / "recipe.json").is_file()


def test_a_prepared_set(tmp_path: Path) -> None:
    write(tmp_path / "rows.json", AIME_ROWS)
    run_at_once(tmp_path, "set")
    assert left(tmp_path / "sets" / "aime") >= {"train.parquet", "provenance.json"}
    assert not [name for name in left(tmp_path / "sets" / "aime") if name.startswith(".")]


def test_a_checkpoint_is_merged_once(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    shown = run_at_once(tmp_path, "merged")
    assert (tmp_path / "merges").read_text() == "x" and sum("waiting" in text for text in shown) >= 1
    assert left(tmp_path / "global_step_2") == {"actor", "merged"}


def test_one_evaluation_writes_into_a_folder(tmp_path: Path) -> None:
    shown = run_at_once(tmp_path, "evaluation")
    assert sorted(text.split(":")[0].strip() for text in shown) == ["refused", "refused", "wrote"]


def test_a_merged_model_that_may_only_be_read_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gcpo.tools.evaluate import models

    checkpoint(tmp_path)
    monkeypatch.setattr(models, "_run_merger", lambda actor, target: (target / "config.json").write_text("{}"))
    actor = tmp_path / "global_step_2" / "actor"
    merged = models.merge(actor)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(models, "lock", refuse)
    assert models.merge(actor) == merged
