"""Adapters: where they go (targets), how they get there (attach), and how they are kept, switched off and merged. The only door to peft."""
