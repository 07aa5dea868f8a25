"""Train: ``python -m recipe.gcpo.main_gcpo [--config-name gc2po_trainer] [device=cpu] [key=value ...]``.

verl's own entry point with our yaml and our checks, which run before Ray starts.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from gcpo.adapters.liveness import faults_in_a_sentence
from gcpo.checks import check_gc2po_run, check_run, plugin_problem
from gcpo.config import ConfigError


@hydra.main(config_path="config", config_name="gcpo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Check the configuration, then run verl's trainer."""
    problem = plugin_problem()
    if problem:
        sys.exit(f"gcpo: {problem}")
    auto_set_device(config)
    try:
        check = check_gc2po_run if config.algorithm.adv_estimator == "gc2po" else check_run
        check(config)
    except ConfigError as error:
        sys.exit(f"gcpo: {error}")
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    with faults_in_a_sentence(config):
        run_ppo(config, task_runner_class=TaskRunnerV1)


if __name__ == "__main__":
    main()
