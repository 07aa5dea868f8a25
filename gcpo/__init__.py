"""Group Causal Policy Optimization (GCPO) as a plug-in for verl."""

__version__ = "0.2.0"
