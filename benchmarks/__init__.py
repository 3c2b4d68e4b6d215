"""Measurements: collectives, compressors, training, and the emulated network they run on."""
