"""Rewards of episodes and their spread over tokens (GC2PO, L2T)."""

from __future__ import annotations

import torch
from torch import Tensor

from gcpo.algorithms._checks import as_float, as_mask, check_at_least, check_integer, check_shape, or_one
from gcpo.algorithms.advantage import group_relative_advantage

MAX_SURPRISE = 1e4
"""Bound on -log pi of one token, so that a probability of zero takes its episode's share and makes no NaN."""


@torch.no_grad()
def episode_reward(
    outcome: Tensor,
    robustness: Tensor,
    effectiveness: Tensor,
    episode_mask: Tensor,
    *,
    robustness_weight: float = 0.9,
    effectiveness_weight: float = 0.8,
) -> Tensor:
    """Computes the reward of every episode, R_ik = (r_out,i + a * (r_rob + b * r_eff)) / K_i.

    See "Towards Generalizable Reasoning: Group Causal Counterfactual Policy Optimization for LLM Reasoning"
    (arXiv 2602.06475); the formula is our reading of its description (docs/fidelity.md).

    Args:
        outcome: [n], the outcome rewards r_out of a group.
        robustness: [n, K], r_rob.
        effectiveness: [n, K], r_eff.
        episode_mask: [n, K], which episodes exist; K_i is their number. What the others hold is never read.
        robustness_weight: a, the weight of the process part.
        effectiveness_weight: b, the weight of effectiveness inside it.

    Returns:
        [n, K], zeros where there is no episode; float64 if an input is, else float32. No gradient.

    Raises:
        ValueError: Shapes that do not fit.
    """
    sizes: dict[str, int] = {}
    check_shape("outcome", outcome, "n", sizes)
    check_shape("robustness", robustness, "n K", sizes)
    check_shape("effectiveness", effectiveness, "n K", sizes)
    exists = as_mask("episode_mask", episode_mask, robustness, "n K", sizes)
    outcome, robustness, effectiveness = as_float(outcome, robustness, effectiveness)
    number = exists.sum(-1, keepdim=True).clamp(min=1)
    process = robustness_weight * (robustness + effectiveness_weight * effectiveness)
    return torch.where(exists, (outcome.unsqueeze(-1) + process) / number, 0)


@torch.no_grad()
def answer_divergence(scores: Tensor) -> Tensor:
    """Computes KL(q(.|h) || q(.|h + g_m)) over the answers, for every perturbation g_m.

    See "Towards Generalizable Reasoning: Group Causal Counterfactual Policy Optimization for LLM Reasoning"
    (arXiv 2602.06475).

    Args:
        scores: [..., 1 + M, A], length-normalised log-probabilities of the answers, unperturbed ones first.

    Returns:
        [..., M], at least 0, float64.
    """
    log_q = scores.double().log_softmax(-1)
    base = log_q[..., :1, :]
    return (base.exp() * (base - log_q[..., 1:, :])).sum(-1).clamp(min=0)


@torch.no_grad()
def fitting_gain_reward(
    outcome: Tensor,
    gain: Tensor,
    episode_mask: Tensor,
    *,
    alpha: float = 0.8,
    penalty: Tensor | None = None,
    beta: float = 0.6,
) -> Tensor:
    """Computes the reward of every episode, R_ik = r_out,i / K_i + alpha * (gain_ik - beta * C_ik).

    See "Learning to Think: Information-Theoretic Reinforcement Fine-Tuning for LLMs" (arXiv 2505.10425),
    section 4.

    Args:
        outcome: [n], the outcome rewards r_out of a group.
        gain: [n, K], J_ik - J_i,k-1: the rise of the probability of the right answer over the episode.
        episode_mask: [n, K], which episodes exist; K_i is their number. What the others hold is never read.
        alpha: The weight of the process part.
        penalty: [n, K], C_ik; None: 0.
        beta: The weight of the penalty inside the process part.

    Returns:
        [n, K], zeros where there is no episode; may be negative; float64 if an input is, else float32. No gradient.

    Raises:
        ValueError: Shapes that do not fit.
    """
    sizes: dict[str, int] = {}
    check_shape("outcome", outcome, "n", sizes)
    check_shape("gain", gain, "n K", sizes)
    exists = as_mask("episode_mask", episode_mask, gain, "n K", sizes)
    penalty = torch.zeros_like(gain) if penalty is None else penalty
    check_shape("penalty", penalty, "n K", sizes)
    outcome, gain, penalty = as_float(outcome, gain, penalty)
    number = exists.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(exists, outcome.unsqueeze(-1) / number + alpha * (gain - beta * penalty), 0)


