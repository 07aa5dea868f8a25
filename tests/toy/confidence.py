"""A method in one file: each advantage is weighted by the probability that the old policy gave to the response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gcpo.methods import register_method
from gcpo.methods.base import Batch, Credit, Engine, Method, Outcome, Run
from gcpo.methods.fields import PROMPTS, RESPONSES, Field
from gcpo.scoring.requests import ScoreRequest

CONFIDENCE = Field(
    "confidence", torch.float32, "[1]", writer="score", readers="credit", meaning="exp of the mean log-probability."
)


@dataclass(frozen=True)
class ConfidenceCredit(Credit):
    weight: torch.Tensor

    def advantages(self, outcome: Outcome) -> torch.Tensor:
        return outcome.grpo * self.weight[:, None]


@register_method
class Confidence(Method):
    name = "confidence"
    fields = (CONFIDENCE,)
    score_inputs = (PROMPTS, RESPONSES)

    @classmethod
    def parse(cls, settings: Mapping[str, Any], run: Run) -> dict[str, Any]:
        return {"power": float(settings.get("power", 1.0))}

    def score(self, rows: Mapping[Field, list[torch.Tensor]], engine: Engine) -> dict[Field, list[torch.Tensor]]:
        scorer = engine.scorer(-1, packing="tree", min_shared=8, max_tokens=self.run.max_tokens)
        pairs = zip(rows[PROMPTS], rows[RESPONSES], strict=True)
        scores = scorer([ScoreRequest(prompt, response, log_probs=True) for prompt, response in pairs])
        return {CONFIDENCE: [score.log_probs.mean().exp()[None] for score in scores]}

    def credit(self, batch: Batch, metrics: dict[str, float]) -> Credit:
        confidence = torch.cat(batch.fetch(range(batch.size), [CONFIDENCE])[CONFIDENCE])
        metrics["confidence/mean"] = float(confidence.mean())
        return ConfidenceCredit(confidence ** self.settings["power"])
