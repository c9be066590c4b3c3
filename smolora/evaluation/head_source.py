"""Rows as a task's head is asked them: the texts that it was trained on, and the right answer in its own labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from smolora.data.benchmark_rows import TEXTS, BenchmarkRow
from smolora.data.labels import match_label, refuse_unknown
from smolora.errors import ConfigError
from smolora.evaluation.head_asker import HeadAsker, read_texts
from smolora.evaluation.row_source import RowSource
from smolora.generation.sampling import SamplingSettings
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import describe_head

_METRICS = ("labels", "majority", "head_loss")


def refuse_drawing(bundle: ModelBundle, settings: SamplingSettings | None, *, by_likelihood: bool) -> None:
    """Raise where something is set that shapes written answers: a head writes none.

    Raises:
        ConfigError: So it is.
    """
    names = sorted(settings.model_fields_set if settings else ()) + ["by_likelihood"] * by_likelihood
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ConfigError(f"{flags} would change nothing: {describe_head(bundle.task, bundle.labels)}. Leave it out.")


def fit_to_head(source: RowSource, bundle: ModelBundle) -> RowSource:
    """Return rows that a classifier can be asked, with its metrics.

    The labels of rows are the head's but for case. A head that has numbers alone answers a benchmark by the numbers of
    its classes, and a model that wasn't tuned here takes the numbers of its outputs.

    Raises:
        ConfigError: The rows have no labels, or other texts than the model was trained on.
        DataError: Rows have labels that the head doesn't know; they are named with their counts.
    """
    refuse_other_tasks(bundle)
    named = source.resources.labels
    aliases = _name_numbers(named, bundle)
    asked_as_prompt = _is_asked_as_prompt(bundle)

    def fit(row: BenchmarkRow) -> BenchmarkRow:
        label = match_label(row.references[0], bundle.labels, aliases) or row.references[0]
        texts = (str(row.prompt),) if asked_as_prompt and named else read_texts(row)
        return BenchmarkRow(row.prompt, (label,), {TEXTS: texts})

    def iter_rows() -> Iterator[BenchmarkRow]:
        return map(fit, source.iter_rows())

    first = next(source.iter_rows(), None)
    if not named and first is not None and TEXTS not in first.facts:
        raise ConfigError(
            f"{source.name} has no labels, and {describe_head(bundle.task, bundle.labels)}. Name rows that have some "
            "with --data."
        )
    if first is not None:
        refuse_other_texts(bundle, found=len(read_texts(fit(first))), where=source.name)
    refuse_unknown(source.name, (set(row.references) for row in iter_rows()), bundle.labels)
    resources = replace(source.resources, labels=bundle.labels)
    return replace(source, iter_rows=iter_rows, metrics=_METRICS, resources=resources)


def refuse_other_tasks(bundle: ModelBundle) -> None:
    """Raise where a model has the head of a task that isn't asked here yet.

    Raises:
        ConfigError: So it has.
    """
    if bundle.task != "classification":
        raise ConfigError(
            f"{describe_head(bundle.task, bundle.labels)}: of tasks with a head of their own, only text classifiers "
            "are asked here. Its run's verdict and PEFTTrainer.evaluate measure it on encoded rows."
        )


def _name_numbers(named: Sequence[str], bundle: ModelBundle) -> dict[str, str]:
    """Return which label of the head another name stands for.

    Labels that were learned here are in an order of ours, so the numbers of a person's rows don't say which is meant.
    """
    if named:
        names = {alias: name for i, name in enumerate(named) for alias in (f"{i}", f"LABEL_{i}")}
        return {names[label]: label for label in bundle.labels if label in names}
    if bundle.prompt_format is None:
        return {str(number): label for number, label in enumerate(bundle.labels)}
    return {}


def _is_asked_as_prompt(bundle: ModelBundle) -> bool:
    """Whether the model was trained on a benchmark's prompts, as `--dataset` gives them."""
    fmt = bundle.prompt_format
    return fmt is not None and fmt.columns.get("text") == "prompt"


def classify_texts(
    bundle: ModelBundle,
    texts: Sequence[object],
    labels: Sequence[str],
    pairs: Sequence[str] | None,
    *,
    batch_size: int,
) -> npt.NDArray[np.float64]:
    """Return log p of every label of a classifier for texts, or pairs of them, [N, C].

    Raises:
        ConfigError: The model is no text classifier, has other labels, or was trained on another number of texts; or
            there are not as many second texts.
    """
    refuse_other_tasks(bundle)
    if labels and set(labels) != set(bundle.labels):
        raise ConfigError(f"this classifier's labels are {', '.join(bundle.labels)}: leave labels out.")
    if pairs is not None and len(pairs) != len(texts):
        raise ConfigError(f"{len(texts)} texts and {len(pairs)} second texts: give as many.")
    refuse_other_texts(bundle, found=1 if pairs is None else 2, where="what is asked")
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError("a classifier reads texts, not conversations.")
    first = [str(text) for text in texts]
    rows = [(text,) for text in first] if pairs is None else list(zip(first, pairs, strict=True))
    return HeadAsker(bundle, batch_size=batch_size).measure(rows)


def refuse_other_texts(bundle: ModelBundle, *, found: int, where: str) -> None:
    """Raise where a classifier was trained on another number of texts a row.

    Raises:
        ConfigError: So it was.
    """
    trained = bundle.prompt_format
    if trained is None or trained.kind != "classification":
        return
    wanted = 2 if "text_pair" in trained.columns else 1
    if found != wanted:
        raise ConfigError(
            f"the model was trained on {wanted} text{'s' * (wanted > 1)} a row, and {where} has {found}: its answers "
            f"would be to something else. Give {'both' if wanted > 1 else 'one'} (--text-field, --text-pair-field; "
            "text_pairs in Python)."
        )
