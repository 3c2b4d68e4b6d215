"""Predicts training steps: which method a model on a cluster should take, and what it would bring.

Everything that comes from here is predicted, not measured, and is labelled so wherever it is shown.
"""
