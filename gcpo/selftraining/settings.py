"""Settings of self-training. The defaults are those of the released code (THUDM/ReST-MCTS, commit 2d5f488)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gcpo.settings import (
    Count,
    Fraction,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Switch,
)

Text = Annotated[str, Field(min_length=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class StepSettings(Settings):
    """Where a response is split into steps."""

    separator: Text = "\n\n"
    """Text between two steps."""
    until: str = ""
    """After this text the rest of the response is one step, as ``</think>`` for reasoning models; empty: nowhere."""
    min_tokens: CountOrZero = 0
    """Separators end no step that has fewer tokens, so that long responses have steps that a search can count."""
    max_tokens: Count = 256
    """Longest step, in tokens; a longer one is cut and goes on as the next step."""
    min_characters: CountOrZero = 3
    """A shorter step is proposed again."""
    reject_repeated: Switch = True
    """Whether a step whose text stands in the partial solution already is proposed again."""


class SearchSettings(Settings):
    """MCTS* while training data are made."""

    iterations: Count = 50
    """Rounds of select, expand, simulate and back up, for each question."""
    branch: Count = 3
    """Proposals for each expanded node."""
    exploration: NotNegative = 0.5
    """Weight of the visits in the selection rule."""
    unvisited: NotNegative = 0.9
    """Bonus of a child without visits."""
    end_gate: Positive = 0.8
    """From this value on a node is an end. A value above 1 switches the gate off."""
    stop_at_gate: Switch = False
    """Whether the search stops there; otherwise the node is an end and the search goes on."""
    roll_forward_steps: CountOrZero = 1
    """Steps of a simulation."""
    roll_branch: Count = 1
    """Proposals for each step of a simulation; the one of the highest value is taken."""
    alpha: Fraction = 0.5
    """Weight of the best value of the simulation."""
    temperature: NotNegative = 0.7
    """Of the proposals."""
    tries: Count = 3
    """How often a step is asked for until it is accepted."""


class TestSearchSettings(SearchSettings):
    """MCTS* on held-out questions; the defaults of the released evaluate.py."""

    __test__ = False  # pytest collects classes of this name
    iterations: Count = 100
    exploration: NotNegative = 0.4
    unvisited: NotNegative = 0.8
    end_gate: Positive = 0.9
    stop_at_gate: Switch = True
    roll_forward_steps: CountOrZero = 2


class FilterSettings(Settings):
    """Which right solutions the policy is trained on."""

    min_value: Fraction = 0.2
    """Solutions of a lower value are dropped."""
    min_characters: CountOrZero = 50
    """Shorter solutions are dropped."""


class FirstValueSettings(Settings):
    """Data of the first value model, from samples of the policy (ours)."""

    questions: Count = 1000
    """Questions that are sampled, at most those of the first iteration."""
    samples: Count = 4
    """Solutions of a question."""
    rollouts: Count = 4
    """Continuations of each partial solution of a wrong solution."""
    temperature: Positive = 1.0
    """Of the samples and the continuations."""


class SamplingSettings(Settings):
    """Of the method ``rft``."""

    n: Count = 8
    """Samples of each question."""
    temperature: Positive = 1.0
    """Of the samples."""


class SFTSettings(Settings):
    """Fine-tuning of the policy with verl's SFT trainer."""

    start: Literal["previous", "initial"] = "previous"
    """Which policy is fine-tuned: that of the iteration before, or the one that the run started with."""
    epochs: Count = 3
    """Passes over the solutions."""
    learning_rate: Positive = 1e-5
    """Of verl's optimizer."""
    batch_size: Count = 64
    """Solutions of an optimizer step."""
    overrides: list[str] = []
    """Further settings of ``verl.trainer.sft_trainer``, ``key=value``."""


class ValueSettings(Settings):
    """Regression of the value model."""

    model: str = ""
    """Folder or name on the hub of a model with the policy's tokenizer; empty: the policy that the run starts with."""
    epochs: Count = 2
    """Passes over the labels."""
    learning_rate: Positive = 3e-6
    """Of AdamW."""
    batch_size: Count = 3
    """Labels of an optimizer step."""
    max_tokens: Count = 900
    """Longer inputs keep the question and their last tokens."""


class EvaluationSettings(Settings):
    """After each iteration."""

    search_questions: CountOrZero = 0
    """First so many held-out questions on which the test-time search runs; 0: it does not run."""


class SelfTrainingSettings(Settings):
    """A run of ReST-MCTS* or of rejection-sampling fine-tuning."""

    method: Literal["rest_mcts", "rft"] = "rest_mcts"
    """``rft``: sample, keep the right solutions, fine-tune; without a tree and a value model."""
    model: Text
    """Folder or name on the hub of the policy that the run starts with."""
    train_file: Text
    """Parquet in verl's schema."""
    test_file: Text
    """Held-out questions."""
    ood_file: str = ""
    """Out-of-distribution questions; empty: none."""
    iterations: Count = 2
    """Outer iterations."""
    questions: Count | None = None
    """Training questions of an iteration, other ones each time as long as there are; null: all."""
    questions_together: Count = 256
    """Questions that are searched together; a search that was stopped goes on after the last group that finished."""
    max_response_tokens: Count
    """Longest response."""
    labels: Literal["full", "simple"] = "full"
    """Rule of the value labels: that of the released code, or the formula of the paper."""
    seed: Seed = 0
    """Of the questions of an iteration, the requests, the searches and the training."""
    gpus: Count = 1
    """Processes of the SFT trainer, and tensor parallel size of vLLM."""
    engine: dict[str, Any] = {}
    """Further options of ``vllm.LLM``."""
    steps: StepSettings = StepSettings()
    search: SearchSettings = SearchSettings()
    test_search: TestSearchSettings = TestSearchSettings()
    filter: FilterSettings = FilterSettings()
    first_value: FirstValueSettings = FirstValueSettings()
    sampling: SamplingSettings = SamplingSettings()
    sft: SFTSettings = SFTSettings()
    value: ValueSettings = ValueSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("engine", mode="after")
    @classmethod
    def _fixed_options(cls, engine: dict[str, Any]) -> dict[str, Any]:
        taken = {"model", "max_model_len", "tensor_parallel_size", "seed"} & set(engine)
        if taken:
            raise ValueError(f"{min(taken)} follows from other settings; leave it out")
        return engine
