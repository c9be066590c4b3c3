"""Which methods can't go with which task, number of bits or checkpointing: a table, with the reason of every row.

Whatever it doesn't name works. The configuration is checked against it before a model is loaded, and the page on
methods is written from it. Each row was found by trying it on tiny models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smolora.config.model import Quantization, TaskType


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """A combination that can't work. A field that is left empty fits anything."""

    methods: tuple[str, ...]
    tasks: tuple[TaskType, ...] = ()
    quantizations: tuple[Quantization, ...] = ()
    gradient_checkpointing: bool | None = None
    reason: str
    """Why, as the end of a sentence."""
    advice: str
    """What to do instead, as a sentence."""
    link: str | None = None
    """Where upstream says so; None where it is a choice of this project."""

    def describe(self) -> str:
        """Return the rest of a sentence that ends in the method that can't be used, and what to do."""
        return f"{self.reason}. {self.advice}{f' See {self.link}' if self.link else ''}"


OBSTACLES: tuple[Obstacle, ...] = (
    Obstacle(
        methods=("full",),
        quantizations=("8bit", "4bit"),
        reason="weights of few bits have no gradient",
        advice="Give model.quantization=none, or choose lora.",
        link="https://github.com/huggingface/transformers/pull/26248",
    ),
    Obstacle(
        methods=("prompt_tuning", "p_tuning"),
        tasks=("token_classification", "qa"),
        reason="the answers are at places of the row, and the virtual tokens before it move them",
        advice="Choose lora, or another method that changes weights.",
        link="https://github.com/huggingface/peft/issues/482",
    ),
    Obstacle(
        methods=("prefix_tuning",),
        tasks=("qa",),
        reason="peft 0.21 drops the segments of a question there, and what goes around that goes around the prefix too",
        advice="Choose lora, or another method that changes weights.",
        link="https://github.com/huggingface/peft/pull/473",
    ),
    Obstacle(
        methods=("prefix_tuning",),
        tasks=("seq2seq",),
        reason="peft 0.21 reaches the decoder alone, with keys of d_model / num_heads, which not every T5 has (d_kv)",
        advice="Choose lora, or another method that changes weights.",
        link="https://github.com/huggingface/peft/pull/2989",
    ),
    Obstacle(
        methods=("pissa",),
        quantizations=("8bit", "4bit"),
        reason="it takes its start out of the base's weights, which few bits can't hold",
        advice="Choose loftq, or model.quantization=none.",
        link="https://github.com/huggingface/peft/pull/1626",
    ),
    Obstacle(
        methods=("loftq",),
        quantizations=("none",),
        reason="it starts from what quantising loses of the base, and the base isn't quantised",
        advice="Give model.quantization=4bit, or choose lora.",
        link="https://github.com/huggingface/peft/pull/1543",
    ),
    Obstacle(
        methods=("prefix_tuning",),
        gradient_checkpointing=True,
        reason="its keys and values come in the cache, which is off where activations are recomputed",
        advice="Leave training.gradient_checkpointing off, or choose prompt_tuning.",
        link="https://github.com/huggingface/peft/pull/2191",
    ),
)


NEEDS_FLOAT32: Mapping[str, str] = {
    "full": "its weights are trained, and AdamW in half precision doesn't move them, or overflows",
    "pissa": "its base's weights are changed, and 16 bits would round the change",
}
"""Methods that change the base's own weights, and why those are float32."""

FLOAT32_LINKS: Mapping[str, str] = {"full": "https://github.com/pytorch/pytorch/issues/26218"}
"""Where upstream says so, of methods for which it isn't a choice of this project."""

_FLOAT32_IF_QUANTISED = ("adalora", "ia3")
"""On layers of few bits peft 0.21 computes these in float32, whatever the base computes in: the types don't meet."""


def find_float32_need(*, method: str, quantization: Quantization) -> str | None:
    """Return why a base must be, or compute in, float32; None where any type will do."""
    if quantization != "none" and method in _FLOAT32_IF_QUANTISED:
        return "on layers of few bits it computes in float32, and the base must do so too"
    return NEEDS_FLOAT32.get(method)


PHASELESS: Mapping[str, str] = {
    **dict.fromkeys(
        ("prompt_tuning", "p_tuning", "prefix_tuning"),
        "virtual tokens belong to no layer and to neither attention nor MLP",
    ),
    "adalora": "it weighs all modules against each other, so all of them must train",
}
"""Methods that can't train in phases, and why."""


def find_obstacle(
    *, method: str, task: TaskType, quantization: Quantization, gradient_checkpointing: bool
) -> Obstacle | None:
    """Return the first row of the table that a combination meets, or None where it works."""
    return next(
        (
            row
            for row in OBSTACLES
            if method in row.methods
            and task in (row.tasks or (task,))
            and quantization in (row.quantizations or (quantization,))
            and row.gradient_checkpointing in (None, gradient_checkpointing)
        ),
        None,
    )
