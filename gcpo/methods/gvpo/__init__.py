"""GVPO: a squared loss of the centred log-ratios of a group (docs/baselines.md)."""
