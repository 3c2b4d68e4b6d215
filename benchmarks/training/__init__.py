"""Step time of training strategies on networks of chosen rates."""
