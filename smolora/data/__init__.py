"""From sources to batches: readers, cleaning, sources, prompts, preprocessing, token datasets, collation, ledger."""
