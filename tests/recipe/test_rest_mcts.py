"""The outer loop with stand-in phases, its command line, and the data of the fine-tuning."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo.faults import RunStoppedError
from gcpo.files import sole_user
from gcpo.selftraining.settings import SearchSettings, SelfTrainingSettings, TestSearchSettings
from gcpo.settings import ConfigError, Settings
from gcpo.tools.metrics import read_metrics
from recipe.rest_mcts import sft
from recipe.rest_mcts.__main__ import CONFIGS, main, read_settings
from recipe.rest_mcts.dataset import TokenDataset
from recipe.rest_mcts.loop import FIRST, LATER, Phase, Place, self_train
from recipe.rest_mcts.sft import command, fine_tune
from tests.test_scripts import Sandbox

ROOT = Path(__file__).parents[2]
REST_MCTS = [(0, name) for name in FIRST["rest_mcts"]] + [(k, name) for k in (1, 2) for name in LATER["rest_mcts"]]


def settings(**given: Any) -> SelfTrainingSettings:
    fixed = {"model": "m", "train_file": "train.parquet", "test_file": "test.parquet", "max_response_tokens": 8}
    return SelfTrainingSettings.parse(fixed | given, "self_training")


class StandIn:
    """Phases that write down that they ran, and fail where they are told to."""

    def __init__(self, fail_at: tuple[int, str] | None = None, error: BaseException | None = None) -> None:
        self.done: list[tuple[int, str]] = []
        self.fail_at, self.error = fail_at, error or RuntimeError("out of paper\nline 2")

    def phases(self) -> dict[str, Phase]:
        names = {*FIRST["rest_mcts"], *LATER["rest_mcts"], *LATER["rft"]}
        return {name: self._phase(name) for name in names}

    def _phase(self, name: str) -> Phase:
        def phase(place: Place) -> Mapping[str, float]:
            if (place.iteration, name) == self.fail_at:
                raise self.error
            self.done.append((place.iteration, name))
            return {f"made/{name}": place.iteration, "tokens/generated": 10 if name in ("search", "value") else 0}

        return phase


def quiet(_: str) -> None:
    pass


def test_the_phases_run_in_order(tmp_path: Path) -> None:
    """And the metrics have one line for each iteration, from all its phases."""
    stand_in = StandIn()
    self_train(settings(), tmp_path / "o", stand_in.phases(), quiet)
    assert stand_in.done == REST_MCTS
    metrics = read_metrics(tmp_path / "o")
    assert list(metrics) == [0, 1, 2]
    assert metrics[2]["made/sft"] == 2 and metrics[1]["tokens/generated"] == 20 and metrics[0]["tokens/generated"] == 10
    assert metrics[1]["timing_s/step"] == pytest.approx(
        sum(metrics[1][f"timing_s/{name}"] for name in LATER["rest_mcts"])
    )


def test_rft_has_neither_search_nor_value_model(tmp_path: Path) -> None:
    stand_in = StandIn()
    self_train(settings(method="rft", iterations=1), tmp_path / "o", stand_in.phases(), quiet)
    assert stand_in.done == [(0, "evaluate"), (1, "sample"), (1, "sft"), (1, "evaluate")]


@pytest.mark.parametrize("at", REST_MCTS, ids=str)
@pytest.mark.parametrize("error", [RuntimeError("out of paper\nline 2"), KeyboardInterrupt()], ids=["error", "stop"])
def test_it_goes_on_where_it_was_stopped(tmp_path: Path, at: tuple[int, str], error: BaseException) -> None:
    """The phase that was stopped runs again, those before it do not."""
    first = StandIn(at, error)
    with pytest.raises((RunStoppedError, KeyboardInterrupt)) as stopped:
        self_train(settings(), tmp_path, first.phases(), quiet)
    if isinstance(error, RuntimeError):
        assert str(stopped.value) == (
            f"the phase '{at[1]}' of iteration {at[0]} failed: RuntimeError: out of paper line 2; "
            "the same command goes on from there"
        )
    second = StandIn()
    self_train(settings(), tmp_path, second.phases(), quiet)
    assert first.done + second.done == REST_MCTS
    assert list(read_metrics(tmp_path)) == [0, 1, 2]
    third = StandIn()
    self_train(settings(iterations=3), tmp_path, third.phases(), quiet)
    assert third.done == [(3, name) for name in LATER["rest_mcts"]]


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    """SIGKILL in the middle of a phase."""
    code = f"""
