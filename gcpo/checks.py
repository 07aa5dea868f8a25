"""Checks of a whole run: everything that can be known before the first process starts.

``check_run`` needs neither Ray nor a GPU. ``recipe.gcpo.main_gcpo`` calls it before Ray starts; under
``verl.trainer.main_ppo`` the trainer calls it before it makes a worker.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gcpo.config import ConfigError, GCPOConfig
from gcpo.counterfactual.config import GC2POConfig

logger = logging.getLogger(__name__)

MANAGER = "gcpo.adapters.rollout.GCPOAgentLoopManager"
_REQUIRED_COLUMNS = ("prompt", "data_source", "reward_model")


def check_run(config: DictConfig) -> GCPOConfig:
    """Check the configuration of a run and fill in the context length.

    ``actor_rollout_ref.rollout.max_model_len`` is set to what the longest prompt with candidates needs where it is
    ``null``.

    Raises:
        ConfigError: something in it cannot work; the sentence says what to change.
    """
    rollout = config.actor_rollout_ref.rollout
    group = OmegaConf.to_container(config.gcpo, resolve=True) if config.get("gcpo") is not None else {}
    gcpo = GCPOConfig.from_config(group, n=rollout.n, response_length=config.data.max_response_length)
    _check_supported(config, gcpo)
    _check_model(config)
    _check_lengths(config, gcpo, model_config(config))
    for name in ("train_files", "val_files"):
        _check_files(name, config.data)
    _check_reward(config)
    return gcpo


def check_gc2po_run(config: DictConfig) -> GC2POConfig:
    """Check the configuration of a GC2PO run, as `check_run` does for GCPO.

    Raises:
        ConfigError: something in it cannot work; the sentence says what to change.
    """
    rollout = config.actor_rollout_ref.rollout
    group = OmegaConf.to_container(config.gc2po, resolve=True) if config.get("gc2po") is not None else {}
    _check_model(config)
    model = model_config(config)
    gc2po = GC2POConfig.from_config(group, n=rollout.n, depth=getattr(model, "num_hidden_layers", None))
    requests = OmegaConf.to_container(config.gcpo, resolve=True) if config.get("gcpo") is not None else {}
    gcpo = GCPOConfig.from_config(requests, n=rollout.n, response_length=config.data.max_response_length)
    if not gcpo.is_grpo:
        raise ConfigError("gcpo.kappa and gcpo.weighting belong to GCPO: set gcpo.kappa=0 gcpo.weighting=off for GC2PO")
    _check_supported(config, gcpo, mode="gc2po")
    perturbs = gc2po.counterfactual
    if perturbs and (_get(config, "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size") or 1) > 1:
        raise ConfigError(
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size: sequence parallelism is not "
            "supported, set it to 1"
        )
    if perturbs and _get(config, "actor_rollout_ref.model.use_fused_kernels"):
        raise ConfigError(
            "actor_rollout_ref.model.use_fused_kernels=True replaces the forward in which states are perturbed, set it "
            "to False"
        )
    if not _get(config, "algorithm.norm_adv_by_std_in_grpo"):
        raise ConfigError(
            "algorithm.norm_adv_by_std_in_grpo is False: GC2PO divides by the standard deviation, set it to True"
        )
    if perturbs and model is not None:
        _check_perturbable(model)
    _check_lengths(config, gcpo, model)
    _check_branches(config, gc2po)
    for name in ("train_files", "val_files"):
        _check_files(name, config.data)
    _check_reward(config)
    return gc2po


def _check_branches(config: DictConfig, gc2po: GC2POConfig) -> None:
    """A response with the branches of one episode must fit into a forward pass."""
    if not gc2po.counterfactual:
        return
    answers, copies = gc2po.answers, 1 + gc2po.perturbation.draws
    branch = len(answers.prompt)
    if gc2po.form == "inject":
        branch = copies * (1 + branch + answers.max_answers * answers.max_tokens)
    need = config.data.max_prompt_length + config.data.max_response_length + max(branch, copies)
    budget = gc2po.max_token_len_per_gpu or config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    if need > budget:
        raise ConfigError(
            f"a response with the perturbations of one episode can take {need} tokens, a forward pass holds {budget}: "
            "raise gc2po.max_token_len_per_gpu, or lower gc2po.perturbation.draws or gc2po.answers.max_tokens"
        )


def _get(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, default=None)


def _check_supported(config: DictConfig, gcpo: GCPOConfig, mode: str = "gcpo") -> None:
    """Refuse by name what GCPO, or the other trainer mode, does not do yet."""
    required = {
        "trainer.use_v1": (True, "GCPO is built on verl's V1 trainer"),
        "trainer.v1.trainer_mode": (mode, "asynchronous modes are not supported"),
        "algorithm.adv_estimator": (mode, f"other estimators know nothing of what {mode} adds"),
        "actor_rollout_ref.actor.strategy": ("fsdp2", "other engines are not supported"),
        "actor_rollout_ref.rollout.name": ("vllm", "other rollout engines are not supported"),
        "actor_rollout_ref.rollout.agent.default_agent_loop": (
            "single_turn_agent",
            "multi-turn and tool use are not supported",
        ),
        "actor_rollout_ref.hybrid_engine": (True, "trainer and rollout share their devices"),
    }
    for key, (value, why) in required.items():
        if _get(config, key) != value:
            raise ConfigError(f"{key} is {_get(config, key)!r}: {why}, set {key}={value}")
    refused = {
        "actor_rollout_ref.rollout.multi_turn.enable": "multi-turn and tool use are not supported",
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": "multi-turn and tool use are not supported",
        "actor_rollout_ref.rollout.multi_turn.function_tool_path": "multi-turn and tool use are not supported",
        "actor_rollout_ref.rollout.full_determinism": "it gives every request the same seed; GCPO seeds each request",
        "actor_rollout_ref.actor.use_prefix_grouper": "it does not know the rows of the kappa term",
        "algorithm.filter_groups.enable": "group filtering is not supported",
        "algorithm.rollout_correction.bypass_mode": (
            "the causal reference needs the actor's own old log-probabilities, not the rollout's"
        ),
        "reward.reward_model.enable": "rewards must be known when a group completes; use a reward function",
        "distillation.enabled": "distillation is not supported",
        "skip.rollout_tq.enable": "a skipped rollout holds no collider draws",
    }
    for key, why in refused.items():
        if _get(config, key):
            raise ConfigError(f"{key} is {_get(config, key)!r}: {why}, leave it out")
    chunked = _get(config, "actor_rollout_ref.rollout.enable_chunked_prefill")
    if _get(config, "trainer.device") == "cpu" and chunked and gcpo.seed is not None:
        raise ConfigError(
            "actor_rollout_ref.rollout.enable_chunked_prefill is True: on the CPU vLLM cannot chunk the prompt of a "
            "request that has a seed, set it to False, or set gcpo.seed=null"
        )
    sequence_parallel = _get(config, "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size") or 1
    if sequence_parallel > 1 and not gcpo.is_grpo:
        raise ConfigError(
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size is "
            f"{sequence_parallel}: sequence parallelism is not supported, set it to 1"
        )
    if _get(config, "actor_rollout_ref.model.use_fused_kernels") and gcpo.weighting_on:
        raise ConfigError(
            "actor_rollout_ref.model.use_fused_kernels=True replaces the forward that hidden states are read from, "
            "set it to False"
        )
    if _get(config, "actor_rollout_ref.model.lora_rank") and not _get(config, "actor_rollout_ref.model.lora.merge"):
        raise ConfigError(
            "actor_rollout_ref.model.lora_rank is set without merging: set "
            "+actor_rollout_ref.model.lora.merge=True, so that vLLM is given whole weights"
        )
    if gcpo.needs_rollout and not _get(config, "actor_rollout_ref.rollout.agent.agent_loop_manager_class"):
        raise ConfigError(
            f"nothing makes the collider draws: set +actor_rollout_ref.rollout.agent.agent_loop_manager_class={MANAGER}"
        )
    if _get(config, "actor_rollout_ref.actor.loss_agg_mode") != "seq-mean-token-mean" and not gcpo.is_grpo:
        logger.warning(
            "gcpo: actor_rollout_ref.actor.loss_agg_mode is %s; Eq. 10 is seq-mean-token-mean",
            _get(config, "actor_rollout_ref.actor.loss_agg_mode"),
        )


def _check_model(config: DictConfig) -> None:
    path = str(config.actor_rollout_ref.model.path)
    local = Path(path).expanduser()
    if path.startswith(("/", "~", ".")) and not local.exists():
        raise ConfigError(f"actor_rollout_ref.model.path: there is no folder {path}")
    if local.is_dir() and not (local / "config.json").is_file():
        raise ConfigError(f"actor_rollout_ref.model.path: {path} has no config.json, so it is not a model folder")
    if local.is_dir() and not _get(config, "actor_rollout_ref.model.custom_chat_template"):
        tokenizer = local / "tokenizer_config.json"
        known = tokenizer.is_file() and json.loads(tokenizer.read_text()).get("chat_template")
        if not known and not list(local.glob("chat_template*")):
            raise ConfigError(
                f"the model in {path} has no chat template, and the candidates go into the user's message: set "
                "actor_rollout_ref.model.custom_chat_template"
            )


def model_config(config: DictConfig) -> Any:
    """transformers' configuration of the model's text part, from its folder or the hub; ``None`` for other places.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoConfig

    path = str(config.actor_rollout_ref.model.path)
    if "://" in path:
        return None
    try:
        found = AutoConfig.from_pretrained(
            str(Path(path).expanduser()),
            trust_remote_code=bool(_get(config, "actor_rollout_ref.model.trust_remote_code")),
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"actor_rollout_ref.model.path: {path} is no folder here and cannot be read from the hub: {reason}"
            if not Path(path).expanduser().exists()
            else f"actor_rollout_ref.model.path: transformers cannot read the config.json in {path}: {reason}"
        ) from error
    return found.get_text_config()


