"""`smolora generate`: open a model, ask it once."""

from __future__ import annotations

from smolora.adapters.store import open_model
from smolora.evaluation.head_source import refuse_drawing
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.inference.conversation import begin_conversation
from smolora.inference.pipeline import InferencePipeline


def generate(
    source: str,
    prompt: str,
    settings: SamplingSettings = DEFAULT_SAMPLING,
    *,
    system: str | None = None,
    base: str | None = None,
    device: str = "auto",
) -> str:
    """Return the answer, without the prompt, of a run, a model or adapter folder, or a hub id.

    The answer of a classifier is the label of the text.

    Args:
        source: What is asked.
        prompt: What it is asked.
        settings: How the answer is drawn.
        system: What a model of conversations is told before.
        base: The base of an adapter, where its folder doesn't lead to it.
        device: auto, cpu, cuda or mps.

    Raises:
        ModelError: There is no such model.
        ConfigError: The model has a head that answers no text alone, or one that the settings change nothing of; or it
            has no form for a system turn.
        DataError: The prompt leaves no room in the model's context.
    """
    bundle = open_model(source, base, device=device)
    begun = begin_conversation(bundle, system)
    if bundle.task == "classification":
        refuse_drawing(bundle, SamplingSettings(**settings.model_dump(exclude_defaults=True)), by_likelihood=False)
        return InferencePipeline(bundle).classify(prompt).label
    asked = [*begun, {"role": "user", "content": prompt}] if begun else prompt
    return TextGenerator(bundle).generate([asked], settings=settings)[0]
