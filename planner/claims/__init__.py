"""What others claim of methods like these, predicted under stated baselines: python -m planner.claims"""
