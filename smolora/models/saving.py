"""Writes a model as a Hugging Face folder, with its tokenizer and the form of its prompts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from smolora.data.chat import choose_chat_template, find_turn_end, spell_chat_template
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
GENERATION_FILE = "generation_config.json"
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
        settle_chat_form(folder)


def settle_chat_form(folder: Path) -> None:
    """Let plain transformers prompt a model, and end its answers, by the chat template that it was trained with."""
    fmt = read_prompt_format(folder)
    if fmt is None or fmt.chat_template is None:
        return
    tokenizer = load_tokenizer(folder)
    _settle_template(folder, tokenizer, fmt.chat_template)
    _settle_end_tokens(folder, find_turn_end(tokenizer, fmt.chat_template))


def _settle_end_tokens(folder: Path, turn_end: int | None) -> None:
    """Add the token that ends a turn to those of generation_config.json, which is made where there is none."""
    settings = read_json(folder / GENERATION_FILE)
    if settings is None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        settings = GenerationConfig.from_model_config(config).to_diff_dict()
    own = settings.get("eos_token_id")
    known = own if isinstance(own, list) else [own]
    if turn_end is not None and turn_end not in known:
        settings.pop("_from_model_config", None)  # Else transformers may make it again, by config.json.
        ends = [id for id in (*known, turn_end) if id is not None]
        write_json(folder / GENERATION_FILE, {**settings, "eos_token_id": ends})


def _settle_template(folder: Path, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Make `template` the tokenizer's, and take others of the folder away, from which the model never learned."""
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
