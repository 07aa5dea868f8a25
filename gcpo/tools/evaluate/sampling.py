"""Sampling with vLLM's offline engine; everything else sees `Request`, `Completion` and a `Sampler`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.models import Model
from gcpo.tools.evaluate.questions import QuestionSet

WAITING = 1024
"""Requests that the engine holds at a time; it batches as many of them as fit."""


@dataclass(frozen=True)
class Request:
    """One sample that is asked for."""

    key: str
    prompt_ids: list[int]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Completion:
    """One sample that is finished; ``finish_reason`` is ``length`` where it was cut, else ``stop``."""

    key: str
    text: str
    token_ids: list[int]
    finish_reason: str


Sampler = Callable[[Sequence[Request]], Iterator[list[Completion]]]
"""Yields what is finished as soon as it is, in any order."""


@dataclass(frozen=True)
class Prompts:
    """The token ids of every question's prompt.

    Attributes:
        ids: by the question's id.
        context: tokens that the model can hold; ``None`` where its configuration doesn't say.
    """

    ids: dict[str, list[int]]
    context: int | None

    def room(self, question: str, max_tokens: int) -> int:
        """Tokens that a response to this question may have."""
        if self.context is None:
            return max_tokens
        return min(max_tokens, self.context - len(self.ids[question]))


def load_tokenizer(model: Model) -> Any:
    """Return the tokenizer of a model.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _loading(model):
        return AutoTokenizer.from_pretrained(model.path)


@contextlib.contextmanager
def _loading(model: Model) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OSError, ValueError, the hub's own errors, whatever remote files hold
        raise EvaluationError(f"the model {model.path} can't be loaded: {_reason(error)}") from error


def make_prompts(model: Model, sets: Sequence[QuestionSet]) -> Prompts:
    """The prompts as training makes them: the model's chat template, and the header of its answer.

    Raises:
        EvaluationError: the model's configuration or tokenizer can't be loaded, it has no chat template, or a prompt
            leaves no room for an answer.
    """
    from transformers import AutoConfig

    with _loading(model):
        config = AutoConfig.from_pretrained(model.path)
    tokenizer = load_tokenizer(model)
    if not tokenizer.chat_template:
        raise EvaluationError(f"the model {model.path} has no chat template, and the questions are chats")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    prompts = Prompts({}, context)
    for found in sets:
        for question in found.questions:
            text = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, tokenize=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            if context is not None and len(ids) >= context:
                raise EvaluationError(
                    f"the prompt in row {question.row} of {found.path} has {len(ids)} tokens and the model's context "
                    f"is {context}: no room for an answer; leave the row out or take another model"
                )
            prompts.ids[question.id] = ids
    return prompts


CPU_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    # vLLM rewinds the generator of a seeded request whose prompt it chunks, and a CPU generator cannot be rewound.
    "enable_chunked_prefill": False,
    # vLLM would take 92 % of the machine's memory, and refuse if less is free.
    "kv_cache_memory_bytes": 2**30,
}
"""Options of ``vllm.LLM`` on a machine without accelerator."""


def vllm_sampler(model: Model, log: Path, *, temperature: float, top_p: float, **engine_options: Any) -> Sampler:
    """Start vLLM with the model.

    Args:
        model: what to load.
        log: what vLLM and its processes print is added to this file.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with this probability.
        engine_options: of ``vllm.LLM``: ``max_model_len`` in tokens, ``tensor_parallel_size`` in GPUs.

    Raises:
        EvaluationError: vLLM can't load it.
    """
    engine = load_engine(model, log, engine_options).llm_engine
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # The model's generation_config.json says nothing here: what isn't set is off, as in training.
    fixed = {"temperature": temperature, "top_p": top_p, "output_kind": RequestOutputKind.FINAL_ONLY}

    def sample(requests: Sequence[Request]) -> Iterator[list[Completion]]:
        rest = iter(requests)
        waiting = 0
        while True:
            for request in itertools.islice(rest, WAITING - waiting):
                params = SamplingParams(max_tokens=request.max_tokens, seed=request.seed, **fixed)
                engine.add_request(request.key, {"prompt_token_ids": request.prompt_ids}, params)
                waiting += 1
            if not waiting:
                return
            try:
                finished = [output for output in engine.step() if output.finished]
            except Exception as error:
                raise EvaluationError(f"vLLM stopped: {error} (see {log}); the same command goes on") from error
            waiting -= len(finished)
            if finished:
                yield [_completion(output) for output in finished]

    return sample


def load_engine(model: Model, log: Path, options: dict[str, Any]) -> Any:
    """Start a ``vllm.LLM``; the arguments are those of `vllm_sampler`.

    Raises:
        EvaluationError: vLLM can't load the model.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from gcpo.cpu import is_cpu_profile

    if is_cpu_profile():
        # Its processes would import all packages twice more, and take turns with this one.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options = {**CPU_OPTIONS, **options}
    try:
        with _printing_into(log):
            from vllm import LLM

            engine = LLM(model=model.path, **options)
    except Exception as error:  # whatever the engine's processes die of
        reason = start_failure(error, log)
        raise EvaluationError(f"vLLM can't load {model.path}: {reason} (all of it is in {log})") from error
    logging.getLogger("vllm").setLevel(logging.ERROR)  # from here on this process prints to the terminal again
    return engine


_CAUSE = re.compile(r"^\(\w[^)]*\) ERROR .*?\] ([\w.]*(?:Error|Exception): .+)$", re.MULTILINE)
"""Last line of an exception in a process of vLLM."""


def start_failure(error: Exception, log: Path) -> str:
    """Return why vLLM did not start: its error, or the error of one of its processes, which only the log has."""
    reason = _reason(error)
    if "root cause" not in reason:
        return reason
    causes = [cause for cause in _CAUSE.findall(log.read_text(errors="replace")) if "root cause" not in cause]
    return causes[-1] if causes else reason


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _printing_into(log: Path) -> Iterator[None]:
    """Send what is printed here to a file, and what processes that are started here print, as long as they live."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with log.open("ab") as file:
            for number in kept:
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _completion(output: Any) -> Completion:
    (sample,) = output.outputs
    return Completion(output.request_id, sample.text, list(sample.token_ids), str(sample.finish_reason))
