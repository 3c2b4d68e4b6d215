"""Chaos: processes that are killed, stopped or paused and links that are cut, while a job trains; then it resumes.

``python -m tests.chaos --runs 200 --seed 1 --out out/chaos.json`` runs scenarios drawn from a seed (scenario.py), each
in new processes (job.py), and reports how often every other rank named the culprit, hung or crashed, and whether the
resumed job ended with the bits of an undisturbed one.
"""