def _check_perturbable(model: Any) -> None:
    """States can be perturbed in packed rows of this model, as far as its class and configuration tell."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from gcpo.packing.attention import tree_problem

    if type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    problem = tree_problem(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(model)])
    if problem is not None:
        raise ConfigError(
            "actor_rollout_ref.model.path: GC2PO perturbs states in packed rows, which this model can't have: "
            f"{problem}; use another model, or gc2po.counterfactual=off"
        )


def longest_prompt(config: DictConfig, gcpo: GCPOConfig) -> int:
    """Tokens of the longest prompt with candidates: the question, the blocks with their labels, the fixed texts.

    The labels and fixed texts are counted as one token a character, which no tokenizer exceeds for plain text.
    """
    n = config.actor_rollout_ref.rollout.n
    blocks = gcpo.blocks
    count = n + (gcpo.reference.collider_context == "append")
    label = max(len(blocks.candidate.format(label=n)), len(blocks.collider))
    return config.data.max_prompt_length + len(blocks.intro + blocks.outro) + count * (blocks.max_tokens + label)


def _check_lengths(config: DictConfig, gcpo: GCPOConfig, model: Any) -> None:
    rollout, data = config.actor_rollout_ref.rollout, config.data
    prompt, response = data.max_prompt_length, data.max_response_length
    need, longest_row = prompt + response, prompt + response
    if gcpo.needs_rollout:
        with_blocks = longest_prompt(config, gcpo)
        longest_row = max(need, with_blocks + response)
        need = max(need, with_blocks + max(gcpo.collider.max_tokens, gcpo.conditioned.max_tokens))
    context = getattr(model, "max_position_embeddings", None)
    if context is not None and prompt + response > context:
        raise ConfigError(
            f"data.max_prompt_length + data.max_response_length is {prompt + response}, the model's context {context}: "
            "make one of them smaller"
        )
    limit = rollout.get("max_model_len") or context
    if limit is not None and max(need, longest_row) > limit:
        raise ConfigError(
            f"a prompt with {rollout.n} candidates can take {max(need, longest_row)} tokens with its response, and the "
            f"context is {limit}: lower gcpo.blocks.max_tokens (now {gcpo.blocks.max_tokens}), "
            "gcpo.collider.max_tokens or gcpo.conditioned.max_tokens, or raise "
            "actor_rollout_ref.rollout.max_model_len as far as the model allows"
        )
    actor = config.actor_rollout_ref.actor
    budget = gcpo.scoring.max_token_len_per_gpu or actor.ppo_max_token_len_per_gpu
    if not gcpo.is_grpo and longest_row > budget:
        raise ConfigError(
            f"the longest context to score takes {longest_row} tokens, a micro-batch holds {budget}: raise "
            "gcpo.scoring.max_token_len_per_gpu or lower gcpo.blocks.max_tokens"
        )
    if rollout.get("max_model_len") is None:
        with open_dict(config):
            rollout.max_model_len = max(need, longest_row)


_REWARD = "pkg://gcpo.rewards"
_REWARD_OPTIONS = (
    "format_weight",
    "require_think",
    "require_boxed",
    "sandbox",
    "sandbox_fusion_url",
    "time_limit",
    "memory_limit_mb",
)


def _check_reward(config: DictConfig) -> None:
    """Our reward function knows its options, and programs can be run where the data ask for it."""
    from gcpo.rewards import code
    from gcpo.rewards.sandbox import SandboxError, check

    if _get(config, "reward.custom_reward_function.path") != _REWARD:
        return
    found = _get(config, "reward.custom_reward_function.reward_kwargs")
    options = dict(OmegaConf.to_container(found, resolve=True)) if found else {}
    unknown = sorted(set(options) - set(_REWARD_OPTIONS))
    if unknown:
        raise ConfigError(
            f"reward.custom_reward_function.reward_kwargs.{unknown[0]} is no option of {_REWARD}; "
            f"it has {', '.join(_REWARD_OPTIONS)}"
        )
    if any(
        code.is_code(source) for name in ("train_files", "val_files") for source in _data_sources(config.data[name])
    ):
        settings = {name: options[name] for name in ("sandbox", "sandbox_fusion_url") if name in options}
        try:
            logger.info("gcpo: programs are graded in the sandbox %s", check(**settings))
        except (SandboxError, ValueError) as error:
            raise ConfigError(f"reward.custom_reward_function.reward_kwargs: {error}") from error


def _data_sources(files: Any) -> set[str]:
    """The data sets that the rows of local parquet files are from."""
    import pyarrow.parquet as pq

    files = [files] if isinstance(files, str) else list(files or [])
    local = [path for path in (Path(str(file)).expanduser() for file in files) if path.suffix == ".parquet"]
    tables = (pq.read_table(path, columns=["data_source"]) for path in local if path.is_file())
    return {str(source) for table in tables for source in table["data_source"].unique().to_pylist()}


def _check_files(name: str, data: DictConfig) -> None:
    """Every file is there, is parquet, has verl's columns, and holds no empty prompt and no images."""
    import pyarrow.parquet as pq

    files = data.get(name)
    files = [files] if isinstance(files, str) else list(files or [])
    if not files:
        raise ConfigError(f"data.{name} names no file")
    required = [data.get("prompt_key") or "prompt", *_REQUIRED_COLUMNS[1:]]
    for file in files:
        path = Path(str(file)).expanduser()
        if "://" in str(file) or path.suffix != ".parquet":
            continue
        if not path.is_file():
            raise ConfigError(f"data.{name}: there is no file {file}")
        try:
            table = pq.ParquetFile(path)
            columns = table.schema_arrow.names
            missing = [column for column in required if column not in columns]
            if missing:
                raise ConfigError(
                    f"data.{name}: {file} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                    f"it has {', '.join(columns)}"
                )
            prompts = pq.read_table(path, columns=[required[0]])[required[0]].to_pylist()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"data.{name}: {file} is not a readable parquet file ({error})") from error
        if not prompts:
            raise ConfigError(f"data.{name}: {file} has no rows")
        if data.get("image_key", "images") in columns:
            raise ConfigError(f"data.{name}: {file} has images, which GCPO does not support")
        for row, prompt in enumerate(prompts):
            content = prompt[-1].get("content") if isinstance(prompt, list) and prompt else prompt
            if not isinstance(prompt, list) or not isinstance(content, str) or not content.strip():
                raise ConfigError(f"data.{name}: the prompt in row {row} of {file} is empty or not a list of messages")


def plugin_problem() -> str | None:
    """What is wrong with the installed plug-in, or ``None``. verl hides a plug-in that fails to load."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="verl.plugins")}
    if "gcpo" not in names:
        return "gcpo is not installed as a plug-in of verl (entry point group verl.plugins): pip install -e ."
    import verl  # noqa: F401  (loads the plug-ins)
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    if "gcpo" not in TRAINER_REGISTRY:
        return "verl could not load the plug-in gcpo; the cause is printed above"
    return None
