"""From scores to Upsilon, the reference and the metrics; numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gcpo.methods.gcpo.reference import ReferenceStage
from gcpo.methods.gcpo.rollout import response_stats
from gcpo.methods.gcpo.rollout_metrics import rollout_metrics
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.methods.gcpo.upsilon import BatchWeights, GroupFeatures, batch_weights, controlled, filled, noise_warning


def config(**changes) -> GCPOConfig:
    return GCPOConfig.from_config(changes, n=2, response_length=8)


def group() -> GroupFeatures:
    """Two responses in the plane: z = (1, 0), (0, 1), so zbar = (.5, .5). Shared draw (1, 1), leave-one-out (1, 0)."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    conditioned = torch.tensor([[[[1.0, 1.0]], [[1.0, 0.0]]], [[[1.0, 1.0]], [[1.0, 0.0]]]])
    return GroupFeatures(z, conditioned, torch.ones(2, 2, 1, dtype=torch.bool))


def weigh(groups: list[GroupFeatures], advantages: list[torch.Tensor] | None = None, **changes) -> BatchWeights:
    """Upsilon with preset ``balanced``; A is (1, -1) in every group unless it is given."""
    advantages = [torch.tensor([1.0, -1.0])] * len(groups) if advantages is None else advantages
    mean = torch.cat([one.z for one in groups]).mean(0)
    return batch_weights(groups, advantages, config(preset="balanced", **changes), mean=mean)


def test_weights_by_hand() -> None:
    """t = (1,1) - (1,0) + (.5,.5) = (.5, 1.5): cosines .5/|t| and 1.5/|t| with |t| = sqrt(2.5), times alpha = 2."""
    found = weigh([group()])
    weights, metrics = found.weights, found.metrics
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


def test_upsilon_of_better_and_worse_responses() -> None:
    """By the sign of A, over the responses that have a target; equal rewards are left out."""
    lost = group()
    lost.valid[0, 0] = False  # the first response has no target
    signs = [torch.tensor(pair) for pair in ([1.0, -1.0], [0.0, 0.0], [1.0, -1.0], [-1.0, 0.0])]
    found = weigh([group(), group(), lost, lost], signs)
    first, second = found.weights[0].tolist()
    assert found.metrics["gcpo/upsilon/mean_above"] == pytest.approx(first)
    assert found.metrics["gcpo/upsilon/mean_below"] == pytest.approx(second)
    assert "gcpo/upsilon/mean_above" not in weigh([group()], [torch.zeros(2)]).metrics


def test_a_response_without_a_target_gets_the_mean_of_the_batch() -> None:
    """The mean runs over all responses that have a target, of other groups too; ``one`` gives 1, and so does ``mean``
    where no response has one. Both are counted."""
    partial, none = group(), group()
    partial.valid[0, 0] = False
    none.valid[:] = False
    whole = weigh([group()]).weights[0]
    found = weigh([partial, none, group()])
    mean = float((whole[1] + whole.sum()) / 3)
    torch.testing.assert_close(torch.cat(found.weights), torch.tensor([mean, whole[1], mean, mean, *whole]))
    assert torch.cat(found.has_target).tolist() == [False, True, False, False, True, True]
    assert found.metrics["gcpo/upsilon/mean"] == pytest.approx(mean)
    found = weigh([partial, none, group()], weighting={"missing": "one"})
    torch.testing.assert_close(torch.cat(found.weights), torch.tensor([1.0, whole[1], 1.0, 1.0, *whole]))
    assert torch.equal(torch.cat(weigh([none, none]).weights), torch.ones(4))


def test_the_placeholder_is_not_read() -> None:
    """Whatever stands in a row without a target, NaN included, is replaced."""
    weights, has = (
        [torch.tensor([math.nan, 3.0]), torch.tensor([1.0])],
        [torch.tensor([0, 1]) > 0, torch.tensor([True])],
    )
    assert torch.cat(filled(weights, has, "mean")).tolist() == [2.0, 3.0, 1.0]
    assert torch.cat(filled(weights, has, "one")).tolist() == [1.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="center=batch needs the mean"):
        batch_weights([group()], [torch.zeros(2)], config(preset="balanced", features={"center": "batch"}))


