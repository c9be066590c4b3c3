"""What a run shows: plots, a summary in plain words, a report. Reads records; nothing here imports torch."""
