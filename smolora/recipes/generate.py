"""`smolora generate`: open a model, ask it once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolora.adapters.store import load_bundle
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.runtime.device import resolve_device

if TYPE_CHECKING:
    from smolora.models.bundle import ModelBundle


def generate(source: str, prompt: str, settings: SamplingSettings = DEFAULT_SAMPLING, *, device: str = "auto") -> str:
    """Return the answer, without the prompt, of a run, a model or adapter folder, or a hub id.

    Raises:
        ModelError: There is no such model.
        DataError: The prompt leaves no room in the model's context.
    """
    generator = TextGenerator(open_model(source, device=device))
    return generator.generate(prompt, settings=settings)[0]


def open_model(source: str, *, device: str = "auto") -> ModelBundle:
    """Open a model for asking: on the device that `device` resolves to, its base in the file's own number type."""
    return load_bundle(source, device=str(resolve_device(device).device))
