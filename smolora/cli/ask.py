"""The verbs that ask a model: generate, chat."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolora.cli.terminal import open_terminal
from smolora.errors import ConfigError
from smolora.runtime.console import decoded_input

if TYPE_CHECKING:
    from smolora.generation.sampling import SamplingSettings

logger = logging.getLogger(__name__)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How answers are drawn."""

    max_new_tokens: int = 200
    """Longest answer in tokens."""

    greedy: bool = False
    """Always take the likeliest token."""

    temperature: float | None = None
    """Below 1 is safer, above 1 wilder; 0 is --greedy."""

    top_k: int | None = None
    """Choose among the k likeliest tokens only."""

    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""

    num_beams: int | None = None
    """Look for the likeliest whole answer among so many beginnings at a time."""

    repetition_penalty: float | None = None
    """Above 1 makes tokens of the prompt and the answer so far less likely."""

    stop: tuple[str, ...] = ()
    """Text that ends the answer where it begins. May be repeated."""

    seed: int | None = None
    """The same seed gives the same answer."""

    def to_settings(self) -> SamplingSettings:
        """Return the settings of the generator."""
        from smolora.generation.sampling import SamplingSettings

        if self.greedy and self.temperature:
            raise ConfigError(f"--greedy and --temperature {self.temperature:g} contradict each other; give one.")
        if self.greedy and self.num_beams is not None:
            raise ConfigError(f"--greedy and --num-beams {self.num_beams} contradict each other; give one.")
        given = {name: value for name, value in vars(self).items() if value not in (None, ()) and name != "greedy"}
        settings = SamplingSettings(**({**given, "temperature": 0.0} if self.greedy else given))
        if not settings.is_drawn:
            settings.check_drawing()
        return settings


def generate(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    system: str | None = None,
    flags: SamplingFlags | None = None,
    base: str | None = None,
    device: str = "auto",
) -> None:
    """Print a model's answer to a prompt: the answer alone, on stdout.

    Args:
        model: A run, a model or adapter folder, or a hub id.
        prompt: What it is asked, in the form it was trained on; - reads it from standard input.
        system: What a model of conversations is told before, as the system turn.
        flags: How the answer is drawn.
        base: Base of the adapter, where it isn't where it was in training.
        device: auto, cpu, cuda or mps.
    """
    open_terminal()
    settings = (flags or SamplingFlags()).to_settings()
    if prompt == "-":
        prompt = _read_prompt()
    elif os.path.isfile(prompt):  # noqa: PTH113 - Path.is_file raises where text is too long to be a name
        logger.warning(
            "the prompt is the name of a file, not what it holds; for that, write - < %s in its place", prompt
        )
    from smolora.models.folders import require_model

    for name in filter(None, (model, base)):  # Before torch and transformers are imported.
        require_model(name)
    from smolora.recipes.generate import generate as run_generate

    print(run_generate(model, prompt, settings, system=system, base=base, device=device))


def _read_prompt() -> str:
    """Return what standard input holds but for line breaks at its end, as $(...) of a shell does."""
    with decoded_input():
        return sys.stdin.read().rstrip("\r\n")


def chat(
    model: str,
    /,
    *,
    system: str | None = None,
    flags: SamplingFlags | None = None,
    base: str | None = None,
    device: str = "auto",
) -> None:
    """Talk to a model in the terminal, or through pipes with a question a line.

    Args:
        model: A run, a model or adapter folder, or a hub id.
        system: What a model of conversations is told before, as the system turn.
        flags: How the answer is drawn.
        base: Base of the adapter, where it isn't where it was in training.
        device: auto, cpu, cuda or mps.
    """
    open_terminal()
    settings = (flags or SamplingFlags()).to_settings()
    from smolora.models.folders import require_model

    for name in filter(None, (model, base)):
        require_model(name)
    from smolora.adapters.store import open_model
    from smolora.inference.chat import run_chat
    from smolora.models.tasks import describe_head

    bundle = open_model(model, base, device=device)
    if bundle.task == "classification":
        asked = f'smolora generate {model} "text" says the label of one'
        raise ConfigError(f"{describe_head(bundle.task, bundle.labels)}, so there is no talking to it. {asked}.")
    run_chat(bundle, settings, system=system)
