"""Rules that decide whether a model can attend over packed trees, from its configuration and its attention calls.

A packed tree puts the tokens of many sequences into one row. A layer is exact on such a row only if the result for a
token depends only on the token's ancestors in the tree. The rules refuse every known setting that
breaks this. In doubt a rule refuses a model that would have been exact rather than accepting a
wrong one: a refused model is scored one sequence at a time, which is slower but exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types", "attention_layers", "hybrid_override_pattern")
"""Settings that list the type of every layer."""
_FULL_KINDS = {"full_attention", "attention", "global"}

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope", "su"}
"""Types of rotary embedding that choose their frequencies by the longest sequence of the row."""

_HARMLESS_KEYWORDS = frozenset(
    {
        "position_ids",  # the rotary embedding is applied before the attention
        "position_embeddings",
        "cache_position",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "deterministic",  # a switch of flash-attn's backward pass
    }
)
"""Keywords of attention functions that do not change which keys a query sees."""
_FALSE_IS_HARMLESS = frozenset({"output_attentions"})


def _is_on(value: Any) -> bool:
    return bool(value) and not isinstance(value, torch.Tensor)


def _is_size(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_size, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and ("relative" in value or value == "alibi")


_RULES: tuple[tuple[str, str, str, Callable[[Any], bool]], ...] = (
    # the model's property; names of settings; excluded names; values that enable it
    ("attends within a window", r"window|^local_attention", r"max_window_layers|pattern|^use_", _is_size),
    ("attends within chunks", r"(attention|attn).*chunk", r"^use_", _is_size),
    ("attends to chosen keys only", r"^index_topk|sparse_attention|^moba|^nsa_", r"$^", _is_on),
    ("caps its attention logits", r"(attention|attn).*(soft_?cap|logit_?cap)", r"$^", _is_on),
    ("adds a bias by distance to its attention logits", r"alibi|^(use_|has_)?relative_", r"$^", _is_on),
    ("adds a bias by distance to its attention logits", r"^position_embedding_type$", r"$^", _is_relative),
    (
        "has recurrent or convolutional layers",
        r"^(use_)?(mamba|ssm|rwkv|lru|linear_(attn|attention|conv|key|value|num)|conv_kernel|short_conv)"
        r"|^conv_l_cache$|^state_size$|^lightning_|^recurrent_",
        r"$^",
        _is_on,
    ),
    ("attends to later tokens", r"^use_bidirectional_attention$|^bidirectional", r"$^", _is_on),
    ("attends to later tokens", r"^is_causal$", r"$^", lambda value: value is False),
    ("has attention dropout", r"(attention|attn).*drop", r"$^", _is_on),
)


def tree_problem(config: Any, model: type[torch.nn.Module]) -> str | None:
    """Return why a model cannot be run on packed trees, or ``None`` if its configuration does not forbid it.

    A window is refused even if it is longer than every sequence.

    Args:
        config: the model's transformers configuration.
        model: the class of the model.
    """
    kind = model.__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{kind} does not take its attention function from transformers' AttentionInterface"
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((f"{kind} {problem}" for part in (text_config, config) for problem in _problems(part)), None)


def _problems(config: Any) -> Iterator[str]:
    others = _other_kinds(config)
    if others:
        yield f"has layers that are not full attention: {', '.join(sorted(others))}"
    settings = dict(vars(config))
    if settings.get("use_sliding_window") is False:
        # Qwen2 and related models keep the width of a disabled window.
        settings.pop("sliding_window", None)
    for what, names, left_out, on in _RULES:
        for name, value in sorted(settings.items()):
            if re.search(names, name.lower()) and not re.search(left_out, name.lower()) and on(value):
                yield f"{what} ({name}={value})"
    for rope in _rope_types(config):
        if rope in _LENGTH_DEPENDENT_ROPE:
            yield f"chooses its rotary frequencies by the longest sequence of a row (rope_type={rope})"


def _other_kinds(config: Any) -> set[str]:
    """Return the layer types of a configuration that are not full attention."""
    listed: set[str] = set()
    for name in _KINDS_OF_LAYERS:
        value = getattr(config, name, None)
        if isinstance(value, str):  # one letter per layer; "*" is attention
            value = ["attention" if letter == "*" else letter for letter in value]
        listed |= {str(entry) for entry in value or []}
    return listed - _FULL_KINDS


def _rope_types(config: Any) -> Iterator[str]:
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, Mapping):
            # Some models have one entry per layer type.
            for entry in (value, *value.values()):
                if isinstance(entry, Mapping):
                    yield str(entry.get("rope_type", entry.get("type")))


def call_problem(module: torch.nn.Module, keywords: Mapping[str, Any]) -> str | None:
    """Return why a call of the attention function cannot be answered on a packed tree, ``None`` if it can.

    Args:
        module: the calling attention layer.
        keywords: its keywords that are not parameters of the attention function.
    """
    kind = type(module).__name__
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:
        return f"{kind} attends to later tokens (is_causal={causal})"
    unknown = {
        name: value
        for name, value in keywords.items()
        if value is not None
        and name not in _HARMLESS_KEYWORDS | {"is_causal"}
        and not (name in _FALSE_IS_HARMLESS and value is False)
    }
    if not unknown:
        return None
    shown = ", ".join(
        f"{name}={value}" if isinstance(value, int | float | str | bool) else name for name, value in unknown.items()
    )
    return f"{kind} gives its attention function keywords that change which keys are seen or how: {shown}"
