"""Scoring answers: metrics, evaluators of models and of files of predictions, and results with intervals."""
