"""Reading from the hub: as it would answer, and from a cache. The hub itself is not asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from huggingface_hub import errors

from data_prep import hub
from data_prep.core import convert_rows, read_source
from data_prep.hub import read_hub
from data_prep.schema import DataError
from data_prep.sets import SETS
from tests.data_prep.made import AIME_ROWS, files_under, provenance, run, truths, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GSM8K = [{"question": f"q{i}?", "answer": f"so\n#### {i},000"} for i in range(3)]


class Hub:
    """Stands for the hub: what it holds and what it was asked."""

    def __init__(self) -> None:
        self.splits: dict = {}
        self.error: Exception | None = None
        self.asked: list = []

    def dataset_info(self, name, revision=None, timeout=None):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(self, name, config=None, revision=None):
        self.asked.append((name, config, revision))
        found = self.splits[config]
        if isinstance(found, Exception):
            raise found
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in found.items()})


@pytest.fixture
def the_hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(datasets, "load_dataset", found.load_dataset)
    return found


def refused(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=404, text=""))


def test_a_set_from_its_usual_place(tmp_path, the_hub, capsys):
    the_hub.splits = {None: {"train": AIME_ROWS}}
    assert run("aime", "--data", tmp_path) == 0
    assert the_hub.asked == [("di-zhang-fdu/AIME_1983_2024", None, COMMIT)]
    assert truths(tmp_path / "aime" / "train.parquet") == ["60", '["80", "81"]', "8"]
    assert "aime: 7 rows from the hub's di-zhang-fdu/AIME_1983_2024\n" in capsys.readouterr().out
    source = provenance(tmp_path / "aime")["source"]
    assert len(source.pop("sha256_of_rows")) == 64
    assert source == {
        "kind": "hub",
        "name": "di-zhang-fdu/AIME_1983_2024",
        "configs": [None],
        "split": "train",
        "revision": COMMIT,
        "rows": 7,
        "columns": ["Question", "Answer", "Year"],
    }


def test_configurations_and_splits(the_hub):
    the_hub.splits = {"main": {"train": GSM8K, "test": GSM8K[:1]}}
    assert len(read_hub(SETS["gsm8k"], SETS["gsm8k"].hubs[0]).records) == 1
    assert len(read_hub(SETS["gsm8k_train"], SETS["gsm8k_train"].hubs[0]).records) == 3
    the_hub.splits = {
        config: {"test": [{"problem": config, "answer": "1", "other": 1}]}
        for config in SETS["math_train"].hubs[1].configs
    }
    source = read_hub(SETS["math_train"], SETS["math_train"].hub("EleutherAI/hendrycks_math"))
    rows = list(source.records.read(range(len(source.records))))
    assert [row["problem"] for row in rows] == list(SETS["math_train"].hubs[1].configs)
    assert "other" not in rows[0] and "other" in source.records.columns


def test_another_name_is_read_like_the_usual_one(the_hub):
    the_hub.splits = {None: {"train": AIME_ROWS}}
    assert len(read_hub(SETS["aime24"], SETS["aime24"].hub("someone/aime")).records) == 7
    assert the_hub.asked[0][0] == "someone/aime"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (refused(errors.RepositoryNotFoundError), "there is no file a/b, and no data set of this name on the hub"),
        (refused(errors.RevisionNotFoundError), "the data set a/b has no revision v9 on the hub"),
        (refused(errors.GatedRepoError), "the data set a/b asks for consent on the hub"),
    ],
)
def test_what_the_hub_refuses(tmp_path, the_hub, capsys, error, sentence):
    the_hub.error = error
    assert run("aime", "--source", "a/b", "--revision", "v9", "--data", tmp_path / "data", "--against", "none") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {sentence}") and printed.count("\n") == 1
    assert files_under(tmp_path) == [] and the_hub.asked == []


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        ({"a": [{"x": 1}], "b": [{"x": 1}]}, "has no split train, only a, b"),
        ({"train": []}, "has no rows in its split train"),
        (ValueError("Config name is missing.\nPick one"), "can't be loaded: Config name is missing"),
    ],
)
def test_what_does_not_fit(the_hub, splits, sentence):
    the_hub.splits = {None: splits}
    with pytest.raises(DataError, match=sentence):
        read_hub(SETS["aime"], SETS["aime"].hubs[0])


def test_wrong_columns(the_hub):
    the_hub.splits = {None: {"train": [{"x": 1}]}}
    with pytest.raises(DataError, match="the hub's di-zhang-fdu/AIME_1983_2024 lacks columns of aime: it has x, and "):
        convert_rows(SETS["aime"], read_source(SETS["aime"], []))


def test_a_hash_does_not_depend_on_chunks(monkeypatch):
    monkeypatch.setattr(hub, "HASHED", 4)
    rows = {"a": list("abcdefghij"), "b": list(range(10))}
    whole = pa.table(rows)
    parts = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 5), whole.slice(8)])
    other = pa.table({**rows, "b": [*range(9), 99]})
    assert hub._hash_of_rows(parts) == hub._hash_of_rows(whole) != hub._hash_of_rows(other)


# ---- no network ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """As if no network were there, with an empty cache."""

    def out_of_reach(self, name, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", out_of_reach)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_network(tmp_path, no_network, capsys):
    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    assert run("math500", "--data", tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the data set HuggingFaceH4/MATH-500 is not in the cache, and the hub does not answer"
    )
    assert error.endswith("--source PATH\n") and error.count("\n") == 1 and not (tmp_path / "data").exists()
    assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == offline


def test_the_cache_does_without_a_network(tmp_path, no_network, capsys):
    """The folder is the one that `datasets` makes when it reads from the hub."""
    write(tmp_path / "x.parquet", GSM8K)
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "made"))
    cached = no_network / "openai___gsm8k" / "main" / "0.0.0" / COMMIT
    shutil.copytree(Path(loaded["train"].cache_files[0]["filename"]).parent, cached)
    (cached / "parquet-train.arrow").rename(cached / "gsm8k-train.arrow")
    info = json.loads((cached / "dataset_info.json").read_text())
    info |= {"dataset_name": "gsm8k", "config_name": "main"}
    info["splits"]["train"]["dataset_name"] = "gsm8k"
    (cached / "dataset_info.json").write_text(json.dumps(info))

    assert run("gsm8k_train", "--data", tmp_path / "data", "--against", "none") == 0
    assert "openai/gsm8k, from the cache, since the hub does not answer\n" in capsys.readouterr().out
    assert truths(tmp_path / "data" / "gsm8k_train" / "train.parquet") == ["0", "1000", "2000"]
    assert provenance(tmp_path / "data" / "gsm8k_train")["source"]["revision"] == COMMIT
    assert run("gsm8k_train", "--data", tmp_path, "--against", "none", "--revision", "v2") == 2
    assert "the revision v2 of openai/gsm8k is not in the cache" in capsys.readouterr().err