def test_metrics_of_signed_advantages() -> None:
    """Upsilon = (1, 3)/|t| has the mean 2/|t|; A = (1, -1) gives B = (1 - 1/|t|, -1 + 1/|t|): the same direction. The
    row without a target in the second group keeps B = A, and the only other one is its own mean."""
    partial = group()
    partial.valid[0, 0] = False
    metrics = weigh([group()], advantage={"form": "signed"}).metrics
    assert metrics["gcpo/advantage/cosine_to_grpo"] == pytest.approx(1.0)
    assert metrics["gcpo/advantage/norm_ratio"] == pytest.approx(1 - 1 / math.sqrt(2.5))
    metrics = weigh([partial], advantage={"form": "signed"}).metrics
    assert metrics["gcpo/advantage/norm_ratio"] == pytest.approx(1.0)


def test_other_targets() -> None:
    """group_mean compares with zbar (cosine 1/sqrt 2 for both); conditioned with Zbar' = (1, 0)."""
    mean = weigh([group()], weighting={"target": "group_mean"}).weights
    torch.testing.assert_close(mean[0], torch.full((2,), 2 / math.sqrt(2)))
    conditioned = weigh([group()], weighting={"target": "conditioned"}).weights
    torch.testing.assert_close(conditioned[0], torch.tensor([2.0, 0.0]))


def test_centring_clamps_at_zero() -> None:
    """Centred on the batch's mean state, opposite states have negative cosines, and a weight never turns A around."""
    found = weigh([group()], features={"center": "batch"})
    # centred: z = (.5,-.5), (-.5,.5), zbar = 0, t = (0, 1): cosines -1/sqrt 2 -> 0 and 1/sqrt 2
    torch.testing.assert_close(found.weights[0], torch.tensor([0.0, 2 / math.sqrt(2)]))
    assert found.metrics["gcpo/upsilon/min"] == 0.0


def test_centring_moves_generated_states_too() -> None:
    """z and Z are centred on the same mean: with Zbar' as the target, Z left where it was has another direction.

    The mean of z is (.5, .5). z = (.5, -.5), (-.5, .5); Zbar' = (1, 0) becomes (.5, -.5): cosines 1 and -1.
    """
    weights = weigh([group()], weighting={"target": "conditioned"}, features={"center": "batch"}).weights
    torch.testing.assert_close(weights[0], torch.tensor([2.0, 0.0]))


def test_centring_is_over_the_batch() -> None:
    """One mean for all groups: that of z only, not of each group and not of Z."""
    other = GroupFeatures(group().z + 2.0, group().conditioned + 5.0, group().valid)
    weights = weigh([group(), other], weighting={"target": "conditioned"}, features={"center": "batch"}).weights
    # Less the mean of z, (1.5, 1.5): z = (-.5, -1.5), (-1.5, -.5) and (1.5, .5), (.5, 1.5),
    # Zbar' = (-.5, -1.5) and (4.5, 3.5).
    cosine = torch.nn.functional.cosine_similarity
    first = cosine(torch.tensor([[-0.5, -1.5], [-1.5, -0.5]]), torch.tensor([[-0.5, -1.5]]))
    second = cosine(torch.tensor([[1.5, 0.5], [0.5, 1.5]]), torch.tensor([[4.5, 3.5]]))
    torch.testing.assert_close(weights[0], 2 * first)
    torch.testing.assert_close(weights[1], 2 * second)


def test_groups_do_not_mix() -> None:
    """Weights of a group do not depend on the other groups or on the order of its responses."""
    other = GroupFeatures(torch.randn(3, 2), torch.randn(3, 2, 1, 2), torch.ones(3, 2, 1, dtype=torch.bool))
    advantages = [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0, -1.0])]
    both = weigh([group(), other], advantages).weights
    alone = weigh([group()], advantages[:1]).weights
    torch.testing.assert_close(both[0], alone[0])
    order = torch.tensor([2, 0, 1])
    moved = GroupFeatures(other.z[order], other.conditioned[order], other.valid[order])
    again = weigh([moved], advantages[1:]).weights
    torch.testing.assert_close(again[0], both[1][order])


