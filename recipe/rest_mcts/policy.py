"""The policy: vLLM's offline engine, which proposes steps and whole responses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcpo.faults import RunStoppedError
from gcpo.seeding import request_seed
from gcpo.selftraining.search import Proposal, Request
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.selftraining.steps import first_step, split
from gcpo.tools.evaluate.models import Model
from gcpo.tools.evaluate.sampling import load_engine


class Policy:
    """A model that vLLM has loaded.

    Attributes:
        tokens: generated so far; those of a step that are cut off behind its separator count.
    """

    def __init__(self, settings: SelfTrainingSettings, model: Model, longest_prompt: int, log: Path) -> None:
        """
        Args:
            settings: of the run.
            model: to load.
            longest_prompt: tokens of the longest question.
            log: file that vLLM prints into.

        Raises:
            EvaluationError: vLLM can't load it.
        """
        from transformers import AutoTokenizer

        self.settings, self.tokens, self._log = settings, 0, log
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model.path)
        options = {
            "max_model_len": longest_prompt + settings.max_response_tokens,
            "tensor_parallel_size": settings.gpus,
            "seed": settings.seed,
        }
        self._engine = load_engine(model, log, {**settings.engine, **options})
        self._piece = functools.cache(lambda token: self.tokenizer.decode([token]))

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.llm_engine.engine_core.shutdown()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without control tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def split(self, tokens: Sequence[int]) -> list[int]:
        """Ends of the steps of a response."""
        steps = self.settings.steps
        return split([self._piece(token) for token in tokens], steps.separator, steps.until, steps.min_tokens)

    def propose(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> list[Proposal]:
        """Continuations of responses.

        Args:
            prompts: token ids of the questions, by index.
            requests: of which each names its question.

        Raises:
            RunStoppedError: vLLM fails.
        """
        made: list[list[int]] = [[] for _ in requests]
        finished = [False] * len(requests)
        by_step = [not request.whole and self._inside(request.prefix) for request in requests]
        waiting = list(range(len(requests)))
        while waiting:
            outputs = self._generate(prompts, [(requests[i], made[i], by_step[i]) for i in waiting])
            still = []
            for index, output in zip(waiting, outputs, strict=True):
                made[index] += output.token_ids
                self.tokens += len(output.token_ids)
                if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
                    finished[index] = True
                elif by_step[index] and not self._ends(made[index], self._room(requests[index], True)):
                    still.append(index)
            waiting = still
        return [self._proposal(*one) for one in zip(requests, made, finished, strict=True)]

    def _ends(self, made: list[int], room: int) -> bool:
        """Whether a step ends here; what stands behind its separator is cut off."""
        steps = self.settings.steps
        end = first_step([self._piece(token) for token in made], steps.separator, steps.min_tokens)
        if end is not None:
            del made[end:]
        return end is not None or len(made) >= room

    def _room(self, request: Request, by_step: bool) -> int:
        """Most tokens of a continuation."""
        room = self.settings.max_response_tokens - len(request.prefix)
        return min(room, self.settings.steps.max_tokens) if by_step else room

    def _inside(self, prefix: Sequence[int]) -> bool:
        """Whether the response is still split into steps after ``prefix``."""
        until = self.settings.steps.until
        return not (until and until in self.tokenizer.decode(list(prefix)))

    def _generate(
        self, prompts: Sequence[Sequence[int]], parts: Sequence[tuple[Request, list[int], bool]]
    ) -> list[Any]:
        from vllm import SamplingParams

        steps, texts, params = self.settings.steps, [], []
        for request, made, by_step in parts:
            room, stop = self._room(request, by_step), {}
            if by_step and len(made) < steps.min_tokens:
                room = min(room, steps.min_tokens)
            elif by_step:
                stop = {"stop": [steps.separator], "include_stop_str_in_output": True}
            texts.append({"prompt_token_ids": [*prompts[request.question], *request.prefix, *made]})
            seed = request_seed(request.seed, len(made))
            params.append(
                SamplingParams(temperature=request.temperature, seed=seed, max_tokens=room - len(made), **stop)
            )
        try:
            return [output.outputs[0] for output in self._engine.generate(texts, params, use_tqdm=False)]
        except Exception as error:
            raise RunStoppedError(f"vLLM stopped; its output is in {self._log}") from error

    def _proposal(self, request: Request, made: list[int], finished: bool) -> Proposal:
        before = self.decode(request.prefix)
        return Proposal(tuple(made), self.decode([*request.prefix, *made])[len(before) :], finished)
