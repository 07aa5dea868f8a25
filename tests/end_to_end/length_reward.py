"""A reward function that an untrained model sometimes earns: the response has an even number of characters."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """1 for an even length."""
    score = float(len(solution_str) % 2 == 0)
    return {"score": score, "acc": score}
