"""Writes a model as a Hugging Face folder, with its tokenizer and the form of its prompts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from smolora.data.chat import choose_chat_template, spell_chat_template
from smolora.data.prompts import read_prompt_format, write_prompt_format
from smolora.errors import DataError
from smolora.models.bundle import ModelBundle
from smolora.models.folders import read_json
from smolora.models.loading import quiet_transformers
from smolora.models.structure import PreTrainedModel
from smolora.records.staging import share, write_json, write_text
from smolora.tokenizers.pretrained import load_tokenizer

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"


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
        settle_chat_template(folder)


def settle_chat_template(folder: Path) -> None:
    """Make the chat template that a model was trained with its tokenizer's, so that plain transformers prompts so too.

    Other templates that the folder has are taken away, since the model never learned from them.
    """
    fmt = read_prompt_format(folder)
    if fmt is None or fmt.chat_template is None:
        return
    tokenizer, template = load_tokenizer(folder), fmt.chat_template
    try:
        template = spell_chat_template(template, tokenizer)
    except DataError as error:
        logger.warning("plain transformers will not make the prompts of the training from this model: %s", error)
    if tokenizer.chat_template and choose_chat_template(tokenizer) == template:
        return
    for file in folder.glob("chat_template*"):
        file.unlink()
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    settings = read_json(folder / "tokenizer_config.json") or {}
    if settings.pop("chat_template", None):
        write_json(folder / "tokenizer_config.json", settings)
    write_text(folder / TEMPLATE_FILE, template)
