"""Did it work? One word for a tuning run, and the measurements that it stands on.

learned: loss and answers, each counted where the difference is sure, are better together than before, and the answers
depend on the prompts. no change, worse: they aren't better, or are worse. broken: the run can't have learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from smolora.adapters.movement import Movement
from smolora.data.overlap import Overlap
from smolora.errors import count_of
from smolora.evaluation.comparison import FEWEST_ANSWERS, LEAST_LOSS_SHARE, Comparison
from smolora.evaluation.metric import finite
from smolora.evaluation.paired_answers import Sample
from smolora.evaluation.paired_loss import PromptUse

Word = Literal["learned", "no change", "worse", "broken"]

_FEW_ROWS = 10
_OVERWRITTEN = 10.0
"""An update so many times as large as the weights has replaced them; usual ones are below 1."""

_MANY_SEEN = 0.1
_HOLD_OUT_MORE = "hold out more: --eval-data, or of 50 rows and more a larger data.validation_fraction"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured of base and tuned model."""

    loss: Comparison
    prompt_use: PromptUse | None
    """None where rows have no prompts, or no two differ in prompt and answer."""
    scores: Sequence[Comparison]
    """Metrics of the answers; the first one counts."""
    movement: Movement
    overlap: Overlap
    samples: Sequence[Sample] = ()
    skipped: Sequence[str] = ()
    """What there was no time for."""
    majority: Comparison | None = None
    """Classifiers only: the accuracy of always naming the commonest label, against the tuned model's."""
    has_drawn_head: bool = False
    """Whether the base of the comparison has a head that was drawn at random."""
    reached: float = 1.0
    """The share of what there was to measure that was measured; 0 where there was no time for whole answers."""
    started_from: str | None = None
    """The adapter that the run continued, which is then on in the base of every comparison."""

    def describe(self) -> Iterator[str]:
        """Yield a line for each finding."""
        if self.started_from:
            yield f"base here is the base with the adapter of {self.started_from}, where the run started"
        elif self.has_drawn_head:
            yield "base here is the base with a head drawn at random, as the run started: it guesses"
        yield self.loss.describe()
        if self.scores:
            yield self.scores[0].describe()
        if self.majority:
            yield f"always naming the commonest label against the tuned model: {self.majority.describe()}"
        if self.prompt_use:
            own, other = self.prompt_use.own, self.prompt_use.other
            others = (
                "other questions about their contexts" if self.prompt_use.is_of_questions else "other rows' prompts"
            )
            yield f"loss of the same answers after {others} {other:.4f}, after their own {own:.4f}"
        yield self._describe_movement()
        if self.overlap.rows:
            yield f"{self.overlap.rows} of {self.overlap.num_held_out} held-out rows were in the training rows too"
        if self.has_seen_prompts:
            yield f"{self.describe_seen_prompts()}: nothing here says how it answers new ones"
        if self.loss.num_rows < _FEW_ROWS:
            intervals = "the intervals are wide" if self.loss.num_rows > 1 else "there are no intervals"
            yield f"only {count_of(self.loss.num_rows, 'held-out row')}, so {intervals} ({_HOLD_OUT_MORE})"
        yield from (f"skipped: {what}" for what in self.skipped)

    @property
    def has_seen_prompts(self) -> bool:
        """Whether many held-out rows have a prompt that was trained on, with another answer."""
        return self._num_seen_prompts > _MANY_SEEN * self.overlap.num_held_out

    def describe_seen_prompts(self) -> str:
        """Return how many, as a clause."""
        of_all = f"{self._num_seen_prompts} of {self.overlap.num_held_out}"
        return f"the prompts of {of_all} held-out rows were trained on, with other answers"

    @property
    def _num_seen_prompts(self) -> int:
        return 0 if self.overlap.prompts is None else self.overlap.prompts - self.overlap.rows

    def _describe_movement(self) -> str:
        if not self.movement.modules:
            return "virtual tokens were trained; no weight of the base moved"
        of_norm = f"{100 * self.movement.relative:.2f} % of their norm"
        moved = f"are {of_norm} away from the plain base" if self.started_from else f"moved by {of_norm}"
        still = f"; {self.movement.num_still} stood still" if self.movement.num_still else ""
        num_modules = len(self.movement.modules)
        return f"weights {moved}, in {count_of(num_modules, 'module')}{still}"

    def to_dict(self) -> dict[str, object]:
        """Return all of it as plain values."""
        moved = self.movement
        return {
            "started_from": self.started_from,
            "loss": self.loss.to_dict(),
            "prompt_use": self.prompt_use.to_dict() if self.prompt_use else None,
            "majority": self.majority.to_dict() if self.majority else None,
            "has_drawn_head": self.has_drawn_head,
            "metric": self.scores[0].to_dict() if self.scores else None,
            "other_metrics": [score.to_dict() for score in self.scores[1:]],
            "movement": {
                "relative": finite(moved.relative),
                "modules": {name: finite(value) for name, value in moved.modules.items()},
            },
            "overlap": asdict(self.overlap),
            "samples": [sample.to_dict() for sample in self.samples],
            "skipped": list(self.skipped),
            "reached": self.reached,
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The word, why, and what it stands on."""

    word: Word
    reason: str
    lines: Sequence[str] = ()
    """The findings, for people."""


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict on what was measured."""
    word, reason = _choose_word(evidence)
    return Verdict(word=word, reason=reason, lines=tuple(evidence.describe()))


def _doubt_labels(majority: Comparison) -> str:
    """Return why labels may have been learned by how frequent they are alone, as a clause."""
    if majority.num_rows < FEWEST_ANSWERS:
        return (
            f"{majority.num_rows} held-out rows are too few to tell an accuracy of {majority.tuned:.4f} from the "
            f"{majority.base:.4f} of always naming the commonest label: it takes {FEWEST_ANSWERS} ({_HOLD_OUT_MORE})"
        )
    return (
        f"an accuracy of {majority.tuned:.4f} isn't surely above the {majority.base:.4f} of always naming the "
        f"commonest label. Either {majority.num_rows} held-out rows are too few to tell ({_HOLD_OUT_MORE}), or how "
        "frequent each label is was learned, and not which text has which: are texts and labels paired rightly?"
    )


def _doubt_prompts(use: PromptUse) -> str:
    """Return why the answers may not depend on the prompts, as a clause."""
    other, prompts = ("another row's prompt", "prompts")
    if use.is_of_questions:
        other, prompts = ("another question about its context", "questions")
    too_few = f"{count_of(use.num_rows, 'held-out row')} {'are' if use.num_rows != 1 else 'is'} too few to tell"
    form = f"the form of the answers was learned, not what they answer: are {prompts} and answers paired rightly?"
    least = LEAST_LOSS_SHARE * use.own
    if use.high is not None and use.high < least:
        return f"after {other} an answer is as likely as after its own (to 1 %): {form}"
    if use.high is not None and use.other - use.own < least:
        return (
            f"after {other} an answer is about as likely as after its own. Either {too_few} ({_HOLD_OUT_MORE}), or "
            + form
        )
    return (
        f"{too_few} whether the answers depend on the {prompts}: a loss of {use.other:.4f} after {other} against "
        f"{use.own:.4f} after its own may be chance ({_HOLD_OUT_MORE})"
    )


def _choose_word(evidence: Evidence) -> tuple[Word, str]:
    loss, use, overlap = evidence.loss, evidence.prompt_use, evidence.overlap
    if ruin := _find_ruin(evidence):
        return ruin
    score = evidence.scores[0] if evidence.scores else None
    votes = loss.verdict + (score.verdict if score else 0)
    found = _say_votes(loss, score)
    if votes <= 0:
        return "worse" if votes else "no change", found
    if evidence.majority is not None and evidence.majority.verdict <= 0:
        return "no change", f"{found}, but {_doubt_labels(evidence.majority)}"
    if use is not None and not use.is_sure:
        return "no change", f"{found}, but {_doubt_prompts(use)}"
    if overlap.rows > _MANY_SEEN * overlap.num_held_out:
        found += f"; but {overlap.rows} of {overlap.num_held_out} held-out rows were trained on, so this may be memory"
    elif evidence.has_seen_prompts:
        found += f"; but {evidence.describe_seen_prompts()}, so it is for these prompts. Hold out new ones: --eval-data"
    return "learned", found


def _find_ruin(evidence: Evidence) -> tuple[Word, str] | None:
    """Return what no measurement of answers can make good."""
    moved, has_moved_weights = evidence.movement.relative, bool(evidence.movement.modules)
    if not math.isfinite(evidence.loss.tuned):
        return "broken", f"the held-out loss is {evidence.loss.tuned}"
    if has_moved_weights and (not moved or not math.isfinite(moved)):
        return "broken", "no adapted weight differs from the base's" if not moved else "the adapter isn't finite"
    if moved > _OVERWRITTEN:
        return "worse", (
            f"the adapter's update is {moved:,.0f} times as large as the weights it is added to, "
            "so nothing is left of the base. Lower the learning rate"
        )
    return None


def _say_votes(loss: Comparison, score: Comparison | None) -> str:
    said = [f"{one.name} is {_WORDS[one.verdict]}" for one in (loss, score) if one and one.is_counted]
    unsure = f" (by less than {100 * LEAST_LOSS_SHARE:.0f} %, or not surely so)" if not loss.verdict else ""
    return " and ".join(said) + unsure


_WORDS = {-1: "worse", 0: "the same", 1: "better"}
