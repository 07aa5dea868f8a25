"""ReST-MCTS* and rejection-sampling fine-tuning (RFT): the outer loop over `gcpo.selftraining`, vLLM and verl's SFT."""
