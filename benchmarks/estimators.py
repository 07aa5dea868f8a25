"""What cheaper estimates of Upsilon and of the kappa term cost in truth, on the same groups as the whole method.

``python -m benchmarks.estimators --model models/arithmetic-warm --data data/arithmetic`` samples groups of n = 8
responses, with L = 8 shared draws, L' = 8 leave-one-out draws for every response, and M = 8 regenerated responses for
every context. Preset ``paper`` is then one way to read these samples, and every cheaper estimate another that uses
fewer of them: Upsilon and the gradient of the kappa term are compared on the same responses. Writes
``estimators.json`` and ``estimators.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import ENVIRONMENT, record
from gcpo.algorithms import (
    causal_diagnostics,
    causal_kl,
    causal_reference,
    causal_target,
    causal_weight,
    group_mean_target,
)
from gcpo.collider.plan import LeaveOneOutPlan, leave_one_out_plan
from gcpo.collider.prompts import BlockBudget, CandidatePrompts, GroupPrompts
from gcpo.methods.gcpo.draws import ColliderSampler, GroupResult
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring import PrefixForest
from gcpo.scoring.attention import tree_attention_on
from gcpo.seeding import request_seed

N = 8
KAPPA_REPEATS = 50
BOOTSTRAP = 400


@dataclass(frozen=True)
class Estimate:
    """One way to get Upsilon: which draws, how many of them, and what their feature is."""

    name: str
    shared: int
    leave_one_out: int = 0
    generations: int = 1
    projection: str = "inclusive"
    source: str = "response"


TRUTHS = {
    "shared": Estimate("paper", N, generations=N),
    "leave_one_out": Estimate("leave one out, L = L' = M = 8", N, N, N),
}
ESTIMATES = [
    Estimate("mean of the group, nothing generated (light)", 0, generations=0),
    Estimate("shared, L = 2, inclusive", 2),
    Estimate("shared, L = 2, exclusive", 2, projection="exclusive"),
    Estimate("shared, L = 4, inclusive", 4),
    Estimate("shared, L = 4, exclusive", 4, projection="exclusive"),
    Estimate("shared, L = 8, M = 1", 8),
    Estimate("shared, L = 8, prompt states", 8, source="prompt"),
    Estimate("leave one out, L = L' = 1", 1, 1),
    Estimate("leave one out, L = 2, L' = 1", 2, 1),
    Estimate("leave one out, L = L' = 2", 2, 2),
    Estimate("leave one out, L = L' = 4", 4, 4),
    Estimate("leave one out, L = L' = 1, prompt states (balanced)", 1, 1, source="prompt"),
    Estimate("leave one out, L = 2, L' = 1, prompt states", 2, 1, source="prompt"),
    Estimate("leave one out, L = L' = 8, prompt states", 8, 8, source="prompt"),
]


# ---- sampling ------------------------------------------------------------------------------------------------------


class Engine:
    """vLLM's offline engine behind the call that the collider stage makes."""

    def __init__(self, model: str, max_model_len: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            max_model_len=max_model_len,
            dtype="float32",
            enforce_eager=True,
            enable_chunked_prefill=False,
            block_size=32,
        )
        self.waiting: dict[str, asyncio.Future] = {}

    async def __call__(self, prompt_ids: list[int], params: dict[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = str(random.getrandbits(64))
        sampling = {name: value for name, value in params.items() if name != "logprobs"}
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": list(prompt_ids)},
            SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY),
        )
        self.waiting[name] = asyncio.get_running_loop().create_future()
        return await self.waiting[name]

    async def drive(self, work: Any) -> Any:
        """Run ``work``, stepping the engine whenever it waits."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.sleep(0)
            if self.waiting:
                for output in self.llm.llm_engine.step():
                    if output.finished:
                        (sample,) = output.outputs
                        answer = SimpleNamespace(
                            token_ids=list(sample.token_ids),
                            stop_reason=sample.finish_reason,
                            extra_fields={"num_cached_tokens": output.num_cached_tokens},
                        )
                        self.waiting.pop(output.request_id).set_result(answer)
        return task.result()


@dataclass
class Group:
    """One question with everything that was sampled for it."""

    messages: list[dict[str, Any]]
    prompt: list[int]
    responses: list[list[int]]
    result: GroupResult


def sample_groups(engine: Engine, prompts: CandidatePrompts, questions: Sequence[Any], args: Any) -> list[Group]:
    """All groups, one after another."""
    config = GCPOConfig.from_config(
        {
            "seed": args.seed,
            "features": {"source": "response"},
            "weighting": {"target": "projection"},
            "collider": {"scheme": "leave_one_out", "num_draws": N, "num_leave_one_out_draws": N, "num_generations": N},
        },
        n=N,
        response_length=args.response_length,
    )
    end_ids = prompts.end_ids
    stage = ColliderSampler(config, prompts, engine, {"temperature": 1.0}, None, end_ids)

    async def one(index: int, messages: list[dict[str, Any]]) -> Group:
        text = prompts.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = prompts.tokenizer.encode(text, add_special_tokens=False)
        outputs = await asyncio.gather(
            *(
                engine(prompt, {"temperature": 1.0, "max_tokens": args.response_length, "seed": seed})
                for seed in (request_seed(args.seed, "plain", index, k) for k in range(N))
            )
        )
        responses = [output.token_ids for output in outputs]
        # Rewards do not matter here: every group gets everything.
        result = await stage.run(messages, responses, seed_parts=("study", index), equal_rewards=False)
        return Group(messages, prompt, responses, result)

    groups = []
    for index, messages in enumerate(questions):
        groups.append(asyncio.run(engine.drive(one(index, messages))))
        print(f"group {index + 1} of {len(questions)}", flush=True)
    return groups


# ---- scoring -------------------------------------------------------------------------------------------------------


class Policy:
    """The model in float32 on packed trees."""

    def __init__(self, path: str, budget: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.budget = budget
        self.tokens = 0

    def _packs(self, sequences: Sequence[torch.Tensor]) -> Any:
        for pack in PrefixForest(sequences).packs(self.budget):
            self.tokens += len(pack)
            hidden = self.model.model(
                pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False, tree_pack=pack
            ).last_hidden_state[0]
            yield pack, hidden

    @torch.no_grad()
    def states(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """State of the last token of every sequence [N, d]; zero for an empty one."""
        present = [i for i, sequence in enumerate(sequences) if len(sequence)]
        found = torch.zeros(len(sequences), self.model.config.hidden_size)
        with tree_attention_on(self.model.config):
            for pack, hidden in self._packs([torch.tensor(sequences[i]) for i in present]):
                for at, place in zip(pack.sequences, pack.places, strict=True):
                    found[present[at]] = hidden[place[-1]]
        return found

    def log_probs(self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """log pi(target | context), with gradient where it is on; an empty context gives zeros."""
        found = [torch.zeros(len(target)) for target in targets]
        present = [i for i, context in enumerate(contexts) if len(context)]
        with tree_attention_on(self.model.config):
            for pack, hidden in self._packs([torch.tensor([*contexts[i], *targets[i]]) for i in present]):
                for at, place in zip(pack.sequences, pack.places, strict=True):
                    i = present[at]
                    logits = self.model.lm_head(hidden[place[len(contexts[i]) - 1 : -1]])
                    found[i] = logits.log_softmax(-1).gather(-1, torch.tensor(targets[i])[:, None])[:, 0]
        return found


# ---- Upsilon -------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """States of one group: responses [n, d], generations [n, 2n, n, d], prompts [n, 2n, 1, d], shared draws first."""

    z: torch.Tensor
    response: torch.Tensor
    response_valid: torch.Tensor
    prompt: torch.Tensor
    prompt_valid: torch.Tensor

    def samples(self, estimate: Estimate) -> dict[str, Any]:
        """Arguments of the public functions for the samples that an estimate uses."""
        z = self.response if estimate.source == "response" else self.prompt
        valid = self.response_valid if estimate.source == "response" else self.prompt_valid
        count = estimate.generations if estimate.source == "response" else 1
        arguments = {
            "z_conditioned": z[:, : estimate.shared, :count],
            "valid": valid[:, : estimate.shared, :count],
            "projection": estimate.projection,
        }
        if estimate.leave_one_out:
            own = slice(N, N + estimate.leave_one_out)
            arguments |= {"z_marginal": z[:, own, :count], "valid_marginal": valid[:, own, :count]}
        return arguments


def features_of(policy: Policy, group: Group, contexts: list[list[list[int]]]) -> Features:
    """States of a group; the prompts' over ``contexts``."""
    outputs = [ids for row in group.result.outputs for ids in row]
    flat = [ids for row in contexts for ids in row]
    response, prompt = policy.states(outputs), policy.states(flat)
    return Features(
        policy.states(group.responses),
        response.view(N, 2 * N, N, -1),
        torch.tensor([bool(ids) for ids in outputs]).view(N, 2 * N, N),
        prompt.view(N, 2 * N, 1, -1),
        torch.tensor([bool(ids) for ids in flat]).view(N, 2 * N, 1),
    )


