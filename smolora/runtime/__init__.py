"""The machine a run computes on: device, dtype, memory, random numbers, terminal."""
