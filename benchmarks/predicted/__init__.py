"""What the planner predicts beside what the benchmarks measured. Of the repository alone: it reads the raw results."""
