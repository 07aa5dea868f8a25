"""``gcpo cost``: the tokens of a training step, counted by running the method itself on texts of drawn lengths."""
