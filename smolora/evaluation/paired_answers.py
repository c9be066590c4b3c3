"""What base and tuned model answer to the same rows: a few side by side, and the metric of as many as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from smolora.adapters.toggling import disabled_adapter
from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.comparison import Before, Budget, Comparison, bound_differences
from smolora.evaluation.heads import choose_head_metrics, open_head
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import MetricsCalculator
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.bundle import ModelBundle

NUM_SAMPLES = 5
_MAJORITY = "majority_accuracy"
_AT_ONCE = 16
_FEWEST_TOKENS = 8
_PROBE_TOKENS = 4
_MORE_TIME = "a larger evaluation.verdict_share gives more"
_MARGIN = 2.0
"""A step of 16 rows takes at most about so many times as long as one of a single row."""


@dataclass(frozen=True)
class Sample:
    """A row, and what both answer."""

    prompt: str
    reference: str
    base: str
    tuned: str

    def to_dict(self) -> dict[str, str]:
        """Return the texts by name."""
        return asdict(self)


@dataclass
class PairedAnswers:
    """The answers to some rows."""

    samples: list[Sample] = field(default_factory=list)
    scores: list[Comparison] = field(default_factory=list)
    num_rows: int = 0
    reached: float = 1.0
    """The share of what there was to ask that was asked; 0 where there was no time for whole answers."""
    skipped: list[str] = field(default_factory=list)
    """What there was no time for."""
    majority: Comparison | None = None
    """Labels only: what always naming the commonest one would reach, against the tuned accuracy."""


def compare_answers(
    bundle: ModelBundle,
    rows: Sequence[BenchmarkRow],
    metrics: Sequence[str],
    settings: SamplingSettings,
    *,
    before: Before = disabled_adapter,
    budget: Budget,
    resources: Resources | None = None,
) -> PairedAnswers:
    """Ask both the rows in order, until the time is up.

    Args:
        bundle: A base with an adapter.
        rows: What is asked; the first five are shown.
        metrics: Names of metrics that are sums over rows; none for samples alone.
        settings: How both answer.
        before: Makes it the base of the comparison.
        budget: The time.
        resources: What the metrics need.
    """
    found = PairedAnswers()
    if not rows:
        found.skipped.append("answers: no held-out row leaves room for one")
        return found
    generator = TextGenerator(bundle)
    room = _count_affordable_tokens(generator, rows[0], settings, budget) if budget.left > 0 else 0
    if room < min(_FEWEST_TOKENS, settings.max_new_tokens):
        found.reached = 0.0
        found.skipped.append(f"answers: there was no time for any; {_MORE_TIME}")
        return found
    is_cut = room < settings.max_new_tokens
    if is_cut:
        cut = f"each was cut at {room} tokens to save time, and a right one has up to {settings.max_new_tokens}"
        found.skipped.append(f"scores of answers: {cut}; {_MORE_TIME}")
        settings, metrics = settings.replace(max_new_tokens=room), ()
    rows = rows if metrics else rows[:NUM_SAMPLES]
    chosen = settings

    def answer(part: Sequence[BenchmarkRow]) -> list[Answer]:
        prompts = [row.prompt for row in part]
        return [Answer(text) for text in generator.generate(prompts, settings=chosen, batch_size=_AT_ONCE)]

    calculators = [MetricsCalculator(metrics, resources=resources) for _ in range(2)]
    _score(found, _ask(bundle, rows, answer, before=before, budget=budget), calculators, num_asked=len(rows))
    if is_cut:
        found.reached = 0.0
    return found


def compare_heads(
    bundle: ModelBundle, rows: Sequence[BenchmarkRow], *, before: Before = disabled_adapter, budget: Budget
) -> PairedAnswers:
    """Ask the heads of both the rows in order, until the time is up.

    The metrics of the head come base against tuned; of labels, `majority` is what the commonest one of these rows would
    reach, against the tuned accuracy.
    """
    found = PairedAnswers()
    metrics = [metric for metric in choose_head_metrics(bundle) if metric != "head_loss"]  # Of all rows there already.
    calculators = [MetricsCalculator(metrics, resources=Resources(labels=bundle.labels)) for _ in range(2)]
    head = open_head(bundle, batch_size=_AT_ONCE)
    _score(found, _ask(bundle, rows, head.answer, before=before, budget=budget), calculators, num_asked=len(rows))
    if not found.num_rows or not any(score.name == _MAJORITY for score in found.scores):
        return found
    found.scores = [score for score in found.scores if score.name != _MAJORITY]
    tuned, scores = calculators[1], calculators[1].conclude()
    low, high = bound_differences(tuned.resample(_MAJORITY), tuned.resample("accuracy"), num_rows=found.num_rows)
    found.majority = Comparison(
        name="accuracy",
        base=scores[_MAJORITY].value or 0.0,
        tuned=scores["accuracy"].value or 0.0,
        low=low,
        high=high,
        num_rows=found.num_rows,
        variant=scores[_MAJORITY].variant,
        version=scores[_MAJORITY].version or "",
    )
    return found


def _score(
    found: PairedAnswers,
    answered: Iterable[tuple[BenchmarkRow, Answer, Answer]],
    calculators: Sequence[MetricsCalculator],
    *,
    num_asked: int,
) -> None:
    for row, *answers in answered:
        found.num_rows += 1
        for calculator, answer in zip(calculators, answers, strict=True):
            calculator.add(answer, row)
        if len(found.samples) < NUM_SAMPLES:
            found.samples.append(Sample(_show_prompt(row), row.references[0], *(answer.text for answer in answers)))
    if left := num_asked - found.num_rows:
        found.reached = found.num_rows / num_asked
        found.skipped.append(f"answers to {left:,} of {num_asked:,} held-out rows")
    found.scores = list(_compare_scores(calculators)) if found.num_rows else []


def _count_affordable_tokens(
    generator: TextGenerator, row: BenchmarkRow, settings: SamplingSettings, budget: Budget
) -> int:
    """Return how long the first answers may be, by the time that a few tokens take."""
    one = settings.replace(max_new_tokens=1, stop=())
    generator.generate([row.prompt], settings=one)  # The first call looks at the model.
    of_one, of_all = (_time(generator, row, one.replace(max_new_tokens=1 + more)) for more in (0, _PROBE_TOKENS))
    a_token = max(of_all - of_one, of_all / _PROBE_TOKENS) / _PROBE_TOKENS  # Whatever the clock says, none is free.
    return min(settings.max_new_tokens, int(max(0.0, budget.left / (2 * _MARGIN) - of_one) / a_token))


def _time(generator: TextGenerator, row: BenchmarkRow, settings: SamplingSettings) -> float:
    began = time.perf_counter()
    generator.generate([row.prompt], settings=settings)
    return time.perf_counter() - began


def _ask(
    bundle: ModelBundle,
    rows: Sequence[BenchmarkRow],
    answer: Callable[[Sequence[BenchmarkRow]], list[Answer]],
    *,
    before: Before,
    budget: Budget,
) -> Iterator[tuple[BenchmarkRow, Answer, Answer]]:
    """Yield each row with the base's answer and the tuned model's, as long as there is time for more of them."""
    start, needed = 0, 0.0
    while start < len(rows) and budget.left >= needed:
        began = time.perf_counter()
        part = rows[start : start + _AT_ONCE]
        tuned = answer(part)
        with before(bundle):
            base = answer(part)
        yield from zip(part, base, tuned, strict=True)
        needed = time.perf_counter() - began
        start += len(part)


def _compare_scores(calculators: Sequence[MetricsCalculator]) -> Iterator[Comparison]:
    before, after = (calculator.conclude() for calculator in calculators)
    for name, score in before.items():
        base, tuned = score.value, after[name].value
        if base is None or tuned is None:
            continue
        values = [calculator.resample(name) for calculator in calculators]
        low, high = bound_differences(values[0], values[1], num_rows=calculators[0].num_rows)
        yield Comparison(
            name=name,
            base=base,
            tuned=tuned,
            low=low,
            high=high,
            num_rows=calculators[0].num_rows,
            variant=score.variant,
            version=score.version or "",
        )


def _show_prompt(row: BenchmarkRow) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in row.prompt)
