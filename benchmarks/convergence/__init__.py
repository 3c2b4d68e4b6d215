"""Loss by step: what a compressor costs in training progress."""
