"""Twelve responses in four groups, and Eq. 10 of them in float64 with plain loops over an unsharded model."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

GROUPS = 4
SIZE = 3
ROWS = GROUPS * SIZE
LENGTHS = (7, 1, 5, 8, 3, 6, 2, 8, 4, 7, 1, 6)
UPSILON = (1.7, 0.4, 1.0, -0.3, 1.2, 1.0, 0.8, 2.0, 1.1, 0.9, 1.5, 0.2)
KL_WEIGHT = (1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.5, 1.0, 1.0, 1.0)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.25, 0.0, 1.0, 0.5, 0.0, 1.0)
WITHOUT_TARGET = 2
"""Its weight is 1."""
WITHOUT_REFERENCE = 4
"""It has contexts, and still no reference: no kappa term."""
WITHOUT_CONTEXTS = 9
FIRST_SLOT_MISSING = 6
"""Its reference is under x_{i,1}."""
NUM_SHARED = 2
BETA, KAPPA, MAX_KL, CLIP, DUAL_CLIP = 0.04, 0.5, 10.0, 0.2, 3.0
PARTS = ("policy", "beta", "kappa")

assert UPSILON[WITHOUT_TARGET] == 1.0


@cache
def double_model(path: str) -> Any:
    """The model in float64, without anything of verl."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")


def log_probs(model: Any, context: torch.Tensor, response: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log pi(response | context), one sequence at a time."""
    logits = model(torch.cat([context, response])[None]).logits[0] / temperature
    start = len(context) - 1
    return logits[start : start + len(response)].log_softmax(-1).gather(-1, response[:, None])[:, 0]


def used_context(row: dict[str, Any]) -> torch.Tensor:
    """x_{i,0}, or the first of the shared contexts that is there."""
    return next(context for context in row["contexts"][:NUM_SHARED] if len(context))


def make_rows(path: str) -> list[dict[str, Any]]:
    """The responses with what the old policy knew of them; ratios lie on both sides of every clip."""
    model = double_model(path)
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 320, (length,), generator=generator)

    def near(log_p: torch.Tensor, scale: float) -> torch.Tensor:
        noise = scale * torch.randn(log_p.shape, generator=generator, dtype=torch.float64)
        return (log_p + noise).float()  # what a batch holds

    rows: list[dict[str, Any]] = []
    for i, length in enumerate(LENGTHS):
        if i % SIZE == 0:
            shared = tokens(11)
        prompt = rows[-1]["prompt"] if i % SIZE else tokens(12 + i % 3)
        response = tokens(length)
        # x_{i,0}, x_{i,1}, and one over a leave-one-out draw, which the policy is never conditioned on.
        contexts = [torch.cat([shared, tokens(size)]) for size in (13 + i % 5, 16, 14)]
        if i == FIRST_SLOT_MISSING:
            contexts[0] = contexts[0][:0]
        if i == WITHOUT_CONTEXTS:
            contexts = [context[:0] for context in contexts]
        row = {"prompt": prompt, "response": response, "contexts": contexts, "group": i // SIZE}
        row["kl_weight"] = KL_WEIGHT[i]
        row["has_reference"] = i not in (WITHOUT_REFERENCE, WITHOUT_CONTEXTS)
        with torch.no_grad():
            on_query = log_probs(model, prompt, response)
            on_context = on_query if i == WITHOUT_CONTEXTS else log_probs(model, used_context(row), response)
        row |= {"old": near(on_query, 0.25), "ref": near(on_query, 0.5), "log_ref": near(on_context, 0.7)}
        rows.append(row)
    # Beyond the clip, beyond the dual clip (B < 0 and a ratio over 3), and KL' and KL beyond their caps.
    rows[0]["old"][3] -= 0.8
    rows[3]["old"][0] -= 1.5
    rows[7]["old"][2] -= 1.5
    rows[3]["log_ref"][1] = float(log_probs(model, used_context(rows[3]), rows[3]["response"])[1]) + 3.0
    rows[0]["ref"][2] += 3.0
    return rows


def advantages() -> list[float]:
    """B_i = A_i * Upsilon_i; the standard deviation is unbiased and 1e-6 is added to it, as verl does."""
    weighted = []
    for i in range(ROWS):
        group = torch.tensor(REWARDS[i - i % SIZE : i - i % SIZE + SIZE], dtype=torch.float64)
        weighted.append(float((REWARDS[i] - group.mean()) / (group.std() + 1e-6)) * UPSILON[i])
    return weighted


def objective(
    path: str, rows: list[dict[str, Any]], *, token_mean: bool = False, kappa_context: str = "collider"
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradient of the policy, beta and kappa parts of Eq. 10."""
    model, weighted = double_model(path), advantages()
    tokens = sum(len(row["response"]) for row in rows)
    found = {}
    for part in PARTS:
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for row, advantage in zip(rows, weighted, strict=True):
            if part == "kappa" and not row["has_reference"]:
                continue
            on_context = part == "kappa" and kappa_context == "collider"
            logp = log_probs(model, used_context(row) if on_context else row["prompt"], row["response"])
            for j in range(len(logp)):
                if part == "policy":
                    ratio = (logp[j] - row["old"][j].double()).exp()
                    term = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                    if advantage < 0:
                        term = term.clamp(max=-DUAL_CLIP * advantage)
                else:
                    gap = row["ref" if part == "beta" else "log_ref"][j].double() - logp[j]
                    k3 = (gap.exp() - gap - 1).clamp(max=MAX_KL)
                    term = (BETA if part == "beta" else KAPPA * row["kl_weight"]) * k3
                total = total + term / (tokens if token_mean else len(logp) * ROWS)
        total.backward()
        found[part] = (total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


def together(parts: dict[str, tuple[float, dict[str, torch.Tensor]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the sum of the parts."""
    gradient = {name: sum(part[name] for _, part in parts.values()) for name in parts["policy"][1]}
    return sum(loss for loss, _ in parts.values()), gradient
