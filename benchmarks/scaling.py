"""Memory, tokens and bytes between machines of a step on many GPUs, on paper.

``python -m benchmarks.scaling`` calculates the plans of ``benchmarks/scaling.yaml`` with the cost model of `gcpo cost`
and the formulas of this module, prints the tables of ``docs/scaling.md`` and writes ``scaling.json``. Nothing runs on
a GPU. The formulas are those of plain FSDP2, without offloading, sequence parallelism or fused kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.common import arguments, print_table, save
from gcpo.methods import fields as common
from gcpo.methods.fields import RESPONSES, Field
from gcpo.methods.gcpo.fields import LOG_RHO
from gcpo.scoring import BudgetError
from gcpo.tools.cost.command import short, sum_of
from gcpo.tools.cost.inputs import compose_config, step_of, variants
from gcpo.tools.cost.step import Simulation, draw_limits
from gcpo.tools.cost.texts import Lengths, Tokenizer

PLANS = Path(__file__).with_suffix(".yaml")
GIB = 2**30
GROUPS = 4
"""Groups that are simulated."""
VERL_FIELDS = [value for value in vars(common).values() if isinstance(value, Field)]


@dataclass(frozen=True)
class Model:
    """Dimensions of a decoder with gated MLPs and without tied embeddings; see config.json of a Llama or Qwen2."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int

    @property
    def layer(self) -> int:
        """Parameters of a layer, without norms and biases."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All parameters: the layers, the embeddings and the head."""
        return self.layers * self.layer + 2 * self.vocabulary * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token in a KV cache of half precision."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True)
class Plan:
    """A run; the keys are those of the yaml."""

    model: Model
    nodes: int
    gpus_per_node: int
    gib_per_gpu: float
    budget: int
    tensor_parallel: int
    utilization: float
    questions: int
    n: int
    limits: dict[str, int]
    means: dict[str, float]

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def leaves_node(self) -> float:
        """Fraction of what all GPUs hold in equal parts that a node does not hold."""
        return 1 - 1 / self.nodes


def read_plans(path: Path = PLANS) -> dict[str, Plan]:
    """Read the plans of a yaml."""
    from yaml import safe_load

    raw = safe_load(path.read_text())
    return {name: Plan(**{**plan, "model": Model(**plan["model"])}) for name, plan in raw.items()}


# ---- memory ----------------------------------------------------------------------------------------------------------


def actor_memory(plan: Plan) -> dict[str, float]:
    """GiB of a GPU while the actor is updated."""
    model, tokens = plan.model, plan.budget
    # Of one layer: states, queries, keys, values, the output of the attention, and the three parts of the MLP.
    inside = (
        2 * tokens * (4 * model.hidden + 2 * model.head_size * (model.heads + model.kv_heads) + 3 * model.intermediate)
    )
    return {
        "weights, gradients, Adam, float32, sharded": 16 * model.parameters / plan.gpus / GIB,
        "two gathered layers, bf16": 2 * 2 * model.layer / GIB,
        "embeddings and head, gathered, bf16": 2 * 2 * model.vocabulary * model.hidden / GIB,
        "inputs of the layers, kept for the backward pass": 2 * tokens * model.hidden * model.layers / GIB,
        "one layer, recomputed": inside / GIB,
        "logits, bf16, and a float32 copy with its gradient": 10 * tokens * model.vocabulary / GIB,
    }


def longest_context(plan: Plan) -> int:
    """Tokens of the longest prompt of a collider draw with its answer, blocks cut at their limit."""
    return plan.limits["question"] + (plan.n + 1) * plan.limits["block"] + plan.limits["response"]


def cache_tokens(plan: Plan) -> int:
    """Tokens that fit into the KV cache of a server, beside its weights."""
    space = plan.utilization * plan.gib_per_gpu * GIB * plan.tensor_parallel - 2 * plan.model.parameters
    return max(0, int(space / plan.model.kv_bytes))


# ---- tokens ----------------------------------------------------------------------------------------------------------


class CountedStep(Simulation):
    """A simulated step that also counts the bytes of the fields of its rows.

    Args:
        hidden: size of a state; the states of the simulation have one number.
        args: those of `Simulation`.
    """

    def __init__(self, hidden: int, *args: Any) -> None:
        super().__init__(*args)
        self.hidden, self.bytes, score = hidden, Counter[str](), self.method.score

        def counted(rows: Mapping[Field, Sequence[Tensor]], engine: Any) -> Mapping[Field, Sequence[Tensor]]:
            found = score(rows, engine)
            for field, values in found.items():
                self._count(field, sum(map(Tensor.numel, values)))
            return found

        self.method.score = counted

    def _count(self, field: Field, numbers: int) -> None:
        if field.dtype is not None:
            self.bytes[str(field)] += numbers * field.dtype.itemsize * (self.hidden if "d" in field.shape else 1)

    def _update(self, rows: Sequence[Mapping[Field, Any]], plain: int) -> None:
        super()._update(rows, plain)
        for row in rows:
            for field, value in row.items():
                if isinstance(value, Tensor):
                    self._count(field, value.numel())
            for field in (*VERL_FIELDS, *self.method.fields):
                # Whatever is not there yet: verl's own values of the tokens, and those that credit writes.
                if field.shape == "[T]" and field not in row and field.writer != "score" and field != LOG_RHO:
                    self._count(field, len(row[RESPONSES]))


