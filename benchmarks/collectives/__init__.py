"""Ways of reducing a tensor over all ranks, side by side."""
