"""From scores to Upsilon, the reference and the metrics; numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gcpo.config import GCPOConfig
from gcpo.stage import GroupFeatures, batch_reference, batch_weights, controlled, noise_warning, rollout_metrics


def config(**changes) -> GCPOConfig:
    return GCPOConfig.from_config(changes, n=2, response_length=8)


def group() -> GroupFeatures:
    """Two responses in the plane: z = (1, 0), (0, 1), so zbar = (.5, .5). Shared draw (1, 1), leave-one-out (1, 0)."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    conditioned = torch.tensor([[[[1.0, 1.0]], [[1.0, 0.0]]], [[[1.0, 1.0]], [[1.0, 0.0]]]])
    return GroupFeatures(z, conditioned, torch.ones(2, 2, 1, dtype=torch.bool))


def test_weights_by_hand() -> None:
    """t = (1,1) - (1,0) + (.5,.5) = (.5, 1.5): cosines .5/|t| and 1.5/|t| with |t| = sqrt(2.5), times alpha = 2."""
    weights, metrics = batch_weights([group()], [torch.tensor([1.0, -1.0])], config(preset="balanced"))
    length = math.sqrt(2.5)
    torch.testing.assert_close(weights[0], torch.tensor([1.0 / length, 3.0 / length]))
    assert metrics["gcpo/upsilon/mean"] == pytest.approx(2 / length)
    assert metrics["gcpo/similarity/max"] == pytest.approx(1.5 / length)
    assert metrics["gcpo/upsilon/spread_in_group"] == pytest.approx(math.sqrt(2) / length)
    # A = (1, -1), B = (1, -3)/|t|: cosine (1 + 3) / (sqrt 2 sqrt 10), norm ratio sqrt(10) / |t| / sqrt(2)
    assert metrics["gcpo/advantage/cosine_to_grpo"] == pytest.approx(4 / math.sqrt(20))
    assert metrics["gcpo/advantage/norm_ratio"] == pytest.approx(math.sqrt(10) / length / math.sqrt(2))
    # |Zbar - Zbar'| = 1 for both, |zbar| = sqrt(.5)
    assert metrics["gcpo/causal/shift"] == pytest.approx(1 / math.sqrt(0.5))
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_a_target_the_weight_is_one() -> None:
    """A response whose contexts are missing trains as plain GRPO, and is counted."""
    partial = group()
    partial.valid[0, 0] = False
    weights, metrics = batch_weights([partial], [torch.tensor([1.0, -1.0])], config(preset="balanced"))
    assert weights[0][0] == 1.0 and weights[0][1] != 1.0
    assert metrics["gcpo/upsilon/without_target_share"] == 0.5


def test_other_targets() -> None:
    """group_mean compares with zbar (cosine 1/sqrt 2 for both); conditioned with Zbar' = (1, 0)."""
    advantages = [torch.tensor([1.0, -1.0])]
    mean, _ = batch_weights([group()], advantages, config(preset="balanced", weighting={"target": "group_mean"}))
    torch.testing.assert_close(mean[0], torch.full((2,), 2 / math.sqrt(2)))
    conditioned, _ = batch_weights(
        [group()], advantages, config(preset="balanced", weighting={"target": "conditioned"})
    )
    torch.testing.assert_close(conditioned[0], torch.tensor([2.0, 0.0]))


def test_centring_clamps_at_zero() -> None:
    """Centred on the batch's mean state, opposite states have negative cosines, and a weight never turns A around."""
    weights, metrics = batch_weights(
        [group()], [torch.tensor([1.0, -1.0])], config(preset="balanced", features={"center": "batch"})
    )
    # centred: z = (.5,-.5), (-.5,.5), zbar = 0, t = (0, 1): cosines -1/sqrt 2 -> 0 and 1/sqrt 2
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 2 / math.sqrt(2)]))
    assert metrics["gcpo/upsilon/min"] == 0.0


def test_groups_do_not_mix() -> None:
    """Weights of a group do not depend on the other groups or on the order of its responses."""
    other = GroupFeatures(torch.randn(3, 2), torch.randn(3, 2, 1, 2), torch.ones(3, 2, 1, dtype=torch.bool))
    advantages = [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0, -1.0])]
    both, _ = batch_weights([group(), other], advantages, config(preset="balanced"))
    alone, _ = batch_weights([group()], advantages[:1], config(preset="balanced"))
    torch.testing.assert_close(both[0], alone[0])
    order = torch.tensor([2, 0, 1])
    moved = GroupFeatures(other.z[order], other.conditioned[order], other.valid[order])
    again, _ = batch_weights([moved], advantages[1:], config(preset="balanced"))
    torch.testing.assert_close(again[0], both[1][order])


