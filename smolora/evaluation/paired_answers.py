"""What base and tuned model answer to the same rows: a few side by side, and the metric of as many as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from smolora.adapters.toggling import disabled_adapter
from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.comparison import Before, Budget, Comparison, bound_differences
from smolora.evaluation.heads import choose_head_metrics, open_head
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import MetricsCalculator
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import Prompt, TextGenerator
from smolora.models.bundle import ModelBundle

NUM_SAMPLES = 5
_MAJORITY = "majority_accuracy"
_AT_ONCE = 16
_CUT = "..."
_MORE_TIME = "a larger evaluation.verdict_share gives more"
_LEAST_SECONDS_A_PROMPT = 1e-6
"""Whatever the clock says, none is read in less."""


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


class _Part(NamedTuple):
    """Some rows, each with the base's answer and the tuned model's."""

    rows: list[tuple[BenchmarkRow, Answer, Answer]]
    is_whole: bool
    """Whether each answer has come to its end."""


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
        rows: What is asked; the first five that are answered are shown.
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
    first = _count_affordable_rows(generator, rows[0], settings, budget) if budget.left > 0 else 0
    rows = rows if metrics else rows[:NUM_SAMPLES]

    def answer(part: Sequence[BenchmarkRow], spared: float) -> tuple[list[Answer], bool]:
        prompts = [row.prompt for row in part]
        texts, are_whole = generator.generate_until(
            lambda: budget.left <= spared, prompts, settings=settings, batch_size=_AT_ONCE
        )
        marked = (
            text if is_whole or not text else text + _CUT for text, is_whole in zip(texts, are_whole, strict=True)
        )
        return [Answer(text) for text in marked], all(are_whole)

    calculators = [MetricsCalculator(metrics, resources=resources) for _ in range(2)]
    parts = _ask(bundle, rows, answer, first=first, before=before, budget=budget) if first else ()
    _score(found, parts, calculators, num_asked=len(rows))
    if not found.num_rows:
        whole = f"whole ones, so none is scored; where it was up those shown end in {_CUT!r}"
        found.skipped = [f"answers: there was no time for {whole if found.samples else 'any'}; {_MORE_TIME}"]
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

    def answer(part: Sequence[BenchmarkRow], _: float) -> tuple[list[Answer], bool]:
        return head.answer(part), True

    parts = _ask(bundle, rows, answer, first=_AT_ONCE, before=before, budget=budget)
    _score(found, parts, calculators, num_asked=len(rows))
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
    found: PairedAnswers, parts: Iterable[_Part], calculators: Sequence[MetricsCalculator], *, num_asked: int
) -> None:
    for part in parts:
        shown = part.rows[: NUM_SAMPLES - len(found.samples)]
        found.samples += [
            Sample(_show_prompt(row), row.references[0], base.text, tuned.text) for row, base, tuned in shown
        ]
        if part.is_whole:
            found.num_rows += len(part.rows)
            for row, *answers in part.rows:
                for calculator, answer in zip(calculators, answers, strict=True):
                    calculator.add(answer, row)
    if left := num_asked - found.num_rows:
        found.reached = found.num_rows / num_asked
        found.skipped.append(f"answers to {left:,} of {num_asked:,} held-out rows")
    found.scores = list(_compare_scores(calculators)) if found.num_rows else []


def _count_affordable_rows(
    generator: TextGenerator, row: BenchmarkRow, settings: SamplingSettings, budget: Budget
) -> int:
    """Return how many rows' prompts both can read together in half of the time, one where they can't do so together."""
    one = settings.replace(max_new_tokens=1, stop=())
    generator.generate([row.prompt] * 2, settings=one)  # The first call looks at the model.
    of_one, of_two = (_time(generator, [row.prompt] * count, one) for count in (1, 2))
    a_prompt = max(of_two - of_one, _LEAST_SECONDS_A_PROMPT)
    most = _AT_ONCE if generator.answers_side_by_side else 1
    return max(0, min(most, 1 + int((budget.left / 4 - of_one) // a_prompt)))


def _time(generator: TextGenerator, prompts: Sequence[Prompt], settings: SamplingSettings) -> float:
    began = time.perf_counter()
    generator.generate(prompts, settings=settings)
    return time.perf_counter() - began


def _ask(
    bundle: ModelBundle,
    rows: Sequence[BenchmarkRow],
    answer: Callable[[Sequence[BenchmarkRow], float], tuple[list[Answer], bool]],
    *,
    first: int,
    before: Before,
    budget: Budget,
) -> Iterator[_Part]:
    """Yield what both answer to some rows after the other, as long as there is time for more of them.

    Half of what is left is the tuned model's. Of the first part what both came to is yielded all the same; a later one
    that isn't whole is left out.

    Args:
        bundle: The tuned model.
        rows: What is asked.
        answer: Returns answers, and whether all are whole; it ends where no more than so many seconds are left.
        first: Rows of the first part; the next ones have as many or, where the time allows for it, more.
        before: Makes the base of it.
        budget: The time.
    """
    start, count = 0, min(first, len(rows)) if budget.left > 0 else 0
    while count:
        began, asked = budget.spent, rows[start : start + count]
        tuned, is_whole = answer(asked, budget.left / 2)
        if start and not is_whole:
            return
        with before(bundle):
            base, is_base_whole = answer(asked, 0.0)
        is_whole = is_whole and is_base_whole
        if is_whole or not start:
            yield _Part(list(zip(asked, base, tuned, strict=True)), is_whole)
        if not is_whole:
            return
        start += len(asked)
        took = max(budget.spent - began, _LEAST_SECONDS_A_PROMPT)
        count = min(_AT_ONCE, len(rows) - start, max(len(asked), int(len(asked) * budget.left / took)))
        share = count / len(asked)
        if budget.left < took * max(share, (1 + share) / 2):  # Few rows take half of the time of many.
            return


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
