"""Predictions for an H200 that are arithmetic alone."""

PREDICTIONS = [("x", "y", "z")]
