"""ReST-MCTS* without verl, vLLM and files: tree search, labels, training data and the value model.

Self-training has no advantages and no policy-gradient loss, so it is no method of `gcpo.methods`. `recipe.rest_mcts`
drives it with vLLM and with verl's SFT trainer. See "ReST-MCTS*: LLM Self-Training via Process Reward Guided Tree
Search" (arXiv 2406.03816).
"""
