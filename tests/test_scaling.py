"""The plan for many GPUs: formulas by hand, bytes of rows that are counted, and the tables of the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from gcpo.methods.base import Method, Run
from gcpo.methods.gcpo.method import GCPO
from gcpo.tools.cost.step import Step
from gcpo.tools.cost.texts import Lengths, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PLANS = scaling.read_plans()
MODEL = scaling.Model(
    "small", layers=2, hidden=4, intermediate=6, heads=2, kv_heads=1, head_size=2, vocabulary=10, context=64
)
PLAN = scaling.Plan(
    *(MODEL, 4, 2, 1.0, 8, 2, 0.5, 16, 4),
    limits={"question": 5, "response": 20, "block": 10},
    means={"question": 4, "response": 12, "collider": 8},
)


def test_sizes_by_hand() -> None:
    """q, k, v, o: 4 * 4 + 2 * 4 * 2 + 4 * 4 weights; MLP: 3 * 4 * 6."""
    assert MODEL.layer == 48 + 72 and MODEL.parameters == 2 * 120 + 2 * 10 * 4 and MODEL.kv_bytes == 16
    found = {name: gib * scaling.GIB for name, gib in scaling.actor_memory(PLAN).items()}
    assert found == pytest.approx(
        {
            "weights, gradients, Adam, float32, sharded": 16 * 320 / 8,
            "two gathered layers, bf16": 480,
            "embeddings and head, gathered, bf16": 160,
            "inputs of the layers, kept for the backward pass": 8 * 4 * 2 * 2,
            "one layer, recomputed": 2 * 8 * (4 * 4 + 2 * 2 * 3 + 3 * 6),
            "logits, bf16, and a float32 copy with its gradient": 10 * 8 * 10,
        }
    )
    assert scaling.longest_context(PLAN) == 5 + 5 * 10 + 20
    assert scaling.cache_tokens(PLAN) == (2**30 - 640) // 16


def test_bytes_of_a_node_by_hand() -> None:
    """Eight GPUs with eight tokens a micro-batch: 200 tokens are four, 64 are one; a node lacks three quarters."""
    tokens = {
        "trained/plain": 150,
        "trained/kappa_rows": 50,
        "trained/kappa_rows_unshared": 999,
        "scored": 60,
        "scored/old": 4,
    }
    assert scaling.node_bytes(PLAN, tokens, 4000) == {
        "FSDP, update": 4 * 8 * 320 * 0.75,
        "FSDP, scoring": 1 * 2 * 320 * 0.75,
        "weights for vLLM": 2 * 320 * 0.75,
        "fields of the batch": 2 * 1000 * 0.75,
    }
    one = scaling.node_bytes(replace(PLAN, nodes=1), tokens, 4000)
    assert set(one.values()) == {0}
    prompts = {"prefilled/response": 100.0, "cached/response": 60.0, "prefilled/collider": 120.0}
    assert scaling.groups_in_cache(PLAN, prompts) == scaling.cache_tokens(PLAN) / 10


def counted(method: Method, questions: int = 1) -> scaling.CountedStep:
    lengths = Lengths(4, 12, dict.fromkeys(("collider", "leave_one_out", "regenerated"), 8), spread=0.0)
    return scaling.CountedStep(32, method, Step(method.run, questions), lengths, Tokenizer(), 1)


def test_bytes_of_the_fields_by_hand() -> None:
    """Two responses of 12 tokens: verl's are 24 + 4 (rewards) bytes a token more than the prompt; GCPO adds its own."""
    run = Run(n=2, response_length=64, prompt_length=64, max_tokens=10_000)
    plain = counted(Method(None, run))
    plain.run()
    # responses and mask in int64, rewards, old log-probabilities and advantages in float32.
    assert {name: size for name, size in plain.bytes.items() if name != "prompts"} == {
        "responses": 2 * 12 * 8,
        "response_mask": 2 * 12 * 8,
        **dict.fromkeys(("rm_scores", "old_log_probs", "advantages"), 2 * 12 * 4),
    }
    own = counted(GCPO(GCPO.parse({"preset": "balanced", "reference": {"subsample": 1.0}}, run), run))
    tokens = own.run()
    # L = L' = 1 states of prompts of 32 numbers, besides z; log-probabilities of both contexts.
    assert own.bytes["gcpo_z"] == 2 * 32 * 4 and own.bytes["gcpo_z_regenerated"] == 2 * 2 * 32 * 4
    assert own.bytes["gcpo_log_p"] == 2 * 2 * 12 * 4
    assert own.bytes["gcpo_log_ref"] == 2 * 12 * 4 and own.bytes["gcpo_kl_mask"] == 2 * 12 * 8
    # Every context is scored with its response; z is read from the response alone.
    contexts = tokens["scored_unshared"] - 2 * 12 - 2 * 2 * 12
    assert own.bytes["gcpo_contexts"] == 8 * contexts and "gcpo_log_rho" not in own.bytes


def test_the_plans_fit_the_models_context() -> None:
    for plan in PLANS.values():
        assert scaling.longest_context(plan) <= plan.model.context
    assert PLANS["7 B on 8 GPUs"].model.parameters == pytest.approx(7.6e9, rel=0.01)
    assert PLANS["70 B on 1,024 GPUs"].model.parameters == pytest.approx(70.6e9, rel=0.01)


def test_the_page_has_these_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and caches are calculated here; the simulated tokens are those of the stored file."""
    page = (ROOT / "docs/scaling.md").read_text()
    stored = json.loads((ROOT / "docs/measurements/scaling.json").read_text())
    for name, plan in PLANS.items():
        memory = scaling.actor_memory(plan)
        assert stored[name]["actor memory, GiB"] == pytest.approx(memory)
        assert stored[name]["longest prompt of a draw"] == scaling.longest_context(plan)
        assert stored[name]["KV cache of a server, tokens"] == scaling.cache_tokens(plan)
        scaling.show(name, plan, stored[name])
    for line in capsys.readouterr().out.splitlines():
        if line and not line.startswith("| ---"):
            assert line in page


def test_a_simulated_step(tmp_path: Path) -> None:
    """All methods on a small plan; of those that need more tokens than a micro-batch has, the sentence."""
    path = tmp_path / "plans.yaml"
    small = {
        **PLAN.__dict__,
        "model": MODEL.__dict__,
        "budget": 400,
        "limits": {"question": 32, "response": 64, "block": 64},
    }
    path.write_text(json.dumps({"small": {**small, "questions": 8}}))
    (plan,) = scaling.read_plans(path).values()
    found = scaling.tables("small", plan)["methods"]
    assert list(found) == ["grpo", "paper", "balanced", "light"]
    assert found["balanced"]["generated"] > found["light"]["generated"] > found["grpo"]["generated"] > 0
    assert found["balanced"]["GB that a node receives"]["fields of the batch"] > 0
    cut = scaling.steps(replace(plan, budget=70))
    assert "problem" not in cut["grpo"] and "token budget" in cut["balanced"]["problem"]
