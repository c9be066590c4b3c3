"""The end of `smolora train`: base against tuned on the held-out rows, kept in verdict.json."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from smolora.adapters.movement import Movement, measure_movement
from smolora.adapters.state import AdapterWeights, replaced_weights
from smolora.adapters.toggling import disabled_adapter, replaced_by
from smolora.config import ExperimentConfig
from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.benchmark_source import find_benchmark
from smolora.data.benchmarks import Benchmark
from smolora.data.overlap import measure_overlap
from smolora.data.prompts import render_pair
from smolora.data.rows import Row
from smolora.errors import BrokenRunError, StorageError, count_of
from smolora.evaluation.comparison import Before, Budget
from smolora.evaluation.head_rows import HEAD_KINDS, iter_head_rows
from smolora.evaluation.metric import Resources
from smolora.evaluation.paired_answers import PairedAnswers, compare_answers, compare_heads
from smolora.evaluation.paired_loss import compare_losses
from smolora.evaluation.row_source import group_rows
from smolora.evaluation.span_asker import SpanAsker
from smolora.evaluation.verdict import Evidence, judge
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import HEAD_TASKS
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_folder, write_json
from smolora.records.verdict_file import describe_verdict, list_samples, read_verdict

if TYPE_CHECKING:
    from torch import nn

    from smolora.recipes.finetune import TuningData

logger = logging.getLogger(__name__)

_LEAST_SECONDS = 1.0
"""Below this a share of the run is no matter."""

_AIM = 0.9
"""Of the time there is, so much is planned with: a batch of losses or of a head's answers that was begun is ended, and
may take longer than the last."""

_MOST_ROWS, _MOST_TOKENS = 500, 200
_FIRST_WORDS = 16
_CONTINUATION_TOKENS = 48

_PAIRED_METRICS = ("labels", "squad", "bleu_lowercase", "rouge", "exact_match")
"""Metrics of benchmarks that are sums over rows and need nothing but answers, the one that says most first."""

_OWN_METRICS = ("rouge", "exact_match")
_SAYS_MOST = ("entity_f1", "accuracy", "f1", "bleu", "rougeL", "exact_match")


@contextmanager
def broken_verdict(run: RunDir) -> Iterator[None]:
    """Write the verdict of a run that breaks inside the block; one of an earlier attempt is taken back first."""
    if (read_verdict(run.verdict) or {}).get("verdict") == "broken":
        run.verdict.unlink()
    try:
        yield
    except BrokenRunError as error:
        try:
            write_json(run.verdict, {"verdict": "broken", "reason": str(error)})
        except StorageError as refused:
            logger.warning("%s", refused)
        raise


def leave_verdict(
    run: RunDir,
    bundle: ModelBundle,
    data: TuningData,
    config: ExperimentConfig,
    *,
    start: AdapterWeights | None = None,
    load_base: Callable[[], nn.Module] | None = None,
) -> None:
    """Measure base against tuned and write verdict.json, unless the one of these weights is there; say what it is.

    Of a continued adapter, `start` are the weights it began with: with them on, the model is the base that counts.
    Where all of the model was trained, `load_base` opens what it was.

    Nothing is measured without held-out rows, or where `evaluation.verdict_share` is 0.
    """
    share = config.evaluation.verdict_share
    if data.held_out is None or not share:
        logger.info("no verdict: %s", "no rows are held out" if data.held_out is None else "its share of time is 0")
        return
    trained = run.adapter if run.adapter.is_dir() else run.model
    identity = {"adapter": hash_folder(trained), "held_out": data.held_out.fingerprint}
    found = read_verdict(run.verdict) or {}
    if found.get("identity") != identity:
        run_seconds = _measure_run(run)
        allowed = _allow_seconds(share, run_seconds)
        budget = Budget(_AIM * allowed)
        base = load_base() if load_base else None
        before: Before = disabled_adapter if base is None else partial(replaced_by, model=base)
        before = partial(replaced_weights, weights=start) if start else before
        movement = measure_movement(bundle, base)
        evidence = _gather(bundle, data, config, movement=movement, before=before, budget=budget)
        verdict = judge(evidence)
        found = {
            "verdict": verdict.word,
            "reason": verdict.reason,
            "findings": list(verdict.lines),
            **evidence.to_dict(),
            "seconds": round(budget.spent, 3),
            "budget_seconds": round(allowed, 3),
            "run_seconds": round(run_seconds, 3),
            "identity": identity,
        }
        write_json(run.verdict, found)
    _say(found)


def expect_seconds(found: Mapping[str, object], share: float, run_seconds: float) -> float:
    """Return how long the verdict of a run takes whose updates take `run_seconds`.

    Args:
        found: The verdict of a shorter run of the same rows and model.
        share: Of the run's time, for its verdict.
        run_seconds: Of all its updates.
    """
    spent, reached = float(str(found["seconds"])), float(str(found["reached"]))
    aim = _AIM * _allow_seconds(share, run_seconds)
    return max(spent, min(aim, spent / reached) if reached else aim)


def _allow_seconds(share: float, run_seconds: float) -> float:
    return max(_LEAST_SECONDS, share * run_seconds)


def enforce_verdict(run: RunDir, config: ExperimentConfig) -> None:
    """Raise where the verdict is broken, or isn't what `evaluation.require` asks for.

    Raises:
        BrokenRunError: So it is.
    """
    found = read_verdict(run.verdict) or {}
    word, required = found.get("verdict"), config.evaluation.require
    if word == "broken" or (required and word != required):
        asked = "" if word == "broken" else f", and evaluation.require={required}"
        reason = str(found.get("reason"))
        end = "" if reason.endswith("?") else "."
        raise BrokenRunError(f"the verdict is {word}{asked}: {reason}{end} The run is kept in {run.path}.")


def _gather(
    bundle: ModelBundle,
    data: TuningData,
    config: ExperimentConfig,
    *,
    movement: Movement,
    before: Before,
    budget: Budget,
) -> Evidence:
    assert data.held_out is not None, "without held-out rows there is no verdict"
    rows = data.rows
    overlap = measure_overlap(rows.train, rows.held_out, rows.fmt)
    loss, prompt_use = compare_losses(
        bundle,
        data.held_out,
        before=before,
        budget=Budget(budget.left / 3),
        batch_size=config.evaluation.batch_size,
        seed=config.training.seed,
    )
    answers = _ask(bundle, data, config, before=before, budget=budget)
    skipped = list(answers.skipped)
    if missed := len(data.held_out) - loss.num_rows:
        held_out = count_of(missed, "held-out row")
        skipped.insert(0, f"the loss of {held_out}; the run's evaluations are of {len(data.evaluated or ()):,}")
    return Evidence(
        loss=loss,
        prompt_use=prompt_use,
        scores=sorted(answers.scores, key=lambda score: _rank(score.name)),
        movement=movement,
        overlap=overlap,
        samples=answers.samples,
        majority=answers.majority,
        has_drawn_head=bundle.has_drawn_head,
        skipped=skipped,
        reached=min(answers.reached, loss.num_rows / len(data.held_out)),
        started_from=config.adapter.path,
    )


def _ask(
    bundle: ModelBundle, data: TuningData, config: ExperimentConfig, *, before: Before, budget: Budget
) -> PairedAnswers:
    """Ask both models some held-out rows, as a benchmark is asked where the rows are one's."""
    assert data.held_out is not None, "without held-out rows nothing is asked"
    if bundle.task in HEAD_TASKS and data.rows.fmt.kind in HEAD_KINDS:
        asked = list(iter_head_rows(data.rows.held_out, data.rows.fmt))
        random.Random(config.training.seed).shuffle(asked)
        if bundle.task == "qa" and config.data.overlong == "drop":
            head = SpanAsker(bundle, batch_size=config.evaluation.batch_size)
            asked = [row for row in asked[:_MOST_ROWS] if head.has_room(row)]
        return compare_heads(bundle, asked, before=before, budget=budget)
    if bundle.task not in ("causal_lm", "seq2seq"):
        return PairedAnswers(skipped=[f"answers: {bundle.task} is measured by its loss"])
    rows = list(_iter_askable(data.rows.held_out, data))
    generator = TextGenerator(bundle)
    chosen = random.Random(config.training.seed).sample(rows, min(len(rows), _MOST_ROWS))
    chosen = [row for row in chosen if generator.count_tokens(row.prompt) <= generator.longest_prompt]
    if data.rows.fmt.kind == "text":
        settings = SamplingSettings(temperature=0.0, max_new_tokens=_CONTINUATION_TOKENS)
        return compare_answers(bundle, chosen, (), settings, before=before, budget=budget)
    benchmark = find_benchmark(config.data.eval_source or "".join(config.data.sources[:1]))
    longest = max(example.num_target_tokens for example in data.held_out)
    return compare_answers(
        bundle,
        chosen,
        _choose_metrics(benchmark),
        SamplingSettings(
            temperature=0.0,
            max_new_tokens=benchmark.max_new_tokens if benchmark else min(longest, _MOST_TOKENS),
            stop=benchmark.stop if benchmark else (),
        ),
        before=before,
        budget=budget,
        resources=Resources(labels=benchmark.labels if benchmark else ()),
    )


