"""What ends an answer, and how its next token is chosen."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smolora.config.base import Section


class SamplingSettings(Section):
    """Length and randomness of an answer.

    >>> SamplingSettings(temperature=0).is_greedy
    True
    """

    max_new_tokens: int = Field(default=200, ge=1)
    """Longest answer in tokens; the model's context may end it earlier."""

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Divides the logits: below 1 is safer, above 1 wilder, 0 always takes the likeliest token."""

    top_k: int | None = Field(default=None, ge=1)
    """Choose among the k likeliest tokens only."""

    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Choose among the likeliest tokens that together have this probability."""

    repetition_penalty: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Above 1 makes tokens of the prompt and the answer so far less likely. Left out, the model's own setting."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer where one of them begins."""

    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """The same seed gives the same answer to a prompt, whatever it is asked with. Left out, every answer is new."""

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0.0


DEFAULT_SAMPLING = SamplingSettings()
"""Up to 200 tokens, drawn from the model's own probabilities."""