def test_reference_by_hand() -> None:
    """pi' = p_c - p_marginal + p_q; one token is floored at .01 p_q, one row has no context, one token is padding."""
    p = torch.tensor([[[0.5, 0.1], [0.2, 0.9]], [[0.5, 0.5], [0.5, 0.5]]])
    query = torch.tensor([[0.3, 0.4], [0.3, 0.3]])
    valid = torch.tensor([[True, True], [False, True]])
    mask = torch.tensor([[1, 1], [1, 0]])
    log_ref, kl_mask, metrics = batch_reference(p.log(), valid, query.log(), mask, config(preset="balanced"))
    torch.testing.assert_close(log_ref[0], torch.tensor([0.6, 0.004]).log())
    assert kl_mask.tolist() == [[True, True], [False, False]]
    assert metrics["gcpo/reference/without_share"] == 0.5
    assert metrics["gcpo/reference/floored_share"] == 0.5
    rho = torch.tensor([0.6 / 0.5, 0.004 / 0.1])
    kl = rho - rho.log() - 1
    assert metrics["gcpo/reference/kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert metrics["gcpo/reference/log_ratio_max"] == pytest.approx(math.log(1.2), rel=1e-4)
    assert metrics["gcpo/reference/top_percent_share"] == pytest.approx(float(kl.max() / kl.sum()), rel=1e-5)
    assert metrics["gcpo/reference/capped_share"] == 0.0


def sizes(**values: float) -> dict[str, float]:
    return {"responses": 4.0, **values}


def test_rollout_metrics_by_hand() -> None:
    """Sums over groups, shares of what was drawn, and what the joint answer gains over the responses."""
    stats = [
        {
            "collider/draws": 2.0,
            "collider/ok": 1.0,
            "collider/cut": 1.0,
            "collider/generated_tokens": 30.0,
            "collider/prompt_tokens": 100.0,
            "collider/cached_tokens": 60.0,
            "collider/graded": 1.0,
            "collider/reward": 1.0,
            "graded_response_reward": 0.25,
            "seconds": 2.0,
            **sizes(
                equal_rewards=0.0,
                frame_tokens=20.0,
                block_tokens=8.0,
                response_tokens=10.0,
                response_variance=6.0,
                alike_tokens=3.0,
            ),
        },
        {
            "skipped": 1.0,
            **sizes(
                equal_rewards=1.0,
                frame_tokens=30.0,
                block_tokens=4.0,
                response_tokens=14.0,
                response_variance=2.0,
                alike_tokens=6.0,
            ),
        },
        {"skipped": 1.0, "stage_failed": 1.0},
    ]
    metrics = rollout_metrics(stats, 80)
    assert metrics["gcpo/tokens/generated/response"] == 80
    assert metrics["gcpo/tokens/generated/collider"] == 30
    assert metrics["gcpo/rollout/collider/cut"] == 1
    assert metrics["gcpo/rollout/skipped_groups_share"] == pytest.approx(2 / 3)
    assert metrics["gcpo/tokens/prefix_cache_hit_share"] == 0.6
    assert metrics["gcpo/tokens/cached/collider"] == 60
    assert metrics["gcpo/rollout/equal_rewards_share"] == 0.5 and metrics["gcpo/rollout/alike_tokens"] == 4.5
    assert metrics["gcpo/prompts/frame_tokens"] == 25 and metrics["gcpo/prompts/block_tokens"] == 6
    # The variance in a group is 4, that of the means 8; a mean of 4 responses owes 1 of it to them.
    assert metrics["gcpo/rollout/spread_in_groups"] == pytest.approx(4**0.5 / 12)
    assert metrics["gcpo/rollout/spread_of_groups"] == pytest.approx(7**0.5 / 12)
    alone = rollout_metrics([{"skipped": 1.0, "stage_failed": 1.0}], 80)
    assert not [name for name in alone if "spread" in name or name.startswith("gcpo/prompts/")]


def test_noise_warning() -> None:
    """A reliability within two standard errors of zero is said to be noise; a clear one is not."""
    names = ("gcpo/causal/split_half", "gcpo/causal/split_half_standard_error")
    assert "cannot be told from noise" in noise_warning(dict(zip(names, (0.05, 0.1), strict=True)))
    assert noise_warning(dict(zip(names, (0.5, 0.1), strict=True))) is None
    assert noise_warning({}) is None


def test_controls_keep_the_size_of_the_step() -> None:
    """``mean`` is one weight for all, that of the responses that have an advantage; ``shuffled`` a permutation inside
    each group."""
    weights = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 7.0])]
    advantages = [torch.tensor([0.5, -1.0, 1.0, -0.5]), torch.zeros(2)]
    assert [w.tolist() for w in controlled(weights, advantages, "none", 0)] == [[1, 2, 3, 4], [5, 7]]
    mean = torch.cat(controlled(weights, advantages, "mean", 0))
    torch.testing.assert_close(mean, torch.full((6,), 10 / 4))
    mean = torch.cat(controlled(weights, [torch.zeros(4), torch.zeros(2)], "mean", 0))
    torch.testing.assert_close(mean, torch.full((6,), 22 / 6))
    seen = set()
    for seed in range(40):
        shuffled = controlled(weights, advantages, "shuffled", seed)
        assert [sorted(w.tolist()) for w in shuffled] == [[1, 2, 3, 4], [5, 7]]
        seen.add(tuple(torch.cat(shuffled).tolist()))
    assert len(seen) > 20
    assert [w.tolist() for w in controlled(weights, advantages, "shuffled", 3)] == [
        w.tolist() for w in controlled(weights, advantages, "shuffled", 3)
    ]