def upsilon(features: Features, estimate: Estimate) -> torch.Tensor:
    """Upsilon [n]; NaN without a target."""
    if not estimate.shared:
        return causal_weight(features.z, group_mean_target(features.z))
    target, has_target = causal_target(features.z, **features.samples(estimate))
    weight = causal_weight(features.z, target, has_target)
    return torch.where(has_target, weight, torch.full_like(weight, math.nan))


def compare(values: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, Any]:
    """Rank correlation inside groups and mean absolute error, with 95 % intervals over groups."""
    from scipy.stats import spearmanr

    ranks, errors = [], []
    for a, b in zip(values, truth, strict=True):
        both = a.isfinite() & b.isfinite()
        if both.sum() > 2:
            ranks.append(float(spearmanr(a[both], b[both]).statistic))
            errors.append(float((a - b)[both].abs().mean()))
    return {"rank correlation": interval(ranks), "mean error": interval(errors)}


def interval(values: list[float]) -> list[float]:
    """Mean and half-width of the 95 % interval (Student's t)."""
    from scipy.stats import t

    values = [value for value in values if math.isfinite(value)]
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values), float(half)]


def generated_tokens(groups: Sequence[Group], estimate: Estimate) -> float:
    """Tokens that an estimate generates, as a multiple of the responses' own."""
    total = plain = 0.0
    for group in groups:
        plain += sum(map(len, group.responses))
        draws = group.result.draws
        mean = {kind: statistics.mean([d.generated for d in draws if d.kind == kind]) for kind in KINDS}
        total += estimate.shared * mean["collider"] + N * estimate.leave_one_out * mean["leave_one_out"]
        if estimate.source == "response":
            total += N * (estimate.shared + estimate.leave_one_out) * estimate.generations * mean["regenerated"]
    return total / plain


