"""``gcpo cost``: the tokens of a training step, counted by running the method on texts with random lengths."""
