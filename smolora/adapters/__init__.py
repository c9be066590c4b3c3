"""Adapters: where they go, how they get there, how they are kept, switched off and merged. The only door to peft."""
