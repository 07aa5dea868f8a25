"""Passes verl's client of a SandboxFusion service to `gcpo.rewards.sandbox`."""

from verl.utils.reward_score.sandbox_fusion.utils import call_sandbox_api

from gcpo.rewards.sandbox import Fusion

Fusion.client = staticmethod(call_sandbox_api)
