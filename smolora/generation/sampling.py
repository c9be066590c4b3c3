"""What ends an answer, and how its next token is chosen."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from smolora.config.base import Section
from smolora.errors import ConfigError

_COLDEST = 1e-6
"""Up to here the likeliest token has all of the probability, and logits divided by it may overflow."""


class SamplingSettings(Section):
    """Length and randomness of an answer.

    >>> SamplingSettings(temperature=0).is_drawn, SamplingSettings(num_beams=4).is_drawn
    (False, False)
    """

    max_new_tokens: int = Field(default=200, ge=1)
    """Longest answer in tokens; the model's context may end it earlier."""

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Divides the logits: below 1 is safer, above 1 wilder, 0 always takes the likeliest token."""

    top_k: int | None = Field(default=None, ge=1)
    """Choose among the k likeliest tokens only."""

    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Choose among the likeliest tokens that together have this probability."""

    num_beams: int = Field(default=1, ge=1)
    """Above 1: keep so many beginnings at each token, and answer with the likeliest whole text; nothing is drawn."""

    repetition_penalty: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Above 1 makes tokens of the prompt and the answer so far less likely. Left out, the model's own setting."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer where one of them begins, beside those that the model itself has. One may be what spells
    a special token, such as `<|im_end|>`."""

    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """The same seed gives the same answer to a prompt, whatever it is asked with. Left out, every answer is new."""

    @property
    def is_drawn(self) -> bool:
        """Whether chance has a part in the answer."""
        return self.temperature > _COLDEST and self.num_beams == 1

    def check_drawing(self) -> None:
        """Raise where they shape what is drawn at random, and nothing is; a temperature that is left out counts as 0.

        Raises:
            ConfigError: They do.
        """
        given = self.model_fields_set
        is_greedy = "temperature" not in given or self.temperature <= _COLDEST
        if is_greedy and (idle := sorted(given & {"top_k", "top_p", "seed"})):
            raise ConfigError(
                f"answers are greedy, so {' and '.join(idle)} would change nothing: "
                "leave that out, or set a temperature above 0."
            )

    @model_validator(mode="after")
    def _refuse_chance_in_beams(self) -> Self:
        given = {name for name in ("temperature", "top_k", "top_p", "seed") if name in self.model_fields_set}
        if self.num_beams > 1 and (idle := given - ({"temperature"} if self.temperature == 0.0 else set())):
            raise ValueError(
                f"num_beams={self.num_beams} looks for the likeliest answer and draws nothing, so "
                f"{' and '.join(sorted(idle))} would change nothing: give one or the other"
            )
        return self


DEFAULT_SAMPLING = SamplingSettings()
"""Up to 200 tokens, drawn from the model's own probabilities."""
