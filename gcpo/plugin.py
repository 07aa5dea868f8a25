"""Entry point in group ``verl.plugins`` that registers GCPO with verl in every process that imports it.

verl imports the module of an entry point and calls nothing, so the import of this module registers everything.
"""

from __future__ import annotations

import os
import sys
import traceback


def register() -> None:
    """Register the advantage estimator, policy loss, trainer mode and engine, and on a CPU the platform.

    verl logs an error of a plug-in at DEBUG level only and later reports "Unknown trainer 'gcpo'". This function prints
    error with its cause to stderr before verl handles it.
    """
    try:
        import gcpo.config  # noqa: F401  (registers the resolver of the yaml)
        from gcpo.cpu import is_cpu_profile

        if is_cpu_profile():
            from gcpo.adapters import cpu
            from gcpo.cpu import patches

            cpu.activate()
            patches.apply_in_verl()
        from gcpo.weight_socket import cluster_token

        cluster_token()  # in a Ray process this leaves the token to the vLLM processes that it starts
        from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss

        from gcpo.adapters import engine, fusion, registry  # noqa: F401  (the first two register themselves)
        from gcpo.adapters.trainer import MethodTrainer
        from gcpo.methods import for_each_method

        for_each_method(lambda name: registry.register(name, MethodTrainer))
        # The surrogate of Eq. 10 is verl's own; the engine adds the kappa term.
        register_policy_loss("gcpo")(get_policy_loss_fn("vanilla"))

        if is_cpu_profile():
            cpu.pageable_reference()
    except BaseException:
        print(
            "gcpo: the plug-in for verl could not be loaded, so the trainer 'gcpo' will be unknown to verl. "
            f"Cause (process {os.getpid()}):\n{traceback.format_exc()}",
            file=sys.stderr,
            flush=True,
        )
        raise


register()
