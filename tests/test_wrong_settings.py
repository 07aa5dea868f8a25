"""Wrong settings: each is refused before anything starts, in one sentence that names the key.

The advice in the sentences is followed here, for our yaml and for verl's entry point.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig

from gcpo.checks import check_run
from gcpo.settings import ConfigError
from tests.run_inputs import config_of

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
FUNCTION = "reward.custom_reward_function"
KWARGS = f"+{FUNCTION}.reward_kwargs"

WRONG_VALUES = [
    # (override, a part of the sentence)
    (f"{ACTOR}.optim.lr=-1e-6", f"{ACTOR}.optim.lr is -1e-06; it must be a number of at least 0"),
    (f"{ACTOR}.optim.lr=fast", f"{ACTOR}.optim.lr is 'fast'"),
    (f"{ACTOR}.optim.lr=inf", f"{ACTOR}.optim.lr is inf"),
    (f"{ACTOR}.optim.lr=null", f"{ACTOR}.optim.lr is None"),
    (f"{ACTOR}.optim.weight_decay=-0.1", "weight_decay is -0.1"),
    (f"{ACTOR}.optim.clip_grad=0", "clip_grad is 0"),
    (f"{ACTOR}.optim.lr_scheduler_type=linear", "choose one of constant, cosine"),
    (f"{ACTOR}.optim.lr_warmup_steps_ratio=2", "lr_warmup_steps_ratio is 2"),
    ("trainer.total_training_steps=0", "trainer.total_training_steps is 0"),
    ("trainer.total_training_steps=-3", "trainer.total_training_steps is -3"),
    ("trainer.total_training_steps=many", "trainer.total_training_steps is 'many'"),
    ("trainer.total_training_steps=1.5", "a whole number"),
    ("trainer.total_epochs=0", "trainer.total_epochs is 0"),
    ("trainer.total_epochs=True", "trainer.total_epochs is True"),
    ("trainer.save_freq=0", "trainer.save_freq is 0; it must be a whole number of at least 1, or -1 (-1: never)"),
    ("trainer.save_freq=often", "trainer.save_freq is 'often'"),
    ("trainer.test_freq=0", "trainer.test_freq is 0"),
    ("trainer.max_actor_ckpt_to_keep=0", "max_actor_ckpt_to_keep is 0"),
    ("trainer.n_gpus_per_node=0", "trainer.n_gpus_per_node is 0"),
    ("trainer.nnodes=none", "trainer.nnodes is 'none'"),
    ("trainer.device=tpu", "trainer.device is 'tpu'"),
    ("trainer.logger=[console,wandbb]", "trainer.logger names 'wandbb'"),
    ("trainer.val_before_train=maybe", "trainer.val_before_train is 'maybe'"),
    ("trainer.resume_mode=always", "trainer.resume_mode is 'always'"),
    ("data.train_batch_size=large", "data.train_batch_size is 'large'"),
    ("data.train_batch_size=0", "data.train_batch_size is 0"),
    ("data.train_batch_size=16.5", "data.train_batch_size is 16.5"),
    ("data.max_prompt_length=0", "data.max_prompt_length is 0"),
    ("data.max_response_length=-1", "data.max_response_length is -1"),
    ("data.seed=-1", "data.seed is -1"),
    ("data.train_max_samples=0", "data.train_max_samples is 0"),
    ("data.dataloader_num_workers=-1", "data.dataloader_num_workers is -1"),
    (f"{ROLLOUT}.n=two", f"{ROLLOUT}.n is 'two'"),
    (f"{ROLLOUT}.n=0", f"{ROLLOUT}.n is 0"),
    (f"{ROLLOUT}.n=1", f"{ROLLOUT}.n is 1"),
    (f"{ROLLOUT}.temperature=0", f"{ROLLOUT}.temperature is 0; it must be a number greater than 0"),
    (f"{ROLLOUT}.temperature=-1", f"{ROLLOUT}.temperature is -1"),
    (f"{ROLLOUT}.temperature=warm", f"{ROLLOUT}.temperature is 'warm'"),
    (f"{ROLLOUT}.top_p=0", f"{ROLLOUT}.top_p is 0"),
    (f"{ROLLOUT}.top_p=1.5", f"{ROLLOUT}.top_p is 1.5"),
    (f"{ROLLOUT}.top_k=-5", f"{ROLLOUT}.top_k is -5"),
    (f"{ROLLOUT}.val_kwargs.temperature=-0.5", f"{ROLLOUT}.val_kwargs.temperature is -0.5"),
    (f"{ROLLOUT}.val_kwargs.top_p=0", f"{ROLLOUT}.val_kwargs.top_p is 0"),
    (f"{ROLLOUT}.val_kwargs.top_k=-2", f"{ROLLOUT}.val_kwargs.top_k is -2"),
    (f"{ROLLOUT}.val_kwargs.n=0", f"{ROLLOUT}.val_kwargs.n is 0"),
    (f"{ROLLOUT}.seed=-7", f"{ROLLOUT}.seed is -7"),
    (f"{ROLLOUT}.gpu_memory_utilization=1.5", "gpu_memory_utilization is 1.5"),
    (f"{ROLLOUT}.dtype=int8", f"{ROLLOUT}.dtype is 'int8'"),
    (f"{ROLLOUT}.agent.num_workers=0", "agent.num_workers is 0"),
    (f"{ROLLOUT}.pipeline_model_parallel_size=2", "pipeline_model_parallel_size is 2"),
    (f"{ACTOR}.ppo_mini_batch_size=half", f"{ACTOR}.ppo_mini_batch_size is 'half'"),
    (f"{ACTOR}.ppo_epochs=0", f"{ACTOR}.ppo_epochs is 0"),
    (f"{ACTOR}.clip_ratio_c=1", f"{ACTOR}.clip_ratio_c is 1"),
    (f"{ACTOR}.kl_loss_coef=-0.1", f"{ACTOR}.kl_loss_coef is -0.1"),
    (f"{ACTOR}.kl_loss_type=k9", f"{ACTOR}.kl_loss_type is 'k9'"),
    (f"{ACTOR}.loss_agg_mode=mean", f"{ACTOR}.loss_agg_mode is 'mean'"),
    (f"{ACTOR}.policy_loss.loss_mode=ppo", f"{ACTOR}.policy_loss.loss_mode is 'ppo'"),
    (f"{ACTOR}.data_loader_seed=-1", f"{ACTOR}.data_loader_seed is -1"),
    (f"{ACTOR}.checkpoint.save_contents=[weights]", "checkpoint.save_contents names 'weights'"),
    ("gcpo.seed=-1", "gcpo.seed is -1"),
    ("gcpo.kappa=-1", "gcpo.kappa is -1; it must be at least 0"),
    ("gcpo.alpha=large", "gcpo.alpha is 'large'"),
    ("reward.num_workers=0", "reward.num_workers is 0"),
    ("reward.reward_manager.name=best", "reward.reward_manager.name names 'best'"),
]

WRONG_TOGETHER = [
    ("trainer.v1.trainer_mode=colocate_async", "asynchronous"),
    ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator is 'grpo'"),
    (f"{ACTOR}.strategy=fsdp", "other engines"),
    (f"{ROLLOUT}.name=sglang", "other rollout engines"),
    (f"{ROLLOUT}.multi_turn.enable=True", "multi-turn"),
    (f"{ROLLOUT}.full_determinism=True", "same seed"),
    (f"{ROLLOUT}.disaggregation.enabled=True", "one server"),
    (f"{ROLLOUT}.agent.default_agent_loop=tool_agent", "tool use"),
    (f"{ACTOR}.use_prefix_grouper=True", "prefix_grouper"),
    (f"{ACTOR}.checkpoint.async_save=True", "no run can resume"),
    ("algorithm.filter_groups.enable=True", "group filtering"),
    (
        f"algorithm.rollout_correction.bypass_mode=True {ROLLOUT}.calculate_log_probs=False",
        f"set {ROLLOUT}.calculate_log_probs=True",
    ),
    (
        "algorithm.rollout_correction.bypass_mode=True algorithm.rollout_correction.rollout_is=token",
        "verl corrects nothing",
    ),
    ("critic.enable=True", "trained for nothing"),
    ("trainer.critic_warmup=5", "there is no critic"),
    ("reward.reward_model.enable=True", "reward function"),
    (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2", "fsdp_config.ulysses_sequence_parallel_size is 2"),
    (f"{ACTOR}.ulysses_sequence_parallel_size=2", f"{ACTOR}.ulysses_sequence_parallel_size is 2"),
    (f"{MODEL}.use_fused_kernels=True", "hidden states"),
    (f"{MODEL}.lora_rank=4", "without merging"),
    (f"{MODEL}.lora.rank=4", f"the FSDP engine reads {MODEL}.lora_rank"),
    (f"{MODEL}.lora_adapter_path=/tmp/adapter", "the adapter is not loaded"),
    (f"{MODEL}.mtp.enable=True", "several tokens"),
    (f"{ROLLOUT}.agent.agent_loop_manager_class=null", "agent_loop_manager_class"),
    (f"{ROLLOUT}.enable_chunked_prefill=True", "cannot chunk"),
    (f"{ROLLOUT}.ignore_eos=True", "cut at its limit"),
    (f"+{ROLLOUT}.repetition_penalty=1.1", "another distribution"),
    ("algorithm.use_kl_in_reward=True", "groups whose rewards are equal"),
    ("algorithm.rollout_correction.rollout_rs=token_k1", "a rejected token"),
    (
        "algorithm.rollout_correction.rollout_is=token algorithm.rollout_correction.rollout_is_threshold=0.5_5.0",
        "with two bounds",
    ),
    (f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", "depends on the packing"),
    (f"{ACTOR}.policy_loss.loss_mode=dro", "without a beta"),
    (f"{ACTOR}.clip_ratio=0.3", "are read instead"),
    (f"{ACTOR}.grad_clip=0.5", "verl's V1 trainer does not read it"),
    (f"{ACTOR}.use_dynamic_bsz=False", "use_dynamic_bsz is False"),
    (f"{ROLLOUT}.log_prob_use_dynamic_bsz=False", "log_prob_use_dynamic_bsz must be as"),
    (f"{ROLLOUT}.do_sample=False", "goes on as with True"),
    ("data.reward_fn_key=source", "goes on as with data_source"),
    ("algorithm.use_pf_ppo=True", "with the estimator gae only"),
    ("skip.rollout.enable=True", "does not read it"),
    ("algorithm.rollout_correction.rollout_is=word", "choose one of token, sequence"),
    (
        f"algorithm.rollout_correction.rollout_is=token {ROLLOUT}.calculate_log_probs=False",
        "verl corrects nothing",
    ),
    ("reward.sandbox_fusion.url=http://localhost:8080", "not by pkg://gcpo.rewards"),
    ("trainer.logger=[console,clearml]", "the package clearml is not installed"),
    (f"{ACTOR}.optim.optimizer=Adamw", "which torch.optim does not have"),
    (f"{ACTOR}.optim.optimizer_impl=no_such_package", "cannot be imported"),
    (f"{ROLLOUT}.response_length=100", "both name the same length"),
    ("custom_reward_function.path=mine.py", "set reward.custom_reward_function.path instead"),
    ("reward_model.enable=True", "set reward.reward_model.enable instead"),
    ("sandbox_fusion.url=http://x", "set reward.sandbox_fusion.url instead"),
    ("data.filter_overlong_prompts=False", "would stop in the middle"),
    ("trainer.val_only=True trainer.val_before_train=False", "instead of validating"),
    ("gcpo.preset=paper gcpo.collider.num_draws=1", "zero by construction"),
    ("gcpo.collider.max_tokens=1", "a draw of one token"),
    ("data.max_response_length=1", "a draw of one token"),
    (f"{ACTOR}.ppo_mini_batch_size=32", "cannot be larger than the batch"),
    (f"{ACTOR}.ppo_mini_batch_size=5", "does not divide data.train_batch_size (16)"),
    ("data.gen_batch_size=5", "data.gen_batch_size is 5"),
    (f"trainer.n_gpus_per_node=3 {ACTOR}.ppo_mini_batch_size=16 {ROLLOUT}.n=2", "do not divide over 3 devices"),
    ("trainer.n_gpus_per_node=8", "ray_kwargs.ray_init.num_cpus is 16"),
    ("ray_kwargs.ray_init.num_gpus=0", "Ray is told of 0 devices"),
    (f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.tensor_model_parallel_size is 2"),
    (f"{ROLLOUT}.data_parallel_size=2", f"takes 2 devices ({ROLLOUT}.data_parallel_size is 2)"),
    ("data.train_batch_size=128", "data.train_batch_size is 128, and data.train_files has 64 rows"),
    ("data.train_max_samples=8", "data.train_files has 8 rows"),
    ("data.max_prompt_length=2", "whose prompts have at most 2 tokens"),
    ("trainer.total_training_steps=1000 trainer.total_epochs=1", "trainer.total_epochs (1) gives 4"),
    ("data.max_prompt_length=2040", "the model's context 2048"),
    ("gcpo.blocks.max_tokens=300", "gcpo.blocks.max_tokens (now 300"),
    ("gcpo.scoring.max_token_len_per_gpu=200", "a micro-batch holds 200"),
    (f"gcpo.kappa=0 gcpo.weighting=off {ACTOR}.ppo_max_token_len_per_gpu=100", "can take 112 tokens"),
    ("trainer.resume_mode=resume_path", "trainer.resume_from_path is None"),
    ("trainer.resume_mode=resume_path trainer.resume_from_path=/no/global_step_3", "there is no folder"),
    ("trainer.resume_mode=resume_path trainer.resume_from_path=/tmp", "global_step_N"),
    ("trainer.resume_from_path=/tmp/global_step_3", "it is not read"),
    ("data.train_files=/no/such/file.parquet", "data.train_files: there is no file"),
    ("data.val_files=[]", "data.val_files names no file"),
    (f"{MODEL}.path=/no/such/model", "no folder"),
    (f"{MODEL}.path=no-such/model", "no-such/model is no folder here and cannot be read from the hub"),
    (f"{FUNCTION}.path=/no/such/reward.py", f"{FUNCTION}.path: there is no file"),
    (f"{FUNCTION}.path=pkg://no_such_module", "there is no module no_such_module"),
    (f"{FUNCTION}.path=pkg://no_such.module", "the module no_such.module cannot be imported"),
    (f"{FUNCTION}.name=compute_scores", "defines no compute_scores"),
    (f"{KWARGS}.fromat_weight=0.1", "reward_kwargs.fromat_weight is no option of pkg://gcpo.rewards"),
    (f"{KWARGS}.format_weight=2", "reward_kwargs.format_weight is 2"),
    (f"{KWARGS}.format_weight=half", "reward_kwargs.format_weight is 'half'"),
    (f"{KWARGS}.require_boxed=1", "reward_kwargs.require_boxed is 1"),
    (f"{KWARGS}.time_limit=0", "reward_kwargs.time_limit is 0"),
    (f"{KWARGS}.memory_limit_mb=-1", "reward_kwargs.memory_limit_mb is -1"),
    (f"{KWARGS}.sandbox_fusion_url=localhost", "reward_kwargs.sandbox_fusion_url is 'localhost'"),
]  # fmt: skip

WRONG = WRONG_VALUES + WRONG_TOGETHER

GC2PO_WRONG = [
    ("gc2po.perturbation.draws=0", "gc2po.perturbation.draws is 0; it must be at least 1"),
    ("gc2po.perturbation.sigma=-1", "gc2po.perturbation.sigma is -1; it must"),
    ("gc2po.layer=9", "the model has hidden states 0 to 3"),
    ("gc2po.intervention=hidden_state gc2po.layer=3", "nothing comes after it"),
    ("+gc2po.draws=3", "gc2po.draws is not a setting"),
    ("gcpo.kappa=0.1", "belong to GCPO"),
    ("gcpo.weighting.target=projection", "belong to GCPO"),
    ("algorithm.norm_adv_by_std_in_grpo=False", "standard deviation"),
    ("algorithm.use_kl_in_reward=True", "use_kl_in_reward is True"),
    ("algorithm.rollout_correction.rollout_rs=token_k1", "a rejected token"),
    ("trainer.v1.trainer_mode=gcpo", "trainer.v1.trainer_mode=gc2po"),
    (f"{MODEL}.use_fused_kernels=True", "states are perturbed"),
    (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2", "sequence parallelism"),
    (f"{ACTOR}.ulysses_sequence_parallel_size=2", "sequence parallelism"),
    ("gc2po.max_token_len_per_gpu=120", "a forward pass holds 120"),
    (f"{ROLLOUT}.n=1", "rollout.n is 1"),
    (f"{ROLLOUT}.n=many", "rollout.n is 'many'"),
    ("data.train_batch_size=128", "data.train_files has 64 rows"),
    (f"{ACTOR}.optim.lr=-1", "optim.lr is -1"),
]


def refusal(check: Callable[[DictConfig], object], config: DictConfig) -> str:
    """What the check says; empty where it accepts."""
    try:
        check(config)
    except ConfigError as error:
        return str(error)
    return ""


def test_there_are_as_many_as_were_tried() -> None:
    """The issue's audit tried 48."""
    assert len(WRONG) >= 48


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[o for o, _ in WRONG])
def test_refused_in_one_sentence(run_inputs: Path, overrides: str, says: str) -> None:
    """The sentence names the key, and is one line."""
    said = refusal(check_run, config_of(run_inputs, *overrides.split()))
    assert says in said and "\n" not in said


