"""Models: routing strategies, checkpoints, and the swap of router and experts in transformers models."""
