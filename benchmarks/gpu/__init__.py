"""Everything that a short time on one GPU can show, by one command."""
