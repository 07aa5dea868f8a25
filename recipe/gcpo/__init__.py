"""The GCPO recipe."""