@pytest.mark.parametrize(("overrides", "says"), GC2PO_WRONG, ids=[o for o, _ in GC2PO_WRONG])
def test_gc2po_refuses_in_one_sentence(run_inputs: Path, overrides: str, says: str) -> None:
    """The same for GC2PO; the model of these tests has three layers."""
    said = refusal(check_run, config_of(run_inputs, *overrides.split(), method="gc2po"))
    assert says in said and "\n" not in said


# ---- the advice ------------------------------------------------------------------------------------------------------

ADVICE = re.compile(r"(?<![\w.'/])\+{0,2}[a-z_]\w*(?:\.\w+)*=[^\s,;:()]+")


def advice_of(sentence: str) -> list[list[str]]:
    """The assignments that a sentence advises; those joined by "or" are alternatives."""
    found = [ADVICE.findall(part) for part in re.split(r",? or ", sentence)]
    return [assignments for assignments in found if assignments]


def test_advice_is_found() -> None:
    assert advice_of("x is 3: set a.b=1 c.d=e, or ++f.g=null or more") == [["a.b=1", "c.d=e"], ["++f.g=null"]]
    assert advice_of("gcpo.kappa + data.x is 3, lower gcpo.kappa") == []


def for_entry(override: str, entry: str) -> str:
    """An override of our yaml, for verl's entry point: groups that verl does not have are added."""
    plain = override.lstrip("+")
    return f"++{plain}" if entry == "verl" and plain.startswith(("gcpo.", "ray_kwargs.ray_init.num_gpus")) else override


