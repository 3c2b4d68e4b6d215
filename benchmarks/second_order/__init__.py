"""Step time, bytes, memory and time to loss of preconditioned training beside first-order optimizers."""
