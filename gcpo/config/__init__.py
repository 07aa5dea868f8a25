"""The yaml files of every run, in the wheel: hydra reads them as ``pkg://gcpo.config``."""
