"""L2T: every episode of a response is rewarded for the rise of the probability of the right answer."""