KINDS = ("collider", "leave_one_out", "regenerated")


# ---- the kappa term ------------------------------------------------------------------------------------------------


def cut_contexts(group: Group, prompts: CandidatePrompts) -> list[list[list[int]]]:
    """The contexts of a group with other block budgets, over the same draws and the same order of ties."""
    before = LeaveOneOutPlan.from_dict(group.result.plan["plan"])
    blocks = tuple(tuple(prompts.candidate_block(k, ids)) for k, ids in enumerate(group.responses))
    plan = leave_one_out_plan(N, 2 * N, lengths=[len(block) for block in blocks], permutation=before.permutation)
    made = GroupPrompts(prompts.frame(group.messages), blocks, plan)
    shared = [draw for draw in group.result.draws if draw.kind == "collider"]
    leave_one_out = [draw for draw in group.result.draws if draw.kind == "leave_one_out"]
    contexts: list[list[list[int]]] = [[] for _ in range(N)]
    for at, i in enumerate(before.depth_first()):
        own = leave_one_out[at * N : (at + 1) * N]
        for slot, draw in enumerate([*shared, *own]):
            valid = draw.valid
            contexts[i].append(made.context(i, slot, prompts.collider_block(draw.token_ids)) if valid else [])
    return contexts


def kappa_gradients(
    policy: Policy,
    groups: Sequence[Group],
    contexts: Sequence[list[list[list[int]]]],
    estimate: Estimate,
    repeat: int = 0,
) -> torch.Tensor:
    """Gradient of the mean KL' of every response [G * n, parameters] under the reference of an estimate.

    Every ``repeat`` takes other draws.
    """
    rows = []
    first_shared, first_leave_one_out = repeat * estimate.shared, N + repeat * estimate.leave_one_out
    shared = range(first_shared, first_shared + estimate.shared)
    for group, own in zip(groups, contexts, strict=True):
        slots = [*shared, *range(first_leave_one_out, first_leave_one_out + estimate.leave_one_out)]
        with torch.no_grad():
            flat = policy.log_probs(
                [own[i][s] for i in range(N) for s in slots], [group.responses[i] for i in range(N) for _ in slots]
            )
            query = policy.log_probs([group.prompt] * N, group.responses)
        for i in range(N):
            log_p = torch.stack(flat[i * len(slots) : (i + 1) * len(slots)])[None]
            valid = torch.tensor([[bool(own[i][s]) for s in slots]])
            leave_one_out = {}
            if estimate.leave_one_out:
                leave_one_out = {
                    "log_p_marginal": log_p[:, estimate.shared :],
                    "valid_marginal": valid[:, estimate.shared :],
                }
            log_ref, _, present = causal_reference(
                log_p[:, : estimate.shared],
                query[i][None],
                valid[:, : estimate.shared],
                projection=estimate.projection,
                **leave_one_out,
            )
            policy.model.zero_grad()
            first = next((s for s in shared if own[i][s]), None)
            if bool(present) and first is not None:
                (log_prob,) = policy.log_probs([own[i][first]], [group.responses[i]])
                causal_kl(log_prob[None], log_ref).mean().backward()
            rows.append(
                torch.cat(
                    [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.model.parameters()]
                )
            )
    return torch.stack(rows)


