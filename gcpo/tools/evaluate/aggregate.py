"""Aggregated answers: the model answers a question again after K of its samples, as in a collider draw of training.

The code of training builds the prompts, from the token ids of the samples and the settings ``gcpo.blocks``. The answers
are sampled like the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gcpo.collider.prompts import CandidatePrompts
from gcpo.methods.gcpo.settings import BlocksConfig, BlocksSettings
from gcpo.seeding import request_seed
from gcpo.settings import ConfigError
from gcpo.tools.evaluate import EvaluationError
from gcpo.tools.evaluate.models import Model
from gcpo.tools.evaluate.questions import Question, QuestionSet
from gcpo.tools.evaluate.run import Settings
from gcpo.tools.evaluate.samples import SampleFile
from gcpo.tools.evaluate.sampling import Request, load_tokenizer

GROUP = "gcpo.blocks"


def parse_blocks(overrides: Sequence[str], max_tokens: int) -> BlocksConfig:
    """Return the settings of the blocks.

    Args:
        overrides: settings ``gcpo.blocks.KEY=VALUE``, as on the command line of a training run.
        max_tokens: largest number of tokens of a sample, and of a block unless ``overrides`` sets it.

    Raises:
        EvaluationError: an override is no setting of the blocks, or its value is refused.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    other = next((text for text in overrides if not text.startswith(f"{GROUP}.") or "=" not in text), None)
    if other is not None:
        raise EvaluationError(f"{other} is no option and no setting {GROUP}.KEY=VALUE (see --help)")
    try:
        written = OmegaConf.to_container(OmegaConf.from_dotlist([text.removeprefix(f"{GROUP}.") for text in overrides]))
        known = BlocksSettings.parse(written, GROUP)
        return BlocksConfig.parse({**known.to_dict(), "max_tokens": known.max_tokens or max_tokens}, GROUP)
    except ConfigError as error:
        raise EvaluationError(str(error)) from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise EvaluationError(f"{' '.join(overrides)} cannot be read as settings; put texts in quotes") from error


@dataclass(frozen=True)
class Aggregation:
    """Settings of the aggregated answers.

    Attributes:
        size: K, the number of samples in a prompt.
        blocks: form of a sample in a prompt.
        prompts: builder of the prompts.
        max_tokens: largest number of tokens of an answer.
        seed: seed of the evaluation.
    """

    size: int
    blocks: BlocksConfig
    prompts: CandidatePrompts
    max_tokens: int
    seed: int

    def longest(self, sets: Sequence[QuestionSet]) -> int:
        """Return an upper bound of the tokens of a prompt and its answer."""
        frames = [self.prompts.frame(question.prompt) for found in sets for question in found.questions]
        block = self.prompts.max_label_tokens(self.size) + min(self.blocks.max_tokens, self.max_tokens)
        return max(len(frame.head) + len(frame.tail) for frame in frames) + self.size * block + self.max_tokens

    def prompt(self, messages: Sequence[dict[str, Any]], candidates: Sequence[Sequence[int]], seed: int) -> list[int]:
        """Return the prompt of a shared collider draw over these candidates.

        Training has no groups of one; their prompt has one block.

        Args:
            messages: the question as chat messages.
            candidates: token ids of the K samples.
            seed: determines the order of the blocks.
        """
        if len(candidates) == 1:
            return self.prompts.join(self.prompts.frame(messages), [self.prompts.candidate_block(0, candidates[0])])
        order = np.random.default_rng(seed).permutation(len(candidates)).tolist()
        return self.prompts.group(messages, candidates, permutation=order).collider_prompt()

    def requester(self, samples: SampleFile) -> Callable[[Question, int], Request]:
        """Return ``request(question, group)``, which makes the request for the answer to one group of samples.

        Group g consists of the samples g K to (g + 1) K - 1 of its question, which must be in ``samples``.

        Args:
            samples: the samples of the set.
        """
        ids: dict[tuple[str, int], list[int]] = {}

        def request(question: Question, group: int) -> Request:
            if not ids:
                ids.update(samples.token_ids())
            candidates = [ids[question.id, k] for k in range(group * self.size, (group + 1) * self.size)]
            place = ("aggregate", self.size, question.id, group)
            order = request_seed(self.seed, "order", *place)
            return Request(
                key=f"{question.id}:{group}",
                prompt_ids=self.prompt(question.prompt, candidates, order),
                seed=request_seed(self.seed, *place),
                max_tokens=self.max_tokens,
            )

        return request


def make_aggregation(
    model: Model,
    sets: Sequence[QuestionSet],
    context: int | None,
    size: int,
    overrides: Sequence[str],
    settings: Settings,
) -> Aggregation:
    """Check ``--aggregate``, and return its settings.

    Args:
        model: the model, whose tokenizer and chat template make the prompts.
        sets: the question sets.
        context: tokens in the context of the model; ``None`` if its configuration does not tell.
        size: K, the number of samples in a prompt.
        overrides: see `parse_blocks`.
        settings: settings of the evaluation.

    Raises:
        EvaluationError: there are fewer samples than K, or a prompt with K samples does not fit into the context.
    """
    from gcpo.methods.gcpo.method import make_prompts  # imports torch

    if not 1 <= size <= settings.samples:
        raise EvaluationError(
            f"--aggregate is {size} and --samples is {settings.samples}; K samples of a question are put into a "
            "prompt: set K to 1 or more, and --samples to K or more"
        )
    blocks = parse_blocks(overrides, settings.max_tokens)
    prompts = make_prompts(blocks, load_tokenizer(model))
    made = Aggregation(size, blocks, prompts, settings.max_tokens, settings.seed)
    longest = made.longest(sets)
    if context is not None and longest > context:
        raise EvaluationError(
            f"a prompt with {size} samples can take {longest:,} tokens with its answer, and the model's context is "
            f"{context:,}: lower {GROUP}.max_tokens (now {blocks.max_tokens:,}), --max-tokens or --aggregate"
        )
    if settings.samples % size:
        print(f"note: {settings.samples % size} of the {settings.samples} samples of every question are in no group")
    return made
