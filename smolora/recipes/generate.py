"""`smolora generate`: open a model, ask it once."""

from __future__ import annotations

from smolora.adapters.store import open_model
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.generation.text_generator import TextGenerator


def generate(source: str, prompt: str, settings: SamplingSettings = DEFAULT_SAMPLING, *, device: str = "auto") -> str:
    """Return the answer, without the prompt, of a run, a model or adapter folder, or a hub id.

    Raises:
        ModelError: There is no such model.
        DataError: The prompt leaves no room in the model's context.
    """
    generator = TextGenerator(open_model(source, device=device))
    return generator.generate(prompt, settings=settings)[0]
