"""Asking a model: one generator for the class, the command line, evaluation and chat."""
