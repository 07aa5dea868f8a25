"""Packed rows with states that are perturbed inside the forward pass, and their scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from verl.utils.torch_functional import logprobs_from_logits

from gcpo.adapters.scoring import run_packs
from gcpo.algorithms import answer_divergence
from gcpo.scoring.branches import FUSED_TOKENS, EpisodePack, EpisodeRequest, pack_requests
from gcpo.scoring.rows import PackedRow

_AT_ONCE = 256
"""Number of rows of logits that are held in float32 at a time."""


@dataclass(frozen=True, kw_only=True)
class PerturbedRow(PackedRow):
    """A packed row in which some states are shifted by g; see `gcpo.scoring.branches.EpisodePack` for the positions.

    Attributes:
        perturbed: int64 [J], indices of the perturbed positions.
        noise: [J, d], the noise at these positions.
        relative: if True, g is the noise times the norm of the state, else the noise.
        intervention: ``hidden_state``: the output of the chosen layer is shifted; ``lm_head``: the input of the
            language-model head.
    """

    perturbed: Tensor
    noise: Tensor
    relative: bool
    intervention: Literal["hidden_state", "lm_head"]

    def register(self, layer: torch.nn.Module, head: torch.nn.Module) -> RemovableHandle:
        """Register the perturbation as a hook for the next forward pass.

        Args:
            layer: the module whose output is the chosen hidden state.
            head: the language-model head, whose inputs are the states of ``predict``.
        """
        if self.intervention == "lm_head":
            return head.register_forward_pre_hook(lambda module, args: self._move(args[0]))

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._move(output[0] if isinstance(output, tuple) else output)

        return layer.register_forward_hook(after)

    def _move(self, hidden: Tensor) -> None:
        """Add g to the perturbed positions of hidden [1, N, d], in place and in float32."""
        at = self.perturbed.to(hidden.device)
        state = hidden[0, at].float()
        noise = self.noise[: len(at)].to(state)
        if self.relative:
            noise = noise * state.norm(dim=-1, keepdim=True)
        hidden[0, at] = (state + noise).to(hidden.dtype)

    def read(self, logits: Tensor) -> Tensor:
        """Compute the requested values from the logits [Q, V] of ``predict``, Q >= 1.

        Returns:
            ``hidden_state``: the log-probabilities of the labels [Q]. ``lm_head``: KL(q || q_m) over the vocabulary
            for every perturbed position [J], with q at the last unperturbed position before it.
        """
        if self.intervention == "hidden_state":
            return logprobs_from_logits(logits, self.labels.to(logits.device))
        moved = self.perturbed.to(logits.device)
        base = torch.arange(len(logits), device=logits.device)
        base[moved] = 0
        base = base.cummax(0).values[moved]
        found = [
            _divergence(logits[b], logits[m]) for b, m in zip(base.split(_AT_ONCE), moved.split(_AT_ONCE), strict=True)
        ]
        return torch.cat(found)


def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Return the KL of the distributions [J, V] that two sets of logits make."""
    log_q, log_r = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_r)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class EpisodeScore:
    """The scores of one response, on the CPU.

    Attributes:
        states: [1 + K, d], float32: at the end of the prompt and of every episode; ``None`` if not requested.
        divergence: [number of requested episodes, M], KL(q || q_m).
    """

    states: Tensor | None
    divergence: Tensor


class EpisodeScorer:
    """Answer distributions under perturbed states, without gradient, in the order of the requests.

    All ranks must call it together: a rank with fewer rows than another runs filler rows of two tokens.

    Args:
        engine: a ``GCPOFSDPEngine`` in eval mode whose model can be run on packed trees.
        settings: engine settings of the batch (``use_remove_padding``, ``use_fused_kernels``).
        temperature: temperature of the rollout.
        layer: the layer whose outputs are the states h.
        intervention: ``gc2po.intervention``.
        relative: whether noise is relative to the state's norm.
        max_tokens: token budget of a row.
        fused_tokens: see `gcpo.scoring.branches.FUSED_TOKENS`.
    """

    def __init__(
        self,
        engine: Any,
        *,
        settings: dict[str, Any],
        temperature: float,
        layer: int,
        intervention: Literal["hidden_state", "lm_head"],
        relative: bool,
        max_tokens: int,
        fused_tokens: int = FUSED_TOKENS,
    ) -> None:
        self.engine, self.settings, self.temperature = engine, settings, temperature
        self.layer, self.relative = layer, relative
        self.intervention: Literal["hidden_state", "lm_head"] = intervention
        self.max_tokens, self.fused_tokens = max_tokens, fused_tokens
        self.path_tokens = self.branch_tokens = self.unshared_tokens = 0

    def __call__(self, requests: Sequence[EpisodeRequest]) -> list[EpisodeScore]:
        """Score ``requests``."""
        packs = pack_requests(requests, self.max_tokens, fused_tokens=self.fused_tokens)
        rows = [self._row(pack) for pack in packs]
        self.path_tokens += sum(pack.path_tokens for pack in packs)
        self.branch_tokens += sum(len(pack.pack) - pack.path_tokens for pack in packs)
        self.unshared_tokens += sum(request.unshared for request in requests)
        constants = {**self.settings, "temperature": self.temperature, "gcpo_layer": self.layer}
        found = run_packs(self.engine, rows, is_tree=True, **constants)
        states: list[Tensor | None] = [None] * len(requests)
        divergence: list[list[Tensor]] = [[] for _ in requests]
        for pack, (values, hidden) in zip(packs, found, strict=True):
            values = values.double().cpu()
            hidden = hidden.cpu().view(len(pack.state_at), -1) if len(pack.state_at) else hidden
            for i, asked in pack.requests:
                request = requests[i]
                count = len(asked) * (request.copies - 1)
                if request.answers:
                    count = len(asked) * request.copies * sum(map(len, request.answers))
                own, values = values[:count], values[count:]
                divergence[i].append(self._divergence(request, asked, own))
            for i, asked in pack.requests:
                # Of the parts of a request, the last one has the states.
                if requests[i].states and (not requests[i].asked or asked[-1] == requests[i].asked[-1]):
                    size = 1 + len(requests[i].ends)
                    states[i], hidden = hidden[:size], hidden[size:]
        return [EpisodeScore(s, torch.cat(d)) for s, d in zip(states, divergence, strict=True)]

    def _row(self, pack: EpisodePack) -> PerturbedRow:
        return PerturbedRow(
            pack.pack,
            pack.predict,
            pack.labels,
            pack.state_at,
            perturbed=pack.perturbed,
            noise=pack.noise,
            relative=self.relative,
            intervention=self.intervention,
        )

    def _divergence(self, request: EpisodeRequest, asked: Sequence[int], values: Tensor) -> Tensor:
        """Return the divergences [len(asked), M] from the values of a row."""
        if not request.answers:
            return values.view(len(asked), request.copies - 1)
        lengths = [len(answer) for answer in request.answers]
        per_answer = values.view(len(asked), request.copies, sum(lengths)).split(lengths, dim=-1)
        return answer_divergence(torch.stack([answer.mean(-1) for answer in per_answer], dim=-1))
