"""Every compression kernel by itself, beside plain torch."""