import time
from pathlib import Path
from tests.recipe.test_rest_mcts import StandIn, settings, quiet
from recipe.rest_mcts.loop import self_train
phases = StandIn().phases()
def hang(place):
    (place.folder / "hangs").touch()
    time.sleep(60)
phases["sft"] = hang
self_train(settings(), Path({str(tmp_path)!r}), phases, quiet)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not (tmp_path / "iteration-1" / "hangs").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(ConfigError, match="another run works in"):
        self_train(settings(), tmp_path, StandIn().phases(), quiet)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stand_in = StandIn()
    self_train(settings(), tmp_path, stand_in.phases(), quiet)
    assert stand_in.done == REST_MCTS[REST_MCTS.index((1, "sft")) :]


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    self_train(settings(iterations=1), tmp_path, StandIn().phases(), quiet)
    with pytest.raises(ConfigError, match=r"another seed \(0, now 1\)"):
        self_train(settings(seed=1), tmp_path, StandIn().phases(), quiet)
    with pytest.raises(ConfigError, match="another search"):
        self_train(settings(search={"branch": 2}), tmp_path, StandIn().phases(), quiet)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        self_train(settings(), tmp_path, StandIn().phases(), quiet)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match="iterations of an unknown run"):
        self_train(settings(), tmp_path, StandIn().phases(), quiet)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with sole_user(tmp_path), pytest.raises(ConfigError, match="another run works in"):
        self_train(settings(), tmp_path, StandIn().phases(), quiet)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_released_code() -> None:
    """The columns "self-training script" and "evaluate.py"."""
    names = (
        "iterations",
        "branch",
        "roll_branch",
        "exploration",
        "unvisited",
        "end_gate",
        "roll_forward_steps",
        "alpha",
    )
    training, testing = SearchSettings(), TestSearchSettings()
    assert [getattr(training, name) for name in names] == [50, 3, 1, 0.5, 0.9, 0.8, 1, 0.5]
    assert [getattr(testing, name) for name in names] == [100, 3, 1, 0.4, 0.8, 0.9, 2, 0.5]
    assert training.temperature == 0.7 and not training.stop_at_gate and testing.stop_at_gate
    found = settings()
    assert (found.steps.separator, found.steps.max_tokens, found.steps.min_characters) == ("\n\n", 256, 3)
    assert (found.filter.min_value, found.filter.min_characters) == (0.2, 50)
    assert (found.value.learning_rate, found.value.batch_size, found.value.max_tokens) == (3e-6, 3, 900)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_is_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides may stand before and after the options."""
    assert main([name, "search.branch=2", "--dry-run", "method=rft"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^method: rft$", shown, re.M) and re.search(r"^  branch: 2$", shown, re.M)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "there is no configuration nothing; choose one of arithmetic"),
        (["arithmetic", "search.iterations=0"], "self_training.search.iterations is 0; it must be at least 1"),
        (["arithmetic", "serch.branch=2"], "self_training.serch is not a setting; did you mean self_training.search?"),
        (["arithmetic", "method=mcts"], "self_training.method is 'mcts'; choose one of rest_mcts, rft"),
        (["arithmetic", "steps.separator="], "self_training.steps.separator"),
        (["arithmetic", "branch"], "branch is no setting; write key=value"),
        (["arithmetic", "engine.seed=3"], "seed follows from other settings; leave it out"),
        (["arithmetic", "train_file=nowhere.parquet"], "there is no file nowhere.parquet"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "o").exists()


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["arithmetic", "--ouput", "o"])
    assert "unknown option --ouput" in capsys.readouterr().err


def test_a_configuration_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ntrain_file: a\ntest_file: b\nmax_response_tokens: 5\nvalue: {learning_rate: 1e-5}\n")
    assert read_settings(str(path), []).value.learning_rate == 1e-5
    path.write_text("model: [")
    with pytest.raises(ConfigError, match="can't be read"):
        read_settings(str(path), [])


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def test_the_rows_of_the_fine_tuning(tmp_path: Path) -> None:
    """The loss covers the response, and nothing is encoded again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "response": "text"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft.parquet")
    data = TokenDataset([str(tmp_path / "sft.parquet")], tokenizer=None, config={}, processor=None, max_samples=-1)
    (row,) = [data[index] for index in range(len(data))]
    assert {name: tensor.tolist() for name, tensor in row.items()} == {
        "input_ids": [1, 2, 3, 4, 5],
        "position_ids": [0, 1, 2, 3, 4],
        "loss_mask": [0, 0, 1, 1, 1],
    }
    assert row["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(("rows", "gpus", "batch"), [(200, 1, 64), (50, 1, 50), (50, 4, 48)])
def test_a_batch_is_never_larger_than_the_data(tmp_path: Path, rows: int, gpus: int, batch: int) -> None:
    """verl drops what does not fill a batch."""
    words = command(settings(gpus=gpus), "m", tmp_path / "sft.parquet", tmp_path / "sft", rows, 100)
    assert f"data.train_batch_size={batch}" in words and f"--nproc_per_node={gpus}" in words


def stand_in_trainer(folder: Path, text: str) -> list[str]:
    """A command that runs ``text`` in the place of verl's trainer; ``folder`` is that of its checkpoint."""
    return [sys.executable, "-c", f"import os, pathlib, time\nfolder = pathlib.Path({str(folder)!r})\n{text}"]


def test_the_model_is_put_in_place(tmp_path: Path) -> None:
    """What an earlier start has left is replaced."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "old").touch()
    made = """
assert not (folder / "old").exists()
(folder / "global_step_3" / "huggingface").mkdir(parents=True)
(folder / "global_step_3" / "huggingface" / "config.json").touch()
line = '{"step": %d, "data": {"train/loss": %f}}\\n'
pathlib.Path(os.environ["VERL_FILE_LOGGER_PATH"]).write_text(line % (1, 0.5) + line % (2, 0.25))
"""
    arguments = stand_in_trainer(tmp_path / "sft", made)
    assert fine_tune(arguments, tmp_path / "sft", tmp_path / "policy") == 0.25
    assert (tmp_path / "policy" / "config.json").is_file() and not (tmp_path / "sft").exists()


@pytest.mark.parametrize(("text", "status"), [("raise SystemExit(3)", 3), ("pass", 0)])
def test_a_failed_trainer_is_one_sentence(tmp_path: Path, text: str, status: int) -> None:
    """Also one that ends well and leaves no model."""
    with pytest.raises(RunStoppedError, match=f"ended with status {status}; its last error is in {tmp_path}/sft.log$"):
        fine_tune(stand_in_trainer(tmp_path / "sft", text), tmp_path / "sft", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_a_stop_is_passed_on_to_the_trainer(tmp_path: Path) -> None:
    """And the trainer has ended when the exception goes on."""
    told = """
import signal
def end(*_):
    (folder / "told").touch()
    raise SystemExit(1)
signal.signal(signal.SIGTERM, end)
(folder / "started").touch()
time.sleep(60)
"""

    def stop(*_: Any) -> None:
        if (tmp_path / "sft" / "started").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            fine_tune(stand_in_trainer(tmp_path / "sft", told), tmp_path / "sft", tmp_path / "policy")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "sft" / "told").exists()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_verl_takes_the_command(tmp_path: Path, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its settings, and our data set through verl's own function."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from hydra import compose, initialize_config_module
    from verl.trainer.sft_trainer import create_sft_dataset

    monkeypatch.setattr(sft, "is_cpu_profile", lambda: on_cpu)
    path = tmp_path / "sft.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt_ids": [1], "response_ids": [2]}]), path)
    words = sft.command(settings(), "m", path, tmp_path / "sft", 50, 100)
    overrides = [word for word in words[words.index("verl.trainer.sft_trainer") + 1 :] if "hydra." not in word]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("sft_trainer_engine", overrides=overrides)
    assert (config.trainer.device == "cpu") == on_cpu and config.data.max_length == 100
    assert config.data.pad_mode == "no_padding"  # which our rows are made for
    data = create_sft_dataset(config.data.train_files, config.data, tokenizer=None, processor=None)
    assert type(data).__name__ == "TokenDataset" and data[0]["input_ids"].tolist() == [1, 2]


# ---- scripts and documents -------------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """A machine without a GPU, with a stand-in for Python."""
    box = Sandbox(tmp_path)
    box.gpus(0)
    return box


def test_the_script_makes_the_embedded_task(sandbox: Sandbox) -> None:
    done = sandbox.run("rest_mcts.sh", "--seed", "3", "questions=8")
    assert done.returncode == 0, done.stderr
    data, model, run = sandbox.calls
    assert data.startswith("-m examples.arithmetic.task ") and model.startswith("-m examples.arithmetic.warm_start ")
    output = f"--output {ROOT}/outputs/rest-mcts"
    assert run.rstrip() == f"-m recipe.rest_mcts arithmetic method=rest_mcts seed=3 questions=8 {output}"


def test_the_other_scripts_and_configurations(sandbox: Sandbox) -> None:
    """They prepare nothing and write to a folder of their own."""
    assert sandbox.run("rft.sh", "numinamath_1.5b", "--dry-run").returncode == 0
    output = f"--output {ROOT}/outputs/rft-numinamath_1.5b --dry-run"
    assert sandbox.calls == [f"-m recipe.rest_mcts numinamath_1.5b method=rft {output}"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["arithmetic", "word"], "word is neither an option nor a setting key=value"),
        (["--method", "grpo"], "--method is 'grpo'; it must be rest_mcts or rft"),
        (["--output"], "--output needs a value"),
    ],
)
def test_wrong_arguments_of_the_script(sandbox: Sandbox, arguments: list[str], sentence: str) -> None:
    done = sandbox.run("rest_mcts.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}") and sandbox.calls == []


def settings_in_code(text: str) -> list[str]:
    """Inline code ``group.field`` or ``field`` of the document's tables."""
    groups = "|".join(name for name, field in SelfTrainingSettings.model_fields.items() if has_fields(field.annotation))
    return re.findall(rf"`((?:{groups})\.\w+)", text)


def has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def test_the_document_names_settings_and_metrics_that_exist() -> None:
    """`tests/test_docs.py` checks its commands and paths."""
    text = (ROOT / "docs" / "rest_mcts.md").read_text()
    named = settings_in_code(text)
    assert len(set(named)) > 10
    for name in named:
        group, _, field = name.partition(".")
        assert field in SelfTrainingSettings.model_fields[group].annotation.model_fields, name  # type: ignore[union-attr]
    source = "".join(path.read_text() for path in (ROOT / "recipe" / "rest_mcts").glob("*.py"))
    metrics = set(re.findall(r"`(rest_mcts/[\w/]+)`", text))
    assert len(metrics) > 8
    for name in metrics:
        assert f'"{name}"' in source or f'"{name.rpartition("/")[0]}/{{' in source, name


def test_the_document_has_the_run_of_the_embedded_task() -> None:
    """The numbers of its table are those of the file that is stored beside it."""
    text = (ROOT / "docs" / "rest_mcts.md").read_text()
    stored = json.loads((ROOT / "docs" / "measurements" / "rest_mcts.json").read_text())
    for run in stored["runs"].values():
        for step in run["metrics"]:
            accuracy = step["data"]["val-core/gcpo/arithmetic/acc/mean@1"]
            assert f"{100 * accuracy:.1f}" in text
