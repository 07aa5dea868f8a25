"""Models and groups of the engine part, and the same numbers from only transformers, one sequence at a time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.packing import make_problem
from examples.arithmetic.training_data import Recipe
from examples.arithmetic.warm_start import make_tokenizer
from gcpo import algorithms
from gcpo.scoring.branches import EpisodeRequest
from gcpo.scoring.requests import ScoreRequest

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
HALF_A_BILLION = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""The dimensions of Qwen2 with 0.5 B parameters."""
EPISODES, DRAWS, PROBE, ANSWERS = 4, 2, 6, (1, 2, 3)
"""Of a request of GC²PO: episodes, perturbations, tokens of the probe and of each answer."""
SIGMA, KL_WEIGHT = 0.1, 0.06


def make_model(folder: Path, sizes: dict[str, Any], seed: int = 0) -> str:
    """Write a random Qwen2 model with the tokenizer of the quick start; returns its folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(Recipe())
    config = Qwen2Config(**sizes, max_position_embeddings=1 << 18, initializer_range=0.05)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Group:
    """The requests of a group of n responses of about T tokens.

    Attributes:
        contexts: x_{i,0} with y_i: log-probabilities, and the state at the end of x_{i,0}.
        episodes: responses with perturbed states after every episode, for ``lm_head``.
        branches: the same for ``hidden_state``, with answers.
    """

    contexts: list[ScoreRequest]
    episodes: list[EpisodeRequest]
    branches: list[EpisodeRequest]


def make_group(n: int, length: int, sizes: dict[str, Any], seed: int = 0) -> Group:
    """Return a group of random tokens."""
    sizes_of = Namespace(n=n, length=length, spread=0.3, groups=1, question=64, seed=seed, vocabulary=512)
    problem, noise = make_problem(sizes_of, 1), torch.Generator().manual_seed(seed)
    contexts, episodes, branches = [], [], []
    for sequence, count in zip(problem.sequences, problem.targets, strict=True):
        context, response = sequence[:-count], sequence[-count:]
        contexts.append(ScoreRequest(context, response, log_probs=True, state_at=len(context) - 1))
        ends = tuple(count * (k + 1) // EPISODES - 1 for k in range(EPISODES))
        probe = torch.randint(3, 512, (PROBE,), generator=noise)
        answers = tuple(torch.randint(3, 512, (size,), generator=noise) for size in ANSWERS)
        moves = torch.randn(EPISODES, DRAWS, sizes["hidden_size"], generator=noise) * SIGMA
        question = sequence[:64]
        common = (question, response, ends, tuple(range(EPISODES)), probe)
        episodes.append(EpisodeRequest(*common, (), moves))
        branches.append(EpisodeRequest(*common, answers, moves))
    return Group(contexts, episodes, branches)


def kl_loss(references: Sequence[Tensor]) -> Callable[[int, Tensor], Tensor]:
    """kappa KL' (Eq. 12) of a response with fixed log pi'_ref [T]."""

    def loss(i: int, log_p: Tensor) -> Tensor:
        log_p = at_least_float32(log_p)
        return KL_WEIGHT * algorithms.causal_kl(log_p[None], references[i].to(log_p)[None]).mean()

    return loss


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; other values as they are."""
    return values.float() if values.dtype.itemsize == 2 else values


# ---- the same numbers, one sequence at a time ------------------------------------------------------------------------


class OneAtATime:
    """transformers' model on a device, in a dtype, with one sequence in a pass."""

    def __init__(self, folder: str, device: str, dtype: torch.dtype, layer: int) -> None:
        self.model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model.to(device).eval()
        self.device, self.layer = device, layer

    def log_probs(self, request: ScoreRequest) -> tuple[Tensor, Tensor]:
        """Log-probabilities [T] of the target, and the state [d] at ``state_at``."""
        ids = torch.cat([request.context, request.target]).to(self.device)
        states = self.model.model(ids[None], use_cache=False).last_hidden_state[0]
        start = len(request.context)
        logits = at_least_float32(self.model.lm_head(states[start - 1 : -1]))
        return logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0], states[request.state_at]

    def gradient(self, requests: Sequence[ScoreRequest], loss: Callable[[int, Tensor], Tensor]) -> dict[str, Tensor]:
        """The gradient of the sum of the losses, by the names of the parameters."""
        self.model.zero_grad()
        for i, request in enumerate(requests):
            loss(i, self.log_probs(request)[0]).backward()
        return {name: p.grad for name, p in self.model.named_parameters()}

    def divergence(self, request: EpisodeRequest) -> Tensor:
        """KL(q || q_m) [episodes, M] under perturbed states: of answers if the request has some, else of tokens."""
        distribution = self._answers if request.answers else self._tokens
        found = []
        for k, moves in zip(request.asked, request.noise, strict=True):
            base, *others = (
                distribution(request, request.ends[k], move) for move in (torch.zeros_like(moves[0]), *moves)
            )
            found.append(torch.stack([(base.exp() * (base - other)).sum() for other in others]))
        return torch.stack(found)

    def _context(self, request: EpisodeRequest, end: int) -> Tensor:
        return torch.cat([request.prompt, request.response[: end + 1], request.probe]).to(self.device)

    def _moved(self, state: Tensor, move: Tensor) -> Tensor:
        precise = at_least_float32(state)
        return (precise + move.to(precise) * precise.norm()).to(state.dtype)

    def _tokens(self, request: EpisodeRequest, end: int, move: Tensor) -> Tensor:
        state = self.model.model(self._context(request, end)[None], use_cache=False).last_hidden_state[0, -1]
        return at_least_float32(self.model.lm_head(self._moved(state, move))).log_softmax(-1)

    def _answers(self, request: EpisodeRequest, end: int, move: Tensor) -> Tensor:
        place, context = len(request.prompt) + end, self._context(request, end)

        def shift(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, place] = self._moved(output[0, place], move)
            return output

        values = []
        for answer in request.answers:
            ids = torch.cat([context, answer.to(self.device)])
            handle = self.model.model.layers[self.layer - 1].register_forward_hook(shift)
            logits = at_least_float32(self.model(ids[None], use_cache=False).logits[0, len(context) - 1 : -1])
            handle.remove()
            values.append(logits.log_softmax(-1).gather(1, ids[len(context) :, None]).double().mean())
        return torch.stack(values).log_softmax(-1)
