"""A tuned model on encoded rows: how likely it holds their targets to be, and how often its first choice is right."""

from __future__ import annotations

import numpy as np
import torch

from smolora.data.collate import get_data_collator
from smolora.data.token_dataset import ExampleDataset
from smolora.errors import DataError
from smolora.evaluation.answers import LossMetric
from smolora.evaluation.compute_metrics import measure_labels
from smolora.generation.decoding import in_eval_mode
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import LABEL_TASKS
from smolora.training.loss import sum_cross_entropy, target_logits_of


def measure_examples(bundle: ModelBundle, examples: ExampleDataset, *, batch_size: int = 16) -> dict[str, float]:
    """Return the metrics of the model's task on encoded rows.

    All tasks have loss (nats a target). Labels have accuracy and f1 (macro); a language model perplexity and
    token_accuracy; spans (qa) token_accuracy, of where answers begin and end.

    Raises:
        DataError: There is no row.
    """
    if not len(examples):
        raise DataError("there is no row to measure on.")
    collate, logits_of = get_data_collator("padded", bundle.task), target_logits_of(bundle.model, bundle.task)
    losses, chosen, given = [], [], []
    with in_eval_mode(bundle.model):
        for start in range(0, len(examples), batch_size):
            rows = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
            batch = collate(rows).to(bundle.device)
            logits = logits_of(bundle.model, batch)
            losses.append(sum_cross_entropy(logits, batch.targets).item())
            chosen.append(logits[: len(batch.targets)].argmax(-1).cpu())
            given.append(batch.targets.cpu())
    found, right = torch.cat(chosen).numpy(), torch.cat(given).numpy()
    loss, perplexity = LossMetric().conclude(np.array([sum(losses), len(right)]))
    if bundle.task in LABEL_TASKS:
        return {"loss": loss, **measure_labels(found, right)}
    accuracy = {"token_accuracy": float((found == right).mean())}
    return {"loss": loss, **({} if bundle.task == "qa" else {"perplexity": perplexity}), **accuracy}
