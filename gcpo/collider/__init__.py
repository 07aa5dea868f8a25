"""Collider draws of a group, and prompts that contain its candidates."""

from gcpo.collider.plan import Block, LeaveOneOutPlan, collider_first, leave_one_out_plan

__all__ = ["Block", "LeaveOneOutPlan", "collider_first", "leave_one_out_plan"]
