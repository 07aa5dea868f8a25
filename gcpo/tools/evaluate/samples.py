"""The samples of a run: a JSONL file per set, one finished sample a line, and the settings they were made with.

A line is written when its sample is finished and graded, and is on the disk before the next one is taken; so a run that
was stopped, in whatever way, goes on with the samples that are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gcpo.files import LOCK_FILE, sole_user, why, write_atomically
from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.metrics import Sample

SETTINGS_FILE = "settings.json"
JOINED = {"sets": "another file of {}", "aggregate": "other gcpo.blocks with --aggregate {}"}
"""Settings with an entry for each set and each K, which later calls add to; the sentence says that one has changed."""
LOG_FILE = "vllm.log"
"""It is there before the settings are, and is the only file where vLLM didn't start."""


def parse_line(line: str | bytes) -> tuple[str, int, Sample]:
    """Question id, sample index, and what the metrics need.

    Raises:
        ValueError: it is no line of this file.
    """
    try:
        data = json.loads(line)
        scores = data["scores"]
        right = scores.get("acc", scores["score"]) == 1
        cut = data["finish_reason"] == "length"
        sample = Sample(right, cut, int(data["tokens"]), data["answer"], scores.get("format"))
        return str(data["question"]), int(data["sample"]), sample
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a sample: {error!r}") from error


class SampleFile:
    """The samples of one set.

    Attributes:
        path: the JSONL file; it need not exist yet.
        samples: what is in it, by question id and sample index.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there, and cut off a last line that was not written to its end.

        Raises:
            EvaluationError: another line can't be read.
        """
        self.path = path
        self.samples: dict[tuple[str, int], Sample] = {}
        whole = 0
        try:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.endswith(b"\n"):
                        self._add(line, number)
                        whole += len(line)
                    else:
                        os.truncate(path, whole)
        except OSError as error:
            raise EvaluationError(f"{path} can't be read: {why(error)}") from error

    def _add(self, line: bytes, number: int) -> None:
        try:
            question, index, self.samples[question, index] = parse_line(line)
        except ValueError as error:
            raise EvaluationError(f"line {number} of {self.path} is no sample ({error}); remove it") from error

    def token_ids(self) -> dict[tuple[str, int], list[int]]:
        """Return the token ids of every sample, by question id and sample index.

        Raises:
            EvaluationError: a sample has none, because an earlier version wrote it.
        """
        ids: dict[tuple[str, int], list[int]] = {}
        for line in self.path.read_bytes().splitlines():
            data = json.loads(line)
            if "token_ids" not in data:
                raise EvaluationError(
                    f"{self.path} holds samples of an earlier version, without their tokens; give another --output"
                )
            ids[data["question"], data["sample"]] = data["token_ids"]
        return ids

    def append(self, lines: Iterable[Mapping[str, Any]]) -> list[Sample]:
        """Write samples; they are on the disk when this returns them.

        Raises:
            EvaluationError: they can't be written.
        """
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        # A lone surrogate, which a decoder may leave, has no UTF-8 form.
        data = "".join(f"{text}\n" for text in texts).encode("utf-8", errors="replace")
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(f"{self.path} can't be written: {why(error)}; the run can go on later") from error
        written = [parse_line(text) for text in texts]
        self.samples |= {(question, index): sample for question, index, sample in written}
        return [sample for _, _, sample in written]


# ---- settings ------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file that this package wrote.

    Raises:
        EvaluationError: it can't be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file; it is there in whole or not at all.

    Raises:
        EvaluationError: it can't be written.
    """
    try:
        write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path} can't be written: {why(error)}") from error


def check_settings(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run in ``output`` with those that `JOINED` adds; nothing is written.

    Raises:
        EvaluationError: its samples were made with others, or the folder is of something else.
    """
    path = output / SETTINGS_FILE
    if not path.is_file():
        if any(file.name not in (LOG_FILE, LOCK_FILE) for file in output.iterdir()):
            raise EvaluationError(f"{output} holds something else than an evaluation; give another --output")
        return dict(settings)
    before = read_json(path)
    joined = {name: {**before.get(name, {}), **settings[name]} for name in JOINED}
    differing = [
        f"{key} {_short(before.get(key))}, now {_short(settings[key])}"
        for key in settings
        if key not in JOINED and before.get(key) != settings[key]
    ]
    for name, sentence in JOINED.items():
        known = before.get(name, {})
        differing += [sentence.format(key) for key, now in settings[name].items() if known.get(key, now) != now]
    if differing:
        raise EvaluationError(
            f"{output} holds samples that were made otherwise ({'; '.join(differing)}); "
            "give another --output, or remove it"
        )
    return {**settings, **joined}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}…"


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold the folder, made if need be; a second evaluation that wants to write into it is refused.

    Folders that were made here and are still empty at the end are removed.

    Raises:
        EvaluationError: another one holds it, or it can't be made.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_user(output))
        except BlockingIOError as error:
            sentence = f"an evaluation is writing into {output}; wait for it or give another --output"
            raise EvaluationError(sentence) from error
        except OSError as error:
            raise EvaluationError(f"{output} can't be made: {why(error)}") from error
        try:
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()
