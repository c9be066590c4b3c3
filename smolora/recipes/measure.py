"""A run on held-out rows, target by target: quick numbers, where `evaluate` asks for whole answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smolora.adapters.store import follow_adapter, open_model
from smolora.config import ExperimentConfig
from smolora.data.memory_rows import FROM_SOURCES, MemoryRows
from smolora.errors import DataError
from smolora.evaluation.held_out import measure_examples
from smolora.recipes.finetune import encode_data, read_rows

if TYPE_CHECKING:
    from datasets import Dataset


def measure(
    config: ExperimentConfig, model: Path, *, memory: MemoryRows = FROM_SOURCES, dataset: Dataset | None = None
) -> dict[str, float]:
    """Return the metrics of a tuned model: loss, and what its task has; see `measure_examples`.

    Args:
        config: The run's.
        model: The run, an adapter or a model folder.
        memory: What the run was given in place of files.
        dataset: Rows to measure on; left out, those that the run held out.

    Raises:
        ModelError: There is no such model.
        DataError: There are no such rows, or one doesn't fit the model.
    """
    bundle = open_model(model, device=config.model.device)
    if dataset is not None:
        as_given = config.data.replace(eval_source=None, validation_fraction=0.0, deduplicate=False)
        config = config.replace(data=as_given)
        names = bundle.prompt_format.label_names if bundle.prompt_format else ()
        memory = MemoryRows(dataset, preprocessor=memory.preprocessor, labels=bundle.labels, label_names=names)
    config = follow_adapter(config)
    rows = read_rows(config, memory=memory)
    data = encode_data(config, rows, bundle, memory.preprocessor)
    measured = data.held_out if dataset is None else data.train
    if measured is None:
        raise DataError("the run held out no rows to measure on. Give some: evaluate(rows).")
    return measure_examples(bundle, measured, batch_size=config.evaluation.batch_size)
