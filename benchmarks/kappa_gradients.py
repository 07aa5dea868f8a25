"""The gradient of the kappa term from the samples of an estimate, for `estimators`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.sampled_groups import Contexts, Group, N, Policy
from gcpo.algorithms import causal_kl, causal_reference

REPEATS = 50
"""Number of random selections of a fraction of the responses."""
BOOTSTRAP = 400


@dataclass(frozen=True)
class Estimate:
    """An estimator of Upsilon: the numbers of draws and generations, the projection and the feature."""

    name: str
    shared: int
    leave_one_out: int = 0
    generations: int = 1
    projection: str = "inclusive"
    source: str = "response"

    @property
    def short(self) -> str:
        """The name in the plot: L or L + L', p for prompt states."""
        if not self.shared:
            return "mean"
        draws = f"{self.shared}+{self.leave_one_out}" if self.leave_one_out else f"{self.shared}"
        return draws + " ex" * (self.projection == "exclusive") + " p" * (self.source == "prompt")


def kappa_gradients(
    policy: Policy, groups: Sequence[Group], contexts: Sequence[Contexts], estimate: Estimate, repeat: int = 0
) -> torch.Tensor:
    """Return the gradient of the mean KL' of every response [G * n, parameters] under the reference of an estimate.

    Every value of ``repeat`` uses other draws.
    """
    first, own_first = repeat * estimate.shared, N + repeat * estimate.leave_one_out
    slots = [*range(first, first + estimate.shared), *range(own_first, own_first + estimate.leave_one_out)]
    rows = []
    for group, own in zip(groups, contexts, strict=True):
        chosen = [[own[i][slot] for slot in slots] for i in range(N)]
        with torch.no_grad():
            targets = [response for response in group.responses for _ in slots]
            flat = policy.log_probs([context for row in chosen for context in row], targets)
            query = policy.log_probs([group.prompt] * N, group.responses)
        for i, response in enumerate(group.responses):
            log_p = torch.stack(flat[i * len(slots) : (i + 1) * len(slots)])[None]
            valid = torch.tensor([[bool(context) for context in chosen[i]]])
            log_ref, present = reference_of(log_p, query[i][None], valid, estimate)
            policy.model.zero_grad()
            context = next((one for one in chosen[i][: estimate.shared] if one), None)
            if present and context is not None:
                (log_prob,) = policy.log_probs([context], [response])
                causal_kl(log_prob[None], log_ref).mean().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.model.parameters()]
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def reference_of(
    log_p: torch.Tensor, query: torch.Tensor, valid: torch.Tensor, estimate: Estimate
) -> tuple[torch.Tensor, bool]:
    """Return a response's reference [1, T], and whether it exists, from log_p [1, L + L', T], shared draws first."""
    count, leave_one_out = estimate.shared, {}
    if estimate.leave_one_out:
        leave_one_out = {"log_p_marginal": log_p[:, count:], "valid_marginal": valid[:, count:]}
    log_ref, _, present = causal_reference(
        log_p[:, :count], query, valid[:, :count], projection=estimate.projection, **leave_one_out
    )
    return log_ref, bool(present)


def by_group(gradients: torch.Tensor) -> torch.Tensor:
    """Return the mean gradient of every group [G, parameters]."""
    return gradients.view(-1, N, gradients.shape[1]).mean(1)


def draw_variance(policy: Policy, groups: Sequence[Group], estimate: Estimate) -> float | None:
    """Return the variance of the batch gradient over disjoint sets of draws, relative to the squared mean gradient."""
    repeats = N // max(estimate.shared, estimate.leave_one_out)
    if repeats < 2:
        return None
    contexts = [group.result.contexts for group in groups]
    batch = torch.stack([kappa_gradients(policy, groups, contexts, estimate, k).mean(0) for k in range(repeats)])
    return float(batch.var(0).sum() / batch.mean(0).square().sum())


def largest_part(gradients: torch.Tensor) -> float:
    """Return the largest fraction of the batch gradient, along its direction, that one group contributes."""
    groups = by_group(gradients)
    whole = groups.sum(0)
    return float((groups @ whole).max() / whole.square().sum())


def fraction_variance(gradients: torch.Tensor, fraction: float, seed: int) -> dict[str, float]:
    """Return the effect of a fraction of a group's responses: mean cosine and relative variance of the gradient."""
    generator = torch.Generator().manual_seed(seed)
    groups = gradients.view(-1, N, gradients.shape[1])
    whole = groups.mean((0, 1))
    count = max(1, round(fraction * N))
    cosines, errors = [], []
    for _ in range(REPEATS):
        part = torch.stack([group[torch.randperm(N, generator=generator)[:count]] for group in groups]).mean((0, 1))
        cosines.append(float(torch.cosine_similarity(part, whole, dim=0)))
        errors.append(float((part - whole).square().sum() / whole.square().sum()))
    return {"fraction": fraction, "cosine": statistics.mean(cosines), "relative variance": statistics.mean(errors)}


def cosine(a: torch.Tensor, b: torch.Tensor, seed: int) -> list[float]:
    """Return the cosine of two batch gradients, and its 95 % percentile interval from bootstrap samples of groups."""
    a, b = by_group(a).double(), by_group(b).double()
    # A bootstrap sample needs only inner products of the groups.
    products = [x @ y.T for x, y in ((a, b), (a, a), (b, b))]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(a), (BOOTSTRAP, len(a)), generator=generator)
    counts = torch.nn.functional.one_hot(draws, len(a)).sum(1).double()
    counts = torch.cat([torch.ones(1, len(a), dtype=torch.float64), counts])
    ab, aa, bb = (torch.einsum("ri,ij,rj->r", counts, product, counts) for product in products)
    cosines = ab / (aa * bb).sqrt()
    low, high = cosines[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [float(cosines[0]), low, high]