def draw_variance(policy: Policy, groups: Sequence[Group], estimate: Estimate) -> float | None:
    """Variance of the batch gradient over disjoint sets of draws, relative to the squared mean gradient."""
    repeats = N // max(estimate.shared, estimate.leave_one_out)
    if repeats < 2:
        return None
    contexts = [group.result.contexts for group in groups]
    batch = torch.stack([kappa_gradients(policy, groups, contexts, estimate, k).mean(0) for k in range(repeats)])
    variance = (batch - batch.mean(0)).square().sum() / (repeats - 1)
    return float(variance / batch.mean(0).square().sum())


def largest_share(gradients: torch.Tensor) -> float:
    """The largest part that one group has in the batch gradient, along it."""
    groups = gradients.view(-1, N, gradients.shape[1]).mean(1)
    whole = groups.sum(0)
    return float((groups @ whole).max() / whole.square().sum())


def fraction_variance(gradients: torch.Tensor, fraction: float, seed: int) -> dict[str, float]:
    """What drawing a fraction of a group's responses does to the batch gradient: mean cosine, relative variance."""
    generator = torch.Generator().manual_seed(seed)
    groups = gradients.view(-1, N, gradients.shape[1])
    whole = groups.mean((0, 1))
    count = max(1, round(fraction * N))
    cosines, errors = [], []
    for _ in range(KAPPA_REPEATS):
        chosen = torch.stack([torch.randperm(N, generator=generator)[:count] for _ in range(len(groups))])
        part = torch.stack([group[own] for group, own in zip(groups, chosen, strict=True)]).mean((0, 1))
        cosines.append(float(torch.cosine_similarity(part, whole, dim=0)))
        errors.append(float((part - whole).square().sum() / whole.square().sum()))
    return {"cosine": statistics.mean(cosines), "relative variance": statistics.mean(errors)}