@torch.no_grad()
def token_advantage(
    episode_reward: Tensor,
    episode_index: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    *,
    trim: float = 0.05,
    length_correction: bool = True,
    max_ratio: float = 10.0,
    eps: float = 1e-6,
    signed: bool = False,
) -> Tensor:
    """Computes token advantages from episode rewards: surprise weights, a trimmed mean, then the group.

    See "Towards Generalizable Reasoning: Group Causal Counterfactual Policy Optimization for LLM Reasoning"
    (arXiv 2602.06475); the formulas are our reading of its description (docs/fidelity.md). T_i is the number
    of response tokens inside episodes:

    - r_it = R_ik * w_it, w the tokens' shares of their episode's surprise -log pi_old (even shares where it
      is 0);
    - r~_i = T_i * the mean of r_it without the floor(trim/2 * T_i) lowest and as many highest;
    - A^_i = (r~_i - mean) / (std + eps) over the group, as in `group_relative_advantage`;
    - A_it = A^_i * min(r_it * T_i / max(r~_i, eps), max_ratio), and A^_i for response tokens outside any
      episode.

    The last line expects rewards of at least 0: under a negative r~_i its ratio is unbounded below. With
    ``signed`` rewards may be negative (L2T): where the r~_i of the last line is at most eps, all tokens of the
    response get A^_i; elsewhere the ratio is clamped to [0, max_ratio]. `signed_cases` finds these places.

    Args:
        episode_reward: [n, K], R_ik of one group.
        episode_index: [n, T], integers, the episode of each token; negative = none.
        old_log_prob: [n, T], log pi_old of each token; a positive one counts as 0.
        response_mask: [n, T], which tokens belong to the response. What the others hold is never read.
        trim: Share of the tokens that the mean leaves out, half of it on each side; in [0, 1).
        length_correction: Whether r~ that enters the group has the factor T_i; the last line's has it always.
        max_ratio: Bound on a token's share relative to the mean.
        eps: Added to the deviation, and the bound of the last line's denominator.
        signed: Whether rewards may be negative.

    Returns:
        [n, T], zeros outside the response; float64 if an input is, else float32. No gradient.

    Raises:
        ValueError: Shapes that do not fit, a ``trim`` outside [0, 1), an index that is not an integer, or a
            response token in an episode that ``episode_reward`` has no column for.
    """
    response, token_reward, inside = _token_rewards(episode_reward, episode_index, old_log_prob, response_mask)
    check_at_least("max_ratio", max_ratio, 0)
    length = inside.sum(-1)
    mean = _trimmed_mean(token_reward, inside, trim)
    total = length * mean
    score = total if length_correction else mean
    advantage = group_relative_advantage(score, torch.zeros_like(length), eps=eps).unsqueeze(-1)
    ratio = token_reward * length.unsqueeze(-1) / total.clamp(min=eps).unsqueeze(-1)
    ratio = ratio.clamp(max=max_ratio)
    if signed:
        ratio = torch.where(total.unsqueeze(-1) > eps, ratio.clamp(min=0), 1)
    advantage = torch.where(inside, advantage * ratio, advantage)
    return torch.where(response, advantage, 0)


