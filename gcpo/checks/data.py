"""The data files: format, columns, prompts and right answers, and the number of steps that they provide."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gcpo.checks.model import KEY as MODEL_KEY
from gcpo.checks.model import tokenizer_path
from gcpo.reading import MODEL, OUR_REWARD, files_of, first_line, get, group, plural
from gcpo.settings import ConfigError

SUFFIXES = (".parquet", ".json", ".jsonl")
"""File types that verl's data set reads."""
OUR_DATASET = "pkg://gcpo.adapters.dataset"
_GRADED = (None, OUR_REWARD)
"""Reward functions that compare with the ground truth: verl's and ours. Other functions may use it in any way."""
BATCH, STEPS, EPOCHS = "data.train_batch_size", "trainer.total_training_steps", "trainer.total_epochs"


@dataclass(frozen=True)
class Table:
    """The columns of one data file that this module checks."""

    file: str
    columns: tuple[str, ...]
    prompts: list[Any]
    truths: list[Any]
    """The column ``reward_model``."""
    sources: list[Any]
    """The column ``data_source``."""


def read_tables(config: DictConfig, key: str) -> list[Table]:
    """Read and check the local files that ``key`` names.

    Files of other file systems (``hdfs://...``) are not checked.

    Raises:
        ConfigError: a file is missing, of another kind, without rows, or has a row that cannot be used.
    """
    files = files_of(config, key)
    if not files:
        raise ConfigError(f"{key} names no file")
    tables = []
    for file in files:
        if "://" in file:
            continue
        table = _read(config, key, file)
        _check_prompts(key, table)
        _check_truths(key, table, graded=get(config, "reward.custom_reward_function.path") in _GRADED)
        tables.append(table)
    return tables


def _read(config: DictConfig, key: str, file: str) -> Table:
    path = Path(file).expanduser()
    if path.is_dir():
        raise ConfigError(f"{key}: {file} is a folder; name the files in it")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{key}: {file} is of no kind that verl reads; it reads {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {file}")
    prompt = get(config, "data.prompt_key", "prompt")
    wanted = (prompt, "data_source", "reward_model")
    read = _read_parquet if path.suffix == ".parquet" else _read_json
    kind = "parquet" if path.suffix == ".parquet" else "JSON"
    try:
        names, columns = read(path, wanted)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        raise ConfigError(f"{key}: {file} is not a readable {kind} file ({first_line(error)})") from error
    missing = [column for column in wanted if column not in names]
    if missing:
        raise ConfigError(
            f"{key}: {file} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {', '.join(names)}"
        )
    for kind in ("image", "video", "audio"):
        if get(config, f"data.{kind}_key", f"{kind}s") in names:
            raise ConfigError(f"{key}: {file} has images, video or audio, which GCPO does not support")
    table = Table(file, tuple(names), *(columns[name] for name in (prompt, "reward_model", "data_source")))
    if not table.prompts:
        raise ConfigError(f"{key}: {file} has no rows")
    return table


def _read_parquet(path: Path, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, list[Any]]]:
    import pyarrow.parquet as pq

    names = pq.ParquetFile(path).schema_arrow.names
    present = [name for name in wanted if name in names]
    table = pq.read_table(path, columns=present)
    return list(names), {name: table[name].to_pylist() for name in present}


def _read_json(path: Path, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, list[Any]]]:
    text = path.read_text(encoding="utf-8")
    lines = text.strip()
    rows = (
        json.loads(lines) if lines.startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    )
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is no JSON object")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, {name: [row.get(name) for row in rows] for name in wanted}


def _check_prompts(key: str, table: Table) -> None:
    """Check that every prompt is a list of messages whose last one is a text."""
    for row, prompt in enumerate(table.prompts):
        messages = prompt if isinstance(prompt, list) else []
        last = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
        if not isinstance(last, str) or not last.strip():
            raise ConfigError(f"{key}: the prompt in row {row} of {table.file} is empty or not a list of messages")


def _check_truths(key: str, table: Table, *, graded: bool) -> None:
    """Check that every row has a ground truth, and if it is ``graded``, one that can be compared with an answer."""
    for row, entry in enumerate(table.truths):
        where = f"row {row} of {table.file}"
        if not isinstance(entry, dict) or "ground_truth" not in entry:
            raise ConfigError(f"{key}: {where} has no ground truth (reward_model.ground_truth)")
        problem = truth_problem(entry["ground_truth"])
        if problem and graded:
            raise ConfigError(f"{key}: the ground truth (reward_model.ground_truth) in {where} {problem}")
    for row, source in enumerate(table.sources):
        if not isinstance(source, str) or not source.strip():
            raise ConfigError(f"{key}: data_source in row {row} of {table.file} is {source!r}; it must be a name")


def truth_problem(truth: Any) -> str | None:
    """Return why an answer cannot be compared with a ground truth, as a predicate (``is empty``), or ``None``."""
    if truth is None:
        return "is missing"
    if isinstance(truth, float) and not math.isfinite(truth):
        return f"is {truth}"
    if isinstance(truth, bytes):
        return "is a byte string; write a text"
    if isinstance(truth, str):
        return _text_problem(truth)
    if isinstance(truth, list | tuple):
        if not truth:
            return "is an empty list"
        problems = (truth_problem(item) for item in truth)
        return next((f"holds an answer that {problem}" for problem in problems if problem), None)
    if isinstance(truth, dict) and not any(value is not None for value in truth.values()):
        return "is an empty group"
    return None