def bootstrap(a: torch.Tensor, b: torch.Tensor, seed: int) -> list[float]:
    """Cosine of two batch gradients, and its 95 % percentile interval over drawings of the groups."""
    a, b = (gradients.view(-1, N, gradients.shape[1]).mean(1).double() for gradients in (a, b))
    # Inner products of the groups are all that a drawing needs.
    products = [x @ y.T for x, y in ((a, b), (a, a), (b, b))]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(a), (BOOTSTRAP, len(a)), generator=generator)
    counts = torch.nn.functional.one_hot(draws, len(a)).sum(1).double()
    counts = torch.cat([torch.ones(1, len(a), dtype=torch.float64), counts])
    ab, aa, bb = (torch.einsum("ri,ij,rj->r", counts, product, counts) for product in products)
    cosines = ab / (aa * bb).sqrt()
    low, high = cosines[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [float(cosines[0]), low, high]


# ---- the study -----------------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], path: Path) -> None:
    """Rank correlation of Upsilon against the tokens spent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=140, sharey=True)
    for axis, truth in zip(axes, TRUTHS, strict=True):
        for k, entry in enumerate(sorted(found["upsilon"], key=lambda entry: entry["generated"])):
            mean, half = entry[truth]["rank correlation"]
            label = entry["name"].split(",")[0]
            color = {"shared": "C0", "leave one out": "C1"}.get(label, "C2")
            marker = "s" if entry["source"] == "prompt" else "o"
            at = max(entry["generated"], 0.6)  # the mean of the group needs none
            axis.errorbar(at, mean, half, fmt=marker, color=color, ms=5, lw=1)
            axis.annotate(
                entry["short"], (at, mean), fontsize=7, xytext=(4, (4, -10)[k % 2]), textcoords="offset points"
            )
        axis.axhline(0, color="gray", lw=0.6)
        axis.set(xscale="log", xlim=(0.5, 300), xlabel="tokens generated, as a multiple of the responses'")
        axis.set_title(f"against {TRUTHS[truth].name}", fontsize=9)
    axes[0].set_ylabel("rank correlation of Υ inside a group")
    figure.tight_layout()
    figure.savefig(path)


def short(estimate: Estimate) -> str:
    """How the plot names an estimate: L, L + L', p for prompt states."""
    if not estimate.shared:
        return "mean"
    kind = f"{estimate.shared}+{estimate.leave_one_out}" if estimate.leave_one_out else f"{estimate.shared}"
    return (
        kind
        + {"inclusive": "", "exclusive": " ex"}[estimate.projection]
        + (" p" if estimate.source == "prompt" else "")
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/arithmetic-warm")
    parser.add_argument("--data", default="data/arithmetic")
    parser.add_argument("--output", type=Path, default=Path("outputs/estimators"))
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--kappa-groups", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--response-length", type=int, default=64)
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    questions = [list(row) for row in pq.read_table(f"{args.data}/train.parquet")["prompt"].to_pylist()[: args.groups]]
    prompts = CandidatePrompts(tokenizer, BlockBudget(args.response_length))
    engine = Engine(args.model, 1024)
    groups = sample_groups(engine, prompts, questions, args)
    policy = Policy(args.model, 8192)

    features = [features_of(policy, group, group.result.contexts) for group in groups]
    truths = {name: [upsilon(f, estimate) for f in features] for name, estimate in TRUTHS.items()}
    found: dict[str, Any] = {**record(), "groups": args.groups, "seed": args.seed, "upsilon": []}
    budgets: dict[str, Callable[[], CandidatePrompts]] = {
        "whole responses": lambda: prompts,
        "last 16 tokens": lambda: CandidatePrompts(tokenizer, BlockBudget(16)),
        "last 8 tokens": lambda: CandidatePrompts(tokenizer, BlockBudget(8)),
        "answer only": lambda: CandidatePrompts(tokenizer, BlockBudget(16, "answer")),
    }
    for estimate in [*TRUTHS.values(), *ESTIMATES]:
        values = [upsilon(f, estimate) for f in features]
        halves = (
            [causal_diagnostics(f.z, **f.samples(estimate))["split_half"].item() for f in features]
            if estimate.shared
            else []
        )
        halves = [value for value in halves if math.isfinite(value)]
        found["upsilon"].append(
            {
                "name": estimate.name,
                "short": short(estimate),
                "source": estimate.source,
                "generated": generated_tokens(groups, estimate),
                "mean": float(torch.cat(values).nanmean()),
                "spread": statistics.mean([float(v[v.isfinite()].std()) for v in values if v.isfinite().sum() > 1]),
                "split half": interval(halves) if len(halves) > 2 else None,
                **{name: compare(values, truth) for name, truth in truths.items()},
            }
        )
    balanced = next(e for e in ESTIMATES if "(balanced)" in e.name)
    whole = [upsilon(f, balanced) for f in features]
    found["blocks and Upsilon of balanced"] = []
    cut = {}
    for name, make in budgets.items():
        made = make()
        cut[name] = [cut_contexts(group, made) for group in groups]
        if name == "whole responses" and cut[name] != [group.result.contexts for group in groups]:
            raise RuntimeError("the contexts over whole responses are not those of the run")
        states = [features_of(policy, group, own) for group, own in zip(groups, cut[name], strict=True)]
        values = [upsilon(f, balanced) for f in states]
        tokens = statistics.mean(len(c) for own in cut[name] for row in own for c in row if c)
        found["blocks and Upsilon of balanced"].append(
            {"blocks": name, "context tokens": tokens, **compare(values, whole)}
        )

    few = groups[: args.kappa_groups]
    base = kappa_gradients(policy, few, [g.result.contexts for g in few], TRUTHS["shared"])
    loo = kappa_gradients(policy, few, [g.result.contexts for g in few], TRUTHS["leave_one_out"])
    found["kappa gradient"] = {"estimates": [], "fractions": [], "blocks": []}

    def cosine(a: torch.Tensor, b: torch.Tensor) -> list[float]:
        return bootstrap(a, b, args.seed)

    for estimate in [
        *TRUTHS.values(),
        *(e for e in ESTIMATES if e.shared and e.source == "response" and e.name != "shared, L = 8, M = 1"),
    ]:
        own = kappa_gradients(policy, few, [g.result.contexts for g in few], estimate)
        found["kappa gradient"]["estimates"].append(
            {
                "name": estimate.name,
                "generated": generated_tokens(few, replace(estimate, source="prompt")),
                "norm": float(own.mean(0).norm()),
                "relative variance": draw_variance(policy, few, estimate),
                "largest group": largest_share(own),
                "cosine to paper": cosine(own, base),
                "cosine to leave one out": cosine(own, loo),
            }
        )
    one = next(e for e in ESTIMATES if e.name == "leave one out, L = L' = 1")
    own = kappa_gradients(policy, few, [g.result.contexts for g in few], one)
    for fraction in (1.0, 0.5, 0.25, 0.125):
        found["kappa gradient"]["fractions"].append(
            {"fraction": fraction, **fraction_variance(own, fraction, args.seed)}
        )
    for name in budgets:
        part = kappa_gradients(policy, few, cut[name][: args.kappa_groups], one)
        found["kappa gradient"]["blocks"].append(
            {"blocks": name, "norm": float(part.mean(0).norm()), "cosine": cosine(part, own)}
        )

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "estimators.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.output / "estimators.png")
    show(found)


def show(found: dict[str, Any]) -> None:
    """The tables, as markdown."""

    def pm(pair: list[float] | None) -> str:
        return "–" if pair is None else f"{pair[0]:.2f} ± {pair[1]:.2f}"

    def span(values: list[float]) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(*values)

    print("| Υ by | tokens generated | rank corr. with paper | with leave one out | mean error | spread | split half |")
    print("|---|---|---|---|---|---|---|")
    for e in found["upsilon"]:
        print(
            f"| {e['name']} | {e['generated']:.1f} × | {pm(e['shared']['rank correlation'])} "
            f"| {pm(e['leave_one_out']['rank correlation'])} | {pm(e['shared']['mean error'])} | {e['spread']:.2f} "
            f"| {pm(e['split half'])} |"
        )
    print("\n| blocks (balanced) | tokens of a context | rank corr. with whole responses | mean error |")
    print("|---|---|---|---|")
    for e in found["blocks and Upsilon of balanced"]:
        print(f"| {e['blocks']} | {e['context tokens']:.0f} | {pm(e['rank correlation'])} | {pm(e['mean error'])} |")
    columns = ["κ gradient by", "tokens generated", "norm", "relative variance", "largest group", "cosine to paper"]
    print("\n| " + " | ".join([*columns, "to leave one out"]) + " |\n" + "|---" * 7 + "|")
    for e in found["kappa gradient"]["estimates"]:
        cosines = " | ".join(span(e[f"cosine to {truth}"]) for truth in ("paper", "leave one out"))
        variance = "–" if e["relative variance"] is None else f"{e['relative variance']:.2f}"
        numbers = f"{e['generated']:.1f} × | {e['norm']:.3f} | {variance} | {e['largest group']:.0%}"
        print(f"| {e['name']} | {numbers} | {cosines} |")
    print("\n| fraction | cosine | relative variance |\n|---|---|---|")
    for e in found["kappa gradient"]["fractions"]:
        print(f"| {e['fraction']} | {e['cosine']:.2f} | {e['relative variance']:.2f} |")
    print("\n| blocks | norm | cosine to whole responses |\n|---|---|---|")
    for e in found["kappa gradient"]["blocks"]:
        print(f"| {e['blocks']} | {e['norm']:.3f} | {span(e['cosine'])} |")


if __name__ == "__main__":
    main()