@torch.no_grad()
def signed_cases(
    episode_reward: Tensor,
    episode_index: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    *,
    trim: float = 0.05,
    max_ratio: float = 10.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Finds where the rules of `token_advantage` with ``signed`` act, for counting them.

    Args:
        episode_reward: [n, K], as for `token_advantage`; so are the others.
        episode_index: [n, T].
        old_log_prob: [n, T].
        response_mask: [n, T].
        trim: Share of the tokens that the mean leaves out.
        max_ratio: Bound on a token's share relative to the mean.
        eps: Bound of r~.

    Returns:
        ``(even, clamped)``: bool [n], responses with tokens in episodes whose r~ is at most eps, so that all their
        tokens get A^; and bool [n, T], tokens of the other responses whose ratio is clamped.

    Raises:
        ValueError: As for `token_advantage`.
    """
    _, token_reward, inside = _token_rewards(episode_reward, episode_index, old_log_prob, response_mask)
    length = inside.sum(-1)
    total = length * _trimmed_mean(token_reward, inside, trim)
    ratio = token_reward * length.unsqueeze(-1) / total.clamp(min=eps).unsqueeze(-1)
    positive = total > eps
    clamped = positive.unsqueeze(-1) & ((ratio < 0) | (ratio > max_ratio))
    return (length > 0) & ~positive, clamped


def _token_rewards(
    episode_reward: Tensor, episode_index: Tensor, old_log_prob: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens belong to the response, r_it, and which tokens are in an episode; all [n, T]."""
    response, episode = _tokens(episode_reward, episode_index, old_log_prob, response_mask)
    reward, log_prob = as_float(episode_reward, old_log_prob)
    return response, _spread(reward, episode, log_prob), episode >= 0


def _tokens(
    episode_reward: Tensor, episode_index: Tensor, old_log_prob: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Which tokens belong to the response, bool [n, T], and their episodes [n, T], -1 elsewhere; all checked."""
    sizes: dict[str, int] = {}
    check_shape("episode_reward", episode_reward, "n K", sizes)
    check_shape("episode_index", episode_index, "n T", sizes)
    check_integer("episode_index", episode_index)
    check_shape("old_log_prob", old_log_prob, "n T", sizes)
    response = as_mask("response_mask", response_mask, old_log_prob, "n T", sizes)
    episode = torch.where(response, episode_index, -1)
    if (episode >= sizes["K"]).any():
        raise ValueError(f"episode_index holds {int(episode.max())} where episode_reward has {sizes['K']} columns.")
    return response, episode


def _spread(reward: Tensor, episode: Tensor, log_prob: Tensor) -> Tensor:
    """Each token's share of its episode's reward [n, T], zeros for tokens whose episode is negative."""
    inside = episode >= 0
    columns = torch.arange(reward.shape[1], device=reward.device)
    member = episode.unsqueeze(1) == columns.view(1, -1, 1)  # [n, K, T]
    surprise = torch.where(inside, (-log_prob).clamp(0, MAX_SURPRISE), 0)
    per_episode = torch.where(member, surprise.unsqueeze(1), 0).sum(-1)
    # An episode without any surprise: all its tokens weigh the same.
    weight = torch.where(per_episode.unsqueeze(-1) > 0, surprise.unsqueeze(1), 1)
    share = torch.where(member, weight, 0)
    share = share / or_one(share.sum(-1, keepdim=True))
    return torch.where(member, reward.unsqueeze(-1) * share, 0).sum(1)


def _trimmed_mean(x: Tensor, inside: Tensor, trim: float) -> Tensor:
    """Mean of each row's tokens inside [n, T] without the floor(trim/2 * count) lowest and highest; [n]."""
    if not 0 <= trim < 1:
        raise ValueError(f"trim is {trim} where a number in [0, 1) is expected.")
    count = inside.sum(-1, keepdim=True)
    # The small number is for products such as 0.15 * 20 that may round to just below an integer.
    cut = torch.floor(trim / 2 * count.double() + 1e-9).long()
    ordered = torch.where(inside, x, torch.inf).sort(-1).values
    rank = torch.arange(x.shape[1], device=x.device)
    kept = (rank >= cut) & (rank < count - cut)
    return torch.where(kept, ordered, 0).sum(-1) / kept.sum(-1).clamp(min=1)
