"""The yaml files of every run, in the wheel, and the resolver that they use: hydra reads ``pkg://gcpo.config``."""

from omegaconf import OmegaConf


def part(whole: int, count: int) -> int:
    """Return the size of one of ``count`` parts, at least 1: ``${gcpo.part:16,4}`` is 4."""
    return max(1, whole // count)


OmegaConf.register_new_resolver("gcpo.part", part, replace=True)