def _iter_askable(rows: Sequence[Row], data: TuningData) -> Iterator[BenchmarkRow]:
    """Yield prompts with their references; of a text its first words."""
    fmt = data.rows.fmt
    if fmt.kind == "text":
        for row in rows:
            words = render_pair(row.values, fmt)[1].split(" ")
            count = min(_FIRST_WORDS, len(words) // 2)
            if count:
                yield BenchmarkRow(" ".join(words[:count]), (" ".join(words[count:]),))
        return
    yield from (row for row in group_rows(rows, fmt, fmt, set()) if row.prompt)


def _choose_metrics(benchmark: Benchmark | None) -> tuple[str, ...]:
    if benchmark is None:
        return _OWN_METRICS
    return tuple(metric for metric in _PAIRED_METRICS if metric in benchmark.metrics)


def _rank(name: str) -> int:
    """Return the place of a number among those of a run: the first one counts."""
    return _SAYS_MOST.index(name) if name in _SAYS_MOST else len(_SAYS_MOST)


def _measure_run(run: RunDir) -> float:
    """Return the seconds that the updates of a run took, by those that were logged: also of a resumed one."""
    lines = [line for line in MetricsLog(run.metrics).read() if line.get("tokens_per_second")]
    if not lines:
        return 0.0
    seconds = median(float(line["input_tokens"] or 0) / float(line["tokens_per_second"] or 1) for line in lines)
    return seconds * int(lines[-1]["step"] or 0)


def _say(found: Mapping[str, object]) -> None:
    first, *findings = describe_verdict(found)
    logger.info("verdict: %s", first)
    for line in findings:
        logger.info("  %s", line)
    for sample in list_samples(found)[:1]:
        logger.info("  for example %r", sample.get("prompt"))
        logger.info("    base: %r", sample.get("base"))
        logger.info("    tuned: %r", sample.get("tuned"))