def test_reference_by_hand() -> None:
    """pi' = p_c - p_marginal + p_q; one token is floored at .01 p_q, one row has no context, one token is padding."""
    p = torch.tensor([[[0.5, 0.1], [0.2, 0.9]], [[0.5, 0.5], [0.5, 0.5]]])
    query = torch.tensor([[0.3, 0.4], [0.3, 0.3]])
    valid = torch.tensor([[True, True], [False, True]])
    mask = torch.tensor([[1, 1], [1, 0]])
    stage = ReferenceStage(config(preset="balanced"))
    found = [stage.add(*row) for row in zip(p.log(), valid, query.log(), mask, strict=True)]
    torch.testing.assert_close(found[0][0], torch.tensor([0.6, 0.004]).log())
    assert [kl_mask.tolist() for _, kl_mask in found] == [[True, True], [False, False]]
    assert (stage.count.asked, stage.count.missing) == (2, 1)
    metrics = stage.metrics()
    assert metrics["gcpo/reference/floored_frac"] == 0.5
    rho = torch.tensor([0.6 / 0.5, 0.004 / 0.1])
    kl = rho - rho.log() - 1
    assert metrics["gcpo/reference/kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert metrics["gcpo/reference/log_ratio_max"] == pytest.approx(math.log(1.2), rel=1e-4)
    assert metrics["gcpo/reference/top_percent_frac"] == pytest.approx(float(kl.max() / kl.sum()), rel=1e-5)
    assert metrics["gcpo/reference/capped_frac"] == 0.0


def test_references_of_responses_that_are_not_chosen() -> None:
    """A response without a kappa term, and a row without a response token, ask for no reference; NaN in a context that
    is not valid reaches neither the reference nor a metric."""
    log_p = torch.tensor([[-1.0, -2.0], [-1.5, -1.0]])
    stage = ReferenceStage(config(preset="balanced"))
    query, valid = torch.tensor([-1.0, -1.0]), torch.tensor([True, True])
    assert not stage.add(log_p, valid, query, torch.ones(2), chosen=False)[1].any()
    assert not stage.add(log_p, valid, query, torch.zeros(2))[1].any()
    assert (stage.count.asked, stage.count.missing) == (0, 0) and stage.metrics() == {}
    three = ReferenceStage(config(preset="balanced", collider={"num_draws": 2}))
    lost = torch.stack([log_p[0], torch.full((2,), math.nan), log_p[1]])
    log_ref, kl_mask = three.add(lost, torch.tensor([True, False, True]), query, torch.ones(2))
    torch.testing.assert_close(log_ref, stage.add(log_p, valid, query, torch.ones(2))[0])
    assert kl_mask.all() and all(math.isfinite(value) for value in three.metrics().values())


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
            "graded/response": 0.25,
            "graded/oracle": 1.0,
            "graded/majority": 0.5,
            "seconds": 2.0,
            **sizes(
                equal_rewards=0.0,
                frame_tokens=20.0,
                block_tokens=8.0,
                response_tokens=10.0,
                response_variance=6.0,
                common_prefix_tokens=3.0,
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
                common_prefix_tokens=6.0,
            ),
        },
        {"skipped": 1.0, "stage_failed": 1.0},
        # Its responses are graded and have no answer, its two collider draws are wrong.
        {"collider/graded": 2.0, "collider/reward": 0.0, "graded/response": 0.0, "graded/oracle": 0.0},
        # No collider draw is valid here, so the other groups are compared.
        {"collider/graded": 0.0, "graded/response": 1.0, "graded/oracle": 1.0, "graded/majority": 1.0},
    ]
    metrics = rollout_metrics(stats, 80)
    rewards = {name.rpartition("/")[2]: value for name, value in metrics.items() if name.startswith("gcpo/reward/")}
    assert rewards == pytest.approx(
        {"collider": 1 / 3, "response": 0.125, "majority": 0.25, "oracle": 0.5, "collider_gain": 1 / 3 - 0.125}
    )
    assert metrics["gcpo/tokens/generated/response"] == 80
    assert metrics["gcpo/tokens/generated/collider"] == 30
    assert metrics["gcpo/rollout/collider/cut"] == 1
    assert metrics["gcpo/rollout/skipped_groups_frac"] == pytest.approx(2 / 5)
    assert metrics["gcpo/tokens/prefix_cache_hit_frac"] == 0.6
    assert metrics["gcpo/tokens/cached/collider"] == 60
    assert metrics["gcpo/rollout/equal_rewards_frac"] == 0.5 and metrics["gcpo/rollout/common_prefix_tokens"] == 4.5
    assert metrics["gcpo/prompts/frame_tokens"] == 25 and metrics["gcpo/prompts/block_tokens"] == 6
    # The variance in a group is 4, that of the means 8; a mean of 4 responses owes 1 of it to them.
    assert metrics["gcpo/rollout/spread_in_groups"] == pytest.approx(4**0.5 / 12)
    assert metrics["gcpo/rollout/spread_of_groups"] == pytest.approx(7**0.5 / 12)
    alone = rollout_metrics([{"skipped": 1.0, "stage_failed": 1.0}], 80)
    assert not [name for name in alone if "spread" in name or name.startswith(("gcpo/prompts/", "gcpo/reward/"))]
    unread = rollout_metrics(stats[3:], 80)
    assert unread["gcpo/reward/oracle"] == 0 and "gcpo/reward/majority" not in unread


