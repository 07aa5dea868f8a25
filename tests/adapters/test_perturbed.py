"""Perturbed states on the real engine, against an unsharded model in float64, one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gcpo.adapters.perturbed import EpisodeScorer
from gcpo.adapters.scoring import packed_batch
from gcpo.scoring.branches import EpisodeRequest, pack_requests
from gcpo.scoring.rows import PackedRow
from tests.adapters.ranks import build_engine, run_on_ranks

TEMPERATURE, DRAWS, SIZE = 0.7, 2, 32


def make_requests(intervention: str, count: int, scale: float = 0.5) -> list[EpisodeRequest]:
    """Responses to two questions with one to three episodes; the first has one that is not asked about."""
    generator = torch.Generator().manual_seed(5)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 320, (length,), generator=generator)

    prompts, found = [tokens(7), tokens(4)], []
    for i in range(count):
        ends = ((2, 5, 9), (0,), (3, 4))[i % 3]
        asked = ((0, 2), (0,), (0, 1))[i % 3]
        found.append(
            EpisodeRequest(
                prompts[i % 2],
                tokens(11),
                ends,
                asked,
                tokens(3),
                (tokens(2), tokens(1), tokens(3)) if intervention == "hidden_state" else (),
                torch.randn(len(asked), DRAWS, SIZE, generator=generator) * scale,
            )
        )
    return found


def score(rank: int, world: int, path: str, counts: tuple[int, ...], runs: list[tuple[str, dict[str, Any]]]) -> Any:
    """Scores, counts of tokens and hooks that are left, of every (intervention, options) in one process."""
    engine = build_engine(path)
    found = []
    for intervention, options in runs:
        scale = 0.5 if options.get("relative", True) else 8.0
        scorer = EpisodeScorer(
            engine,
            settings={"use_remove_padding": False, "use_fused_kernels": False},
            temperature=TEMPERATURE,
            intervention=intervention,
            **{"layer": 1 if intervention == "hidden_state" else -1, "relative": True, "max_tokens": 4096, **options},
        )
        with engine.eval_mode():
            scores = scorer(make_requests(intervention, counts[rank], scale))
        modules = (engine.module.lm_head, engine.module.model.norm, engine.module.model.layers[0])
        left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        tokens = (scorer.path_tokens, scorer.branch_tokens, scorer.unshared_tokens)
        found.append(([(s.states, s.divergence) for s in scores], tokens, left))
    return found


def expected(path: str, requests: list[EpisodeRequest], intervention: str, relative: bool = True) -> list[tuple]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    layer = 1 if intervention == "hidden_state" else -1

    def moved(state: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return state + noise.double() * (state.norm() if relative else 1)

    def answers(request: EpisodeRequest, end: int, noise: torch.Tensor) -> torch.Tensor:
        """log q over the answers with the state at the episode's end moved in a forward pass of its own."""
        place = len(request.prompt) + end

        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, place] = moved(output[0, place], noise)
            return output

        values = []
        for answer in request.answers:
            context = torch.cat([request.prompt, request.response[: end + 1], request.probe])
            handle = model.model.layers[layer - 1].register_forward_hook(hook)
            logits = model(torch.cat([context, answer])[None]).logits[0] / TEMPERATURE
            handle.remove()
            log_p = logits[len(context) - 1 : -1].log_softmax(-1).gather(-1, answer[:, None])
            values.append(log_p.mean())
        return torch.stack(values).log_softmax(-1)

    def vocabulary(request: EpisodeRequest, end: int, noise: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([request.prompt, request.response[: end + 1], request.probe])
        state = model.model(ids[None]).last_hidden_state[0, -1]
        return (model.lm_head(moved(state, noise)) / TEMPERATURE).log_softmax(-1)

    log_q = answers if intervention == "hidden_state" else vocabulary
    found = []
    with torch.no_grad():
        for request in requests:
            ids = torch.cat([request.prompt, request.response])[None]
            hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
            states = hidden[[len(request.prompt) - 1, *(len(request.prompt) + end for end in request.ends)]]
            divergence = torch.zeros(len(request.asked), DRAWS, dtype=torch.float64)
            for row, k in enumerate(request.asked):
                base = log_q(request, request.ends[k], torch.zeros(SIZE))
                for m in range(DRAWS):
                    other = log_q(request, request.ends[k], request.noise[row, m])
                    divergence[row, m] = (base.exp() * (base - other)).sum()
            found.append((states, divergence))
    return found


def assert_scores(found: list[tuple], wanted: list[tuple]) -> None:
    assert len(found) == len(wanted)
    for (states, divergence), (right_states, right) in zip(found, wanted, strict=True):
        torch.testing.assert_close(states.double(), right_states, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(divergence, right, rtol=2e-3, atol=2e-5)


LAYOUTS = {
    "fused": {},
    "a node for every episode": {"fused_tokens": 0},
    "in parts": {"max_tokens": 110},
    "absolute": {"relative": False},
}


def test_equal_to_one_sequence_at_a_time(tiny_model: Path) -> None:
    """States and divergences are those of separate forward passes with the state moved, however rows are laid out; no
    hook stays behind."""
    runs = [(intervention, options) for intervention in ("hidden_state", "lm_head") for options in LAYOUTS.values()]
    (found,) = run_on_ranks(1, score, str(tiny_model), (6,), runs)
    for (intervention, options), (scores, tokens, left) in zip(runs, found, strict=True):
        relative = options.get("relative", True)
        requests = make_requests(intervention, 6, 0.5 if relative else 8.0)
        wanted = expected(str(tiny_model), requests, intervention, relative)
        assert_scores(scores, wanted)
        assert min(float(divergence.max()) for _, divergence in wanted) > 1e-3
        assert left == found[0][2] and tokens[2] == sum(r.unshared for r in requests) > tokens[0] + tokens[1]


def test_ranks_with_different_numbers(tiny_model: Path) -> None:
    """A rank with fewer responses, or none, takes part in every collective; the head is inside the sharded module."""
    runs = [("hidden_state", {"max_tokens": 110}), ("lm_head", {"max_tokens": 110})]
    found = run_on_ranks(2, score, str(tiny_model), (5, 0), runs)
    for (intervention, _), (scores, *_), (nothing, tokens, _) in zip(runs, *found, strict=True):
        assert_scores(scores, expected(str(tiny_model), make_requests(intervention, 5), intervention))
        assert nothing == [] and tokens == (0, 0, 0)


def bits(rank: int, world: int, path: str) -> Any:
    """Logits of a row whose perturbations are 0, and of the same row without any hook of ours."""
    from verl.utils import tensordict_utils as tu

    engine = build_engine(path)
    settings = {"use_remove_padding": False, "use_fused_kernels": False}
    logits: list[torch.Tensor] = []
    engine.module.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.clone()))
    found = []
    for intervention, layer in (("hidden_state", 1), ("lm_head", -1)):
        scorer = EpisodeScorer(
            engine,
            settings=settings,
            temperature=1.0,
            layer=layer,
            intervention=intervention,
            relative=True,
            max_tokens=4096,
        )
        requests = make_requests(intervention, 6, scale=0.0)
        (pack,) = pack_requests(requests, 4096)
        logits.clear()
        with engine.eval_mode():
            scores = scorer(requests)
            with engine.tree_attention():
                batch = packed_batch([PackedRow(pack.pack, pack.predict, torch.ones_like(pack.predict), pack.state_at)])
                tu.assign_non_tensor(batch, **settings, temperature=1.0, gcpo_layer=layer)
                engine.infer_batch(batch)
        found.append((*logits, max(float(s.divergence.max()) for s in scores)))
    return found


def test_injecting_h_itself(tiny_model: Path) -> None:
    """It reproduces the unperturbed distribution bit for bit. Between the copies in a row a matrix product may round
    the last digit differently, which is why nothing is run at all where nothing is perturbed."""
    for moved, plain, divergence in run_on_ranks(1, bits, str(tiny_model))[0]:
        assert moved.numel() and torch.equal(moved, plain)
        assert divergence < 1e-6
