"""The report: a page and its pictures, from the raw JSON of the benchmarks and nothing else."""
