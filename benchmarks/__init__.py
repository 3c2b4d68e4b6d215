"""What this library measures, and how: the emulated network, training, collectives, and the reports drawn from them."""