def overrides(plan: Plan) -> list[str]:
    """Settings of a plan for the composition of the configuration."""
    return [
        f"actor_rollout_ref.rollout.n={plan.n}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={plan.tensor_parallel}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={plan.budget}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={plan.questions}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        f"trainer.nnodes={plan.nodes}",
        f"trainer.n_gpus_per_node={plan.gpus_per_node}",
        f"data.train_batch_size={plan.questions}",
        f"data.max_prompt_length={plan.limits['question']}",
        f"data.max_response_length={plan.limits['response']}",
        f"gcpo.blocks.max_tokens={plan.limits['block']}",
        "gcpo.metrics.grad_norm_every=0",
    ]


def steps(plan: Plan) -> dict[str, dict[str, Any]]:
    """Tokens of a step and bytes of its fields, by method; or the reason why there are none."""
    config = compose_config("gcpo_trainer", overrides(plan))
    step, found = step_of(config), {}
    _, methods, _ = variants(config, step.run)
    for name, method in methods.items():
        limits = draw_limits(method.settings) if method.samples else {}
        means = {kind: min(plan.means["collider"], limit) for kind, limit in limits.items()}
        lengths = Lengths(plan.means["question"], plan.means["response"], means, spread=0.3, group_spread=0.3)
        simulation = CountedStep(plan.model.hidden, method, step, lengths, Tokenizer(), GROUPS)
        try:
            tokens = simulation.run()
        except BudgetError as error:
            found[name] = {"problem": str(error)}
            continue
        size = sum(simulation.bytes.values()) * plan.questions / GROUPS
        found[name] = {"tokens": tokens, "field bytes": size}
    return found


# ---- bytes between machines ------------------------------------------------------------------------------------------


def node_bytes(plan: Plan, tokens: Mapping[str, float], field_bytes: float) -> dict[str, float]:
    """Bytes that a node receives from others in a step.

    Every micro-batch gathers the bf16 weights, once in a forward and once in a backward pass, and its float32
    gradients are reduced. A gather brings a node what it does not hold; a reduction as much.
    """
    size, gpus = plan.model.parameters, plan.gpus
    trained = sum_of(tokens, "trained") - tokens.get("trained/kappa_rows_unshared", 0.0)
    scored = tokens.get("scored", 0.0) + sum_of(tokens, "scored")
    updates = math.ceil(trained / gpus / plan.budget)
    passes = math.ceil(scored / gpus / plan.budget)
    return {
        "FSDP, update": updates * (2 * 2 + 4) * size * plan.leaves_node,
        "FSDP, scoring": passes * 2 * size * plan.leaves_node,
        "weights for vLLM": 2 * size * plan.leaves_node,
        # Written once and read once, by processes anywhere.
        "fields of the batch": 2 * field_bytes / plan.nodes * plan.leaves_node,
    }


def groups_in_cache(plan: Plan, tokens: Mapping[str, float]) -> float:
    """Groups whose distinct prompt tokens fit into the KV cache of a server together."""
    prefilled = sum_of(tokens, "prefilled") - sum_of(tokens, "cached")
    return cache_tokens(plan) / (prefilled / plan.questions)


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(name: str, plan: Plan) -> dict[str, Any]:
    """All numbers of a plan."""
    found: dict[str, Any] = {
        "parameters": plan.model.parameters,
        "actor memory, GiB": actor_memory(plan),
        "longest prompt of a draw": longest_context(plan),
        "KV cache of a server, tokens": cache_tokens(plan),
        "methods": {},
    }
    for method, step in steps(plan).items():
        if "problem" in step:
            found["methods"][method] = step
            continue
        tokens = step["tokens"]
        found["methods"][method] = {
            "generated": sum_of(tokens, "generated"),
            "prefilled, not cached": sum_of(tokens, "prefilled") - sum_of(tokens, "cached"),
            "scored": tokens.get("scored", 0.0) + sum_of(tokens, "scored"),
            "trained on": sum_of(tokens, "trained") - tokens.get("trained/kappa_rows_unshared", 0.0),
            "groups in the cache of a server": groups_in_cache(plan, tokens),
            "GB that a node receives": {k: v / 1e9 for k, v in node_bytes(plan, tokens, step["field bytes"]).items()},
        }
    return found


def show(name: str, plan: Plan, found: Mapping[str, Any]) -> None:
    """Print the tables of a plan."""
    memory = found["actor memory, GiB"]
    print_table(
        [f"{name}: GiB of a GPU in the update", plan.model.name],
        *([part, f"{value:.1f}"] for part, value in memory.items()),
        ["all, of " + f"{plan.gib_per_gpu:g}", f"{sum(memory.values()):.1f}"],
    )
    methods = {method: one for method, one in found["methods"].items() if "problem" not in one}
    rows = [
        ["tokens generated", *(short(one["generated"]) for one in methods.values())],
        ["prompt tokens, not cached", *(short(one["prefilled, not cached"]) for one in methods.values())],
        ["tokens scored", *(short(one["scored"]) for one in methods.values())],
        ["tokens trained on", *(short(one["trained on"]) for one in methods.values())],
        [
            "groups that the cache of a server holds",
            *(f"{one['groups in the cache of a server']:.1f}" for one in methods.values()),
        ],
    ]
    for part in next(iter(methods.values()))["GB that a node receives"]:
        rows.append(
            [f"GB for a node: {part}", *(f"{o['GB that a node receives'][part]:,.1f}" for o in methods.values())]
        )
    print_table([f"{name}: a step", *methods], *rows)
    for method, one in found["methods"].items():
        if "problem" in one:
            print(f"{method}: {one['problem']}\n")


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "outputs/scaling", model=False)
    parser.add_argument("--plans", type=Path, default=PLANS)
    args = parser.parse_args()
    results = {}
    for name, plan in read_plans(args.plans).items():
        results[name] = tables(name, plan)
        show(name, plan, results[name])
    save(args.output / "scaling.json", results)


if __name__ == "__main__":
    main()
