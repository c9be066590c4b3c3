"""Rows as a task's head is asked them: the texts that it was trained on, and the right answer in its own labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from smolora.data.benchmark_rows import TEXTS, BenchmarkRow
from smolora.data.labels import match_label, refuse_unknown
from smolora.errors import ConfigError
from smolora.evaluation.head_asker import read_texts
from smolora.evaluation.row_source import RowSource
from smolora.generation.sampling import SamplingSettings
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import TASK_NAMES, describe_task

_METRICS = ("labels", "majority", "head_loss")


def refuse_drawing(bundle: ModelBundle, settings: SamplingSettings | None, *, by_likelihood: bool) -> None:
    """Raise where something is set that shapes written answers: a head writes none.

    Raises:
        ConfigError: So it is.
    """
    names = sorted(settings.model_fields_set if settings else ()) + ["by_likelihood"] * by_likelihood
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ConfigError(f"{flags} would change nothing: {describe_head(bundle)}. Leave it out.")


def describe_head(bundle: ModelBundle) -> str:
    """Return what a model with a task's head is, and what it does, as a sentence without its end."""
    return f"this model is a {TASK_NAMES[bundle.task]} ({describe_task(bundle.task, bundle.labels)}): it writes no text"


def fit_to_head(source: RowSource, bundle: ModelBundle) -> RowSource:
    """Return rows that a classifier can be asked, with its metrics.

    The labels of rows are the head's but for case. A head that has numbers alone answers a benchmark by the numbers of
    its classes, and a model that wasn't tuned here takes the numbers of its outputs.

    Raises:
        ConfigError: The rows have no labels, or other texts than the model was trained on.
        DataError: Rows have labels that the head doesn't know; they are named with their counts.
    """
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
        raise ConfigError(f"{source.name} has no labels, and {describe_head(bundle)}. Name labelled rows with --data.")
    if first is not None:
        _refuse_other_texts(source, fit(first), bundle)
    refuse_unknown(source.name, (set(row.references) for row in iter_rows()), bundle.labels)
    resources = replace(source.resources, labels=bundle.labels)
    return replace(source, iter_rows=iter_rows, metrics=_METRICS, resources=resources)


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


def _refuse_other_texts(source: RowSource, row: BenchmarkRow, bundle: ModelBundle) -> None:
    trained, found = bundle.prompt_format, len(read_texts(row))
    if trained is None or trained.kind != "classification":
        return
    wanted = 2 if "text_pair" in trained.columns else 1
    if found != wanted:
        raise ConfigError(
            f"the model was trained on {wanted} text{'s' * (wanted > 1)} a row, and {source.name} has {found}: its "
            "answers would be to something else. Name the columns with --text-field (and --text-pair-field)."
        )
