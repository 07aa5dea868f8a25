"""Which models are refused: tiny random models of many families are either refused by name or exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from gcpo.scoring import PrefixForest
from gcpo.scoring.attention import tree_attention, tree_attention_on, tree_problem
from gcpo.scoring.support import call_problem
from tests.scoring.test_attention import VOCABULARY, gap, log_probs_of, model

WINDOW = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def build(family: str, **changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # as far from uniform attention as a trained model
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return net


def largest_gap(net: transformers.PreTrainedModel) -> float:
    """Log-probabilities of sequences that are longer than the window, packed against one at a time."""
    generator = torch.Generator().manual_seed(5)
    root, stem, *ends = (torch.randint(3, VOCABULARY, (k,), generator=generator) for k in (20, 18, 9, 13, 22))
    sequences = [torch.cat(parts) for parts in ((root, stem, ends[0]), (root, stem, ends[1]), (root, ends[2]))]
    (pack,) = PrefixForest(sequences, min_shared=2).packs()
    with torch.no_grad():
        wanted = [log_probs_of(net(s[None], use_cache=False).logits[0, :-1], s[1:]) for s in sequences]
        with tree_attention_on(net.config):
            logits = net(
                pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False, tree_pack=pack
            ).logits[0]
    places = dict(zip(pack.sequences, pack.places, strict=True))
    found = [log_probs_of(logits[places[i][:-1]], s[1:]) for i, s in enumerate(sequences)]
    return gap(found, wanted)


EXACT = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2 with the width of a window that is off": {"use_sliding_window": False, "sliding_window": WINDOW},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None, "num_local_experts": 4},
    "Phi3": {"sliding_window": None},
    "Starcoder2": {"sliding_window": None},
    "Gemma": {"head_dim": 8},
    "Olmo2": {},
    "SmolLM3": {},
    "Granite": {},
    "Cohere": {},
    "GPTNeoX": {},
}


@pytest.mark.parametrize("name", EXACT)
def test_served(name: str) -> None:
    """No false refusal: these go on as packed trees, and are exact."""
    net = build(name.split()[0], **EXACT[name])
    assert tree_problem(net.config, type(net)) is None
    assert largest_gap(net) < 1e-4


ALL_SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": WINDOW}
REFUSED = {
    "Mistral": ({"sliding_window": WINDOW}, "sliding_window=16"),
    "Mistral with a window longer than any sequence": ({"sliding_window": 4096}, "sliding_window=4096"),
    "Mixtral": ({"sliding_window": WINDOW, "num_local_experts": 4}, "sliding_window=16"),
    "Phi3": ({"sliding_window": WINDOW}, "sliding_window=16"),
    "Starcoder2": ({"sliding_window": WINDOW}, "sliding_window=16"),
    "RecurrentGemma": ({"attention_window_size": WINDOW, "head_dim": 8, "lru_width": 32}, "recurrent"),
    "Qwen2": (
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
        "not full attention: sliding_attention",
    ),
    "Qwen3": ({"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}, "sliding_attention"),
    "Qwen2Moe": (
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0, "num_experts": 4},
        "sliding",
    ),
    "Gemma2": ({"head_dim": 8, **ALL_SLIDING}, "sliding_attention"),
    "Gemma2 without windows": ({"head_dim": 8, "layer_types": ["full_attention"] * 2}, "window|attn_logit_softcapping"),
    "Cohere2": (ALL_SLIDING, "sliding_attention"),
    "Olmo3": (ALL_SLIDING, "sliding_attention"),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8, **ALL_SLIDING}, "sliding_attention"),
    "Exaone4": (ALL_SLIDING, "sliding_attention"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "AttentionInterface"),
    "Mamba": ({}, "AttentionInterface"),
    "Qwen3Next": ({"num_experts": 4, "head_dim": 8}, "AttentionInterface|linear_attention"),
    "GPT2": ({}, "attn_pdrop=0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_configuration(name: str) -> None:
    """The reason names the setting; nothing has to be built."""
    changes, reason = REFUSED[name]
    family = name.split()[0]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    kind = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    problem = tree_problem(config, kind)
    assert problem is not None and problem.startswith(kind.__name__)
    assert any(part in problem for part in reason.split("|")), problem


@pytest.mark.parametrize(
    ("family", "changes", "keyword"),
    [
        ("Mistral", {"sliding_window": WINDOW}, "sliding_window=16"),
        ("Phi3", {"sliding_window": WINDOW}, "sliding_window=16"),
        ("Starcoder2", {"sliding_window": WINDOW}, "sliding_window=16"),
        ("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 4}, "sliding_window=16"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}, "sliding_window=16"),
        ("Gemma2", {"head_dim": 8, "layer_types": ["full_attention"] * 2}, "softcap=50.0"),
        ("Nemotron", {"head_dim": 8}, "is not given the keywords"),
        ("GptOss", {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}, "s_aux"),
    ],
)
def test_a_call_is_never_answered_wrongly(family: str, changes: dict[str, Any], keyword: str) -> None:
    """A model that nobody asked about is stopped at its first layer, with the keyword."""
    with pytest.raises(ValueError, match=rf"{family}\w*Attention .*{keyword}.*gcpo.scoring.packing=dense"):
        largest_gap(build(family, **changes))


def test_keywords() -> None:
    """Keywords that are known to be harmless pass, and so does ``None``; any other value is refused, also 0."""
    layer = torch.nn.Identity()
    harmless = {"position_ids": torch.arange(3), "use_cache": False, "output_attentions": False, "is_causal": True}
    assert call_problem(layer, harmless) is None
    unknown = ("sliding_window", "softcap", "s_aux", "position_bias", "indices", "block_indices", "head_mask")
    unknown += ("cu_seq_lens_q", "max_length_k", "cu_seqlens", "alibi", "a_keyword_of_tomorrow")
    assert call_problem(layer, dict.fromkeys(unknown)) is None
    for name in unknown:
        for value in (16, 0, False, torch.zeros(2)):
            assert name in call_problem(layer, {name: value})
    assert "output_attentions=True" in call_problem(layer, {"output_attentions": True})
    assert "later tokens" in call_problem(layer, {"is_causal": False})
    layer.is_causal = False
    assert "later tokens" in call_problem(layer, {})
    (pack,) = PrefixForest([torch.tensor([1, 2, 3])]).packs()
    rows = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="sliding_window=4096"):
        tree_attention(torch.nn.Identity(), rows, rows, rows, None, tree_pack=pack, sliding_window=4096)


SETTINGS = {
    "sliding_window": 128,
    "attention_window_size": 2048,
    "local_attention": 128,
    "window_sizes": [64, 0],
    "attention_chunk_size": 8192,
    "attn_logit_softcapping": 30.0,
    "attention_logit_cap": 50.0,
    "alibi": True,
    "use_alibi": True,
    "relative_attention_num_buckets": 32,
    "position_embedding_type": "relative_key",
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "linear_conv_kernel_dim": 4,
    "conv_L_cache": 3,
    "index_topk": 2048,
    "use_bidirectional_attention": True,
    "is_causal": False,
    "attention_dropout": 0.1,
    "attn_pdrop": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_types": ["full_attention", "chunked_attention"],
    "layers_block_type": ["attention", "mamba"],
    "block_types": ["recurrent", "attention"],
    "attention_layers": ["global", "local"],
    "hybrid_override_pattern": "M*M",
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4},
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}
OFF = {
    "sliding_window": None,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "attention_chunk_size": 0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": 30.0,
    "alibi": False,
    "position_embedding_type": "absolute",
    "use_bidirectional_attention": False,
    "is_causal": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.1,
    "attention_bias": True,
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
    "chunk_size_feed_forward": 0,
}


class Configuration:
    """Settings and nothing else, as of a model whose code comes with its weights."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)


