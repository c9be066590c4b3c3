"""The one training loop, for pretraining and for tuning, and what listens to it."""
