"""Evaluation: samples of a model on question sets, graded as in training, and the paper's table of any number of runs.

``gcpo evaluate MODEL`` samples and grades, ``gcpo evaluate table RUN...`` compares;
``docs/evaluation.md`` states every number's formula.
"""


class EvaluationError(Exception):
    """What an evaluation can't work with; the message is one sentence for the user."""
