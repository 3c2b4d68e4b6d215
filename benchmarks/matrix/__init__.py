"""Every benchmark, one after the other, then the report."""