@pytest.mark.parametrize(
    ("answers", "rewards", "found"),
    [
        (["7", "7.0 ", "8", None], [1.0, 1.0, 0.0, 0.0], {"response": 0.5, "oracle": 1.0, "majority": 1.0}),
        (["7", "8", "8", "9"], [1.0, 0.0, 0.0, 0.0], {"response": 0.25, "oracle": 1.0, "majority": 0.0}),
        (["7", "8", "9", "8", "7"], [1.0, 0.0, 0.0, 0.0, 1.0], {"response": 0.4, "oracle": 1.0, "majority": 0.5}),
        # With a share for the format the same answer has several rewards.
        (["7", "7", "8"], [1.0, 0.8, 0.2], {"response": 2 / 3, "oracle": 1.0, "majority": 0.9}),
        ([None, None], [0.0, 0.0], {"response": 0.0, "oracle": 0.0}),
        (["7", "7"], [1.0, None], {}),
        ([], [], {}),
    ],
)
def test_response_stats(answers: list, rewards: list, found: dict[str, float]) -> None:
    """Most frequent answer, ties, responses without an answer, and responses that are graded later."""
    assert response_stats(answers, rewards) == pytest.approx({f"graded/{k}": value for k, value in found.items()})


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
    has = [torch.ones(4, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]
    assert [w.tolist() for w in controlled(weights, has, advantages, "none", 0)] == [[1, 2, 3, 4], [5, 7]]
    mean = torch.cat(controlled(weights, has, advantages, "mean", 0))
    torch.testing.assert_close(mean, torch.full((6,), 10 / 4))
    mean = torch.cat(controlled(weights, has, [torch.zeros(4), torch.zeros(2)], "mean", 0))
    torch.testing.assert_close(mean, torch.full((6,), 22 / 6))
    seen = set()
    for seed in range(40):
        shuffled = controlled(weights, has, advantages, "shuffled", seed)
        assert [sorted(w.tolist()) for w in shuffled] == [[1, 2, 3, 4], [5, 7]]
        seen.add(tuple(torch.cat(shuffled).tolist()))
    assert len(seen) > 20
    assert [w.tolist() for w in controlled(weights, has, advantages, "shuffled", 3)] == [
        w.tolist() for w in controlled(weights, has, advantages, "shuffled", 3)
    ]
    # A response without a target keeps the weight that was filled in.
    has[0][1] = False
    for seed in range(20):
        shuffled = controlled(weights, has, advantages, "shuffled", seed)[0].tolist()
        assert shuffled[1] == 2 and sorted(shuffled) == [1, 2, 3, 4]