@pytest.mark.parametrize("entry", ["gcpo_quickstart", "verl"])
@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[o for o, _ in WRONG])
def test_advice_can_be_followed(run_inputs: Path, entry: str, overrides: str, says: str) -> None:
    """Every assignment that a sentence advises is one that hydra takes, and the same sentence does not come again."""
    wrong = [for_entry(one, entry) for one in overrides.split()]
    said = refusal(check_run, config_of(run_inputs, *wrong, name=entry))
    assert said
    for assignments in advice_of(said):
        try:
            config = config_of(run_inputs, *wrong, *assignments, name=entry)
        except HydraException as error:
            raise AssertionError(f"hydra refuses the advice {assignments} of: {said}") from error
        assert refusal(check_run, config) != said


@pytest.mark.parametrize(("overrides", "says"), GC2PO_WRONG, ids=[o for o, _ in GC2PO_WRONG])
def test_gc2po_advice_can_be_followed(run_inputs: Path, overrides: str, says: str) -> None:
    """The same for GC2PO."""
    said = refusal(check_run, config_of(run_inputs, *overrides.split(), method="gc2po"))
    for assignments in advice_of(said):
        config = config_of(run_inputs, *overrides.split(), *assignments, method="gc2po")
        assert refusal(check_run, config) != said


def test_the_advice_for_lora_ends_the_refusals(run_inputs: Path) -> None:
    """It named a key with a plus sign, which hydra refuses, since verl's yaml has the key."""
    wrong = f"{MODEL}.lora_rank=8"
    (advice,) = advice_of(refusal(check_run, config_of(run_inputs, wrong)))
    for entry in ("gcpo_quickstart", "verl"):
        assert refusal(check_run, config_of(run_inputs, wrong, *advice, name=entry)) == ""
