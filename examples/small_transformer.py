"""A small Qwen2 transformer with only torch, and three ways to run it: `read`, `log_probs`, `generate`.

It stands in for vLLM and FSDP. It is fast on one core because no work is done twice: texts are given in segments, and
segments with which several texts begin go through the model once, with gradients too. The prompt of a question is
shared by its responses so, and the candidates by the contexts of GCPO.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from gcpo.settings import ConfigError

Ids = tuple[int, ...]
Text = Sequence[Ids]
"""Token ids in segments."""


@dataclass
class Cache:
    """Keys and values [R, heads, places, size] of each layer, and which of the used places hold a token [R, used]."""

    layers: list[list[Tensor]]
    valid: Tensor

    def rows(self, index: Tensor, room: int = 0) -> Cache:
        """Some rows, with places for ``room`` more tokens."""
        used = self.valid.shape[1]
        layers = [[F.pad(x[index, :, :used], (0, 0, 0, room)) for x in pair] for pair in self.layers]
        return Cache(layers, self.valid[index])

    def add(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Append to the keys and values of a layer: in place if there is room, else differentiably."""
        used, end = self.valid.shape[1], self.valid.shape[1] + new[0].shape[2]
        if self.layers[layer][0].shape[2] < end:
            self.layers[layer] = [torch.cat(both, 2) for both in zip(self.layers[layer], new, strict=True)]
        else:
            for old, added in zip(self.layers[layer], new, strict=True):
                old[:, :, used:end] = added
        return [x[:, :, :end] for x in self.layers[layer]]


class Transformer:
    """Qwen2 with tied embeddings, from a folder that transformers wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        if self.config["model_type"] != "qwen2" or not self.config["tie_word_embeddings"]:
            raise ConfigError(f"{folder} holds no Qwen2 model with tied embeddings; choose another one")
        weights = load_file(folder / "model.safetensors").items()
        self.weights = {name.removeprefix("model."): x.float().requires_grad_() for name, x in weights}
        for x in self.weights.values():
            x.grad = torch.zeros_like(x)
        self.size = self.config["hidden_size"] // self.config["num_attention_heads"]
        theta = self.config.get("rope_parameters", self.config)["rope_theta"]
        places = torch.arange(self.config["max_position_embeddings"])[:, None]
        angles = (places / theta ** (torch.arange(0, self.size, 2) / self.size)).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def states(self, ids: Tensor, valid: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """States [R, T, d] after the final norm of tokens [R, T] behind ``past``, and the cache of all tokens.

        ``valid`` [R, T] is False in the padding on the right.
        """
        mask, places, layers = None, valid.cumsum(1) - 1, self.config["num_hidden_layers"]
        if past is None:
            none = torch.empty(len(ids), self.config["num_key_value_heads"], 0, self.size, dtype=self.cos.dtype)
            cache = Cache([[none, none] for _ in range(layers)], valid[:, :0])
        else:
            cache, places = Cache(list(past.layers), past.valid), places + past.valid.sum(1, keepdim=True)
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & valid[:, None]
            mask = torch.cat([past.valid[:, None].expand(-1, ids.shape[1], -1), causal], 2)[:, None]
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat([-b, a], -1) * sin

        x = F.embedding(ids, self.weights["embed_tokens.weight"])
        for at in range(layers):
            w = {name: self.weights[f"layers.{at}.{name}"] for name in LAYER}
            y = self.norm(x, w["input_layernorm.weight"])
            parts = (F.linear(y, w[f"self_attn.{p}_proj.weight"], w[f"self_attn.{p}_proj.bias"]) for p in "qkv")
            query, key, value = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
            key, value = cache.add(at, rotate(key), value)
            options = {"is_causal": mask is None, "enable_gqa": query.shape[1] != key.shape[1]}
            y = F.scaled_dot_product_attention(rotate(query), key, value, mask, **options)
            x = x + F.linear(y.transpose(1, 2).flatten(2), w["self_attn.o_proj.weight"])
            y = self.norm(x, w["post_attention_layernorm.weight"])
            y = F.silu(F.linear(y, w["mlp.gate_proj.weight"])) * F.linear(y, w["mlp.up_proj.weight"])
            x = x + F.linear(y, w["mlp.down_proj.weight"])
        cache.valid = torch.cat([cache.valid, valid], 1)
        return self.norm(x, self.weights["norm.weight"]), cache

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])

    def next_token(self, states: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [..., vocabulary] of the token that follows."""
        return F.log_softmax(F.linear(states, self.weights["embed_tokens.weight"]) / temperature, -1)

    def save(self, folder: Path) -> None:
        """A copy of the folder that it came from with the weights as they are now."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("recipe.json"))
        weights = {f"model.{name}": x.detach() for name, x in self.weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


LAYER = [f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
LAYER += [f"{part}_layernorm.weight" for part in ("input", "post_attention")] + ["self_attn.o_proj.weight"]
LAYER += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [R, T] padded on the right, and which of them are there [R, T]."""
    lengths = torch.tensor([len(row) for row in rows])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.tensor(list(itertools.chain(*rows)))
    return torch.zeros(valid.shape, dtype=torch.long).masked_scatter(valid, ids), valid


