"""Writes a model as a Hugging Face folder, with its tokenizer and the form of its prompts."""

from __future__ import annotations

from pathlib import Path

from smolora.data.prompts import write_prompt_format
from smolora.models.bundle import ModelBundle
from smolora.models.loading import quiet_transformers
from smolora.models.structure import PreTrainedModel
from smolora.records.staging import share


def save_model(bundle: ModelBundle, folder: Path) -> None:
    """Write a plain transformers model, whose weights keep their type, into `folder`.

    Files are written one after the other; whoever needs all or none passes a staged folder (records.staging).
    """
    assert isinstance(bundle.model, PreTrainedModel), "a model without an adapter"
    with quiet_transformers():
        bundle.model.save_pretrained(str(folder))
        bundle.tokenizer.save_pretrained(str(folder))
    for file in folder.glob("*.safetensors"):
        share(file)
    if bundle.prompt_format:
        write_prompt_format(bundle.prompt_format, folder)