def _text_problem(truth: str) -> str | None:
    if not truth.strip():
        return "is empty"
    if truth.strip() in ("None", "null", "nan", "NaN"):
        return f"is the word {truth.strip()!r}, which stands for a missing value"
    if "\ufffd" in truth or "\x00" in truth:
        return "holds characters that could not be decoded"
    return None


# ---- rows against steps ----------------------------------------------------------------------------------------------


def check_steps(config: DictConfig, tables: list[Table]) -> None:
    """Check that the training rows are enough for a batch, and the epochs for the requested steps.

    verl validates and saves at the last step, which a run with too few epochs never reaches.

    Raises:
        ConfigError: there are fewer rows than in a batch, or more steps than in the epochs.
    """
    rows = _usable(config, tables)
    if rows is not None:
        _compare(config, rows, "")


def check_filtered_steps(config: DictConfig, tables: list[Table]) -> None:
    """Check as `check_steps` the rows that ``data.filter_overlong_prompts`` keeps; this needs the tokenizer.

    Raises:
        ConfigError: see `check_steps`, or the tokenizer cannot be read.
    """
    rows = _usable(config, tables)
    if rows is None:
        return
    left = _rows_that_fit(config, [prompt for table in tables for prompt in table.prompts], rows)
    if left < rows:
        length = get(config, "data.max_prompt_length")
        _compare(config, left, f" whose prompts have at most {length} tokens (data.max_prompt_length)")


def _usable(config: DictConfig, tables: list[Table]) -> int | None:
    """Return the number of training rows, or ``None`` if a file is on another file system."""
    if len(tables) != len(files_of(config, "data.train_files")):
        return None
    rows, limit = sum(len(table.prompts) for table in tables), get(config, "data.train_max_samples", -1)
    return min(rows, limit) if limit > 0 else rows


def needed_rows(config: DictConfig) -> int:
    """Return the number of rows that is enough for a batch and for the requested steps."""
    batch, steps = get(config, BATCH), get(config, STEPS)
    return batch * (1 if steps is None else math.ceil(steps / get(config, EPOCHS)))


def _compare(config: DictConfig, rows: int, which: str) -> None:
    batch, steps, epochs = get(config, BATCH), get(config, STEPS), get(config, EPOCHS)
    if rows < batch:
        advice = f"set {BATCH}={rows} or less" if rows else "raise data.max_prompt_length, or use other data"
        raise ConfigError(
            f"{BATCH} is {batch}, and data.train_files has {plural(rows, 'row')}{which}, so that no step has a whole "
            f"batch; {advice}"
        )
    each = rows // batch
    if steps is not None and steps > each * epochs:
        raise ConfigError(
            f"{STEPS} is {steps}, and {EPOCHS} ({epochs}) gives {each * epochs}: {plural(rows, 'row')}{which} make "
            f"{plural(each, 'step')} of {batch} an epoch; the last checkpoint and validation would never come, so set "
            f"{EPOCHS}={math.ceil(steps / each)} or {STEPS}={each * epochs}"
        )


def _rows_that_fit(config: DictConfig, prompts: list[Any], usable: int) -> int:
    """Return the number of rows that verl's filter keeps; ``usable`` if it is off or cannot be predicted.

    Counting stops when there are enough rows. If verl samples the rows, any row may be in the sample, so that no
    row counts as removed.
    """
    if not get(config, "data.filter_overlong_prompts") or usable < len(prompts):
        return usable
    custom = get(config, "data.custom_cls.path")
    if custom not in (None, OUR_DATASET):
        return usable
    needed, fit = needed_rows(config), 0
    for is_short in _lengths(config, prompts):
        fit += is_short
        if fit >= needed:
            return usable
    return fit


def _lengths(config: DictConfig, prompts: list[Any]) -> Iterator[bool]:
    """Yield whether each prompt has at most ``data.max_prompt_length`` tokens."""
    limit, tokenizer = get(config, "data.max_prompt_length"), load_tokenizer(config)
    addition = get(config, "data.episode_prompt") or "" if get(config, "data.custom_cls.path") == OUR_DATASET else ""
    options = group(config, "data.apply_chat_template_kwargs")
    render: Callable[..., str] = tokenizer.apply_chat_template
    for messages in prompts:
        *before, last = messages
        messages = [*before, {**last, "content": last["content"] + addition}]
        try:
            text = render(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception:
            yield False  # verl drops a row whose prompt cannot be rendered.
            continue
        # A token of a byte-level tokenizer has at least one byte, so that a short text need not be encoded.
        yield len(text.encode()) <= limit or len(tokenizer.encode(text, add_special_tokens=False)) <= limit


def load_tokenizer(config: DictConfig) -> Any:
    """Return the tokenizer of the run, with its chat template.

    Raises:
        ConfigError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    place = str(Path(tokenizer_path(config)).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=bool(get(config, f"{MODEL}.trust_remote_code"))
        )
    except Exception as error:
        raise ConfigError(
            f"{MODEL_KEY}: transformers cannot read the tokenizer in {place}: {first_line(error)}"
        ) from error
    template = get(config, f"{MODEL}.custom_chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer
