"""Units that sizes are given in."""

MIB = float(1 << 20)  # bytes
GIB = float(1 << 30)
