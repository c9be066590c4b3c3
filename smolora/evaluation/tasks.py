"""From a model and rows to a result: the walk of an evaluation."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from smolora.adapters.state import fingerprint_adapter
from smolora.adapters.store import open_model
from smolora.errors import ConfigError
from smolora.evaluation.evaluator import ModelEvaluator
from smolora.evaluation.head_source import fit_to_head, refuse_drawing
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.prediction_log import PredictionLog
from smolora.evaluation.result import EvaluationResult
from smolora.evaluation.row_source import RowSource, open_benchmark
from smolora.evaluation.scoring import Progress
from smolora.evaluation.trained_rows import count_trained_rows
from smolora.generation.sampling import SamplingSettings
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import HEAD_TASKS
from smolora.records.run_dir import RunDir
from smolora.tokenizers.pretrained import fingerprint_tokenizer

logger = logging.getLogger(__name__)


def evaluate_benchmark(
    benchmark: str,
    model_path: str | Path,
    base_model_id: str | None = None,
    num_samples: int | None = None,
    batch_size: int = 16,
    *,
    data_dir: str | Path | None = None,
    split: str = "test",
    settings: SamplingSettings | None = None,
    by_likelihood: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
) -> EvaluationResult:
    """Evaluate a model on a benchmark.

    Args:
        benchmark: Its name, such as e2e_nlg.
        model_path: A run, a model or adapter folder, or a hub id.
        base_model_id: The base of an adapter, where its folder doesn't name it.
        num_samples: Rows to take from the start; all where left out.
        batch_size: Rows that are answered at a time.
        data_dir: Folder with the benchmark's files. Left out, they are downloaded, where that is possible.
        split: train, validation or test.
        settings: How answers are drawn. What isn't set is greedy, and as long as the benchmark's answers.
        by_likelihood: Answer with the likeliest label, in place of written text.
        out: Folder to keep predictions in. Left out, that of a run; other models' aren't kept.
        device: auto, cpu, cuda or mps.

    Raises:
        ConfigError: There is no such benchmark or split.
        DataError: Its files aren't there, or a prompt leaves no room in the model's context.
        ModelError: There is no such model.
    """
    source = open_benchmark(benchmark, data_dir, split=split, num_samples=num_samples)
    source.count()
    return evaluate_model(
        open_model(model_path, base_model_id, device=device),
        source,
        batch_size=batch_size,
        settings=settings,
        by_likelihood=by_likelihood,
        folder=choose_folder(model_path, source, out),
        num_trained_on=count_trained_rows(model_path, source.iter_rows()),
    )


evaluate_e2e = partial(evaluate_benchmark, "e2e_nlg")
"""`evaluate_benchmark` of E2E NLG."""

evaluate_samsum = partial(evaluate_benchmark, "samsum")
"""`evaluate_benchmark` of SAMSum."""

evaluate_wikisql = partial(evaluate_benchmark, "wikisql")
"""`evaluate_benchmark` of WikiSQL."""

evaluate_multi_nli = partial(evaluate_benchmark, "multi_nli")
"""`evaluate_benchmark` of MultiNLI."""


def evaluate_model(
    bundle: ModelBundle,
    source: RowSource,
    *,
    batch_size: int = 16,
    settings: SamplingSettings | None = None,
    by_likelihood: bool = False,
    folder: Path | None = None,
    num_trained_on: int | None = None,
    progress: Progress = lambda num_rows: None,
) -> EvaluationResult:
    """Ask a model the rows of a source; see `evaluate_benchmark`. Answers are kept in `folder`, where it is given.

    A warning says where it learned from `num_trained_on` of them.

    Raises:
        ConfigError: The rows have no labels to choose the likeliest of, or don't fit the head of the model's task.
        DataError: Rows have labels that the head doesn't know.
    """
    if bundle.task in HEAD_TASKS:
        refuse_drawing(bundle, settings, by_likelihood=by_likelihood)
        source = fit_to_head(source, bundle)
    labels = source.resources.labels if by_likelihood else ()
    if by_likelihood and not labels:
        raise ConfigError(f"{source.name} has no labels to choose the likeliest of: leave out --by-likelihood.")
    chosen = fill_settings(settings, source)
    evaluator = ModelEvaluator(bundle, settings=chosen, batch_size=batch_size, labels=labels)
    log = None
    is_repeatable = bool(labels) or not chosen.is_drawn or chosen.seed is not None
    if folder:
        asked = {"settings": chosen.model_dump(mode="json"), "labels": labels}
        log = PredictionLog(folder, {**source.identify(), **_identify_model(bundle), **asked}, is_resumed=is_repeatable)
    metrics = source.metrics if bundle.task in HEAD_TASKS else tuple(dict.fromkeys((*source.metrics, "loss")))
    calculator = MetricsCalculator(metrics, resources=source.resources)
    if num_trained_on:
        logger.warning(
            "%s of %s rows are among those that the model was given to learn from: a score on them shows what it "
            "remembers, not what it has learned.",
            f"{num_trained_on:,}",
            f"{source.count():,}",
        )
    try:
        return evaluator.evaluate_dataset(
            source.iter_rows(), calculator, log=log, progress=progress, num_trained_on=num_trained_on
        )
    except KeyboardInterrupt:
        if log and is_repeatable:
            logger.info("the answers so far are kept in %s: the same command goes on from there.", folder)
        raise


def choose_folder(model_path: str | Path, source: RowSource, out: str | Path | None) -> Path | None:
    """Return where predictions go: `out`, else a folder of the run; None where there is neither."""
    if out is not None:
        return Path(out)
    return RunDir(model_path).evaluations / source.name if RunDir.is_run(model_path) else None


def fill_settings(settings: SamplingSettings | None, source: RowSource) -> SamplingSettings:
    """Return `settings` with what wasn't set: greedy, and as long as the answers of the source are.

    Raises:
        ConfigError: As `SamplingSettings.check_drawing`.
    """
    given: dict[str, object] = {}
    if settings:
        settings.check_drawing()
        given = settings.model_dump(exclude_unset=True)
    usual = {"temperature": 0.0, "max_new_tokens": source.max_new_tokens, "stop": source.stop}
    return SamplingSettings(**{**usual, **given})


def _identify_model(bundle: ModelBundle) -> dict[str, object]:
    """Return all of a model that its answers depend on."""
    form = bundle.prompt_format
    return {
        "base": bundle.fingerprint,
        "adapter": fingerprint_adapter(bundle),
        "form": form.model_dump(mode="json", exclude={"label_names"}) if form else None,
        "tokenizer": fingerprint_tokenizer(bundle.tokenizer),
        "generation": bundle.generation_settings,
        "quantization": bundle.quantization,
        "dtype": str(bundle.dtype),
    }
