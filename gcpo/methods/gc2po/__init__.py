"""GC2PO: episodes of a response, counterfactual perturbations of their states, and what becomes of both.

Pure Python and torch; what runs the model is in ``gcpo.adapters``.
"""