def read(model: Transformer, texts: Sequence[Text], room: int = 0) -> tuple[Cache, Tensor]:
    """Return the cache of R texts of equally many segments, with ``room`` more places, and their last states [R, d].

    Segments with which several texts begin go through the model once, with gradients too.
    """
    known = {segment: at for at, segment in enumerate({segment for text in texts for segment in text})}
    paths = [tuple(known[segment] for segment in text) for text in texts]
    counts = [len({path[:end] for path in paths}) for end in range(1, len(paths[0]) + 1)]
    # Segments after which no text leaves the others are read together with the next.
    ends = [end for end in range(1, len(counts) + 1) if end == len(counts) or counts[end] != counts[end - 1]]
    cache, place, last = None, {}, torch.empty(0)
    for start, end in itertools.pairwise([0, *ends]):
        nodes = {path[:end]: tuple(itertools.chain(*text[start:end])) for path, text in zip(paths, texts, strict=True)}
        past = cache and cache.rows(torch.tensor([place[node[:start]] for node in nodes]))
        ids, valid = pad(list(nodes.values()))
        states, cache = model.states(ids, valid, past)
        last = states[torch.arange(len(ids)), valid.sum(1) - 1]
        place = {node: at for at, node in enumerate(nodes)}
    order = torch.tensor([place[path] for path in paths])
    assert cache is not None
    return cache.rows(order, room), last[order]


def log_probs(
    model: Transformer, texts: Sequence[Text], responses: Sequence[Ids], temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(response | text) of every token [R, T], 0 behind a response, and the last states of the texts [R, d]."""
    (cache, state), lengths = read(model, texts), torch.tensor([len(response) for response in responses])
    order, empty = lengths.argsort(stable=True), int((lengths == 0).sum())
    found = [torch.zeros(empty, int(lengths.max()))]
    # Of about the same length, so that little of a batch is padding; an empty tensor would be one chunk.
    for rows in torch.split(order[empty:], 32) if empty < len(order) else ():
        ids, valid = pad([responses[i] for i in rows.tolist()])
        states, _ = model.states(ids, valid, cache.rows(rows))
        before = torch.cat([state[rows, None], states[:, :-1]], 1)
        log_p = model.next_token(before, temperature).gather(2, ids[:, :, None])[:, :, 0]
        found.append(F.pad(torch.where(valid, log_p, 0), (0, int(lengths.max()) - ids.shape[1])))
    return torch.cat(found)[order.argsort()], state


@dataclass
class Response:
    """Sampled tokens with the end token, their log pi_old [T], and whether the end token is missing."""

    ids: Ids
    log_p: Tensor
    is_cut: bool


@torch.no_grad()
def generate(
    model: Transformer, texts: Sequence[Text], most: int, temperature: float, end: int, seed: int
) -> list[Response]:
    """A response to every text, all together; temperature 0 takes the most likely tokens."""
    noise, (cache, state) = torch.Generator().manual_seed(seed), read(model, texts, most)
    tokens, log_p = torch.full((len(texts), most), end), torch.zeros(len(texts), most)
    rows, is_open = torch.arange(len(texts)), torch.ones(len(texts), dtype=torch.bool)
    for at in range(most):
        scores = model.next_token(state, temperature or 1.0)
        # The token with the largest p / Exponential(1) is a draw from p.
        race = scores - torch.empty_like(scores).exponential_(generator=noise).log() if temperature else scores
        token = race.argmax(1, keepdim=True)
        tokens[rows, at], log_p[rows, at] = token[:, 0], scores.gather(1, token)[:, 0]
        is_open &= token[:, 0] != end
        if not is_open.any():
            break
        if is_open.sum() < 0.75 * len(rows):  # a copy of the cache is cheaper than to go on with closed rows
            rows, token, cache = rows[is_open], token[is_open], cache.rows(is_open.nonzero()[:, 0], most - at)
            is_open = is_open[is_open]
        states, cache = model.states(token, torch.ones_like(token, dtype=torch.bool), cache)
        state = states[:, 0]
    is_end = tokens == end
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, most).tolist()
    return [Response(tuple(tokens[i, :t].tolist()), log_p[i, :t], not is_end[i, t - 1]) for i, t in enumerate(lengths)]