class Supported(torch.nn.Module):
    _supports_attention_backend = True


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_by_itself(name: str) -> None:
    """Each is found on a configuration that has nothing else, and inside that of a model with images."""
    problem = tree_problem(Configuration(**{name: SETTINGS[name]}), Supported)
    assert problem is not None and problem.startswith("Supported ")
    inner = Configuration(**{name: SETTINGS[name]})
    outer = Configuration(text_config=inner, get_text_config=lambda: inner)
    assert tree_problem(outer, Supported) == problem


@pytest.mark.parametrize("name", OFF)
def test_settings_that_are_off(name: str) -> None:
    """They do not turn a model away."""
    assert tree_problem(Configuration(**{name: OFF[name]}), Supported) is None


def test_a_window_that_is_off() -> None:
    """Some configurations keep the width of a window that is switched off; only this one width is excused."""
    assert tree_problem(Configuration(sliding_window=4096, use_sliding_window=False), Supported) is None
    both = Configuration(sliding_window=4096, use_sliding_window=False, attention_window_size=64)
    assert "attention_window_size=64" in tree_problem(both, Supported)


def test_by_hand() -> None:
    """The sentences."""
    net = model("Qwen2", torch.float32)
    assert tree_problem(net.config, type(net)) is None
    assert "AttentionInterface" in tree_problem(net.config, torch.nn.Linear)
    assert tree_problem(PretrainedConfig(attn_logit_softcapping=30.0), Supported) == (
        "Supported caps its attention logits (attn_logit_softcapping=30.0)"
    )
    assert tree_problem(Configuration(sliding_window=64, use_sliding_window=True), Supported) == (
        "Supported attends within a window (sliding_window=64)"
    )
