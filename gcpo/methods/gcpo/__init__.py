"""GCPO: collider draws, causal weights and the causal reference."""
