"""The door to transformers' tokenizers: load one, turn a trained one into one, and tell two apart."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smolora.errors import ModelError, clause, suggest_path
from smolora.runtime.hub import find_hub_problem
from smolora.tokenizers.byte_level import END_OF_TEXT, ByteLevelTokenizer

logger = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder or hub id. Code that comes with it is never run.

    Raises:
        ModelError: There is no tokenizer, or it needs code of its own.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        _refuse_code(_read_tokenizer_config(folder), folder)
    elif folder.exists() or str(name_or_path).startswith((".", "/", "~")):
        raise ModelError(
            f"{name_or_path} is no folder.{suggest_path(folder)} Name a folder with tokenizer.json in it, or a hub id."
        )
    problem = None if folder.is_dir() else find_hub_problem(str(name_or_path), "model", revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), revision=revision, trust_remote_code=False, local_files_only=problem is not None
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if problem:
            reason = f"no such folder here, and the hub didn't give it: {problem}"
        raise ModelError(
            f"can't load a tokenizer from {name_or_path}: {clause(reason)}. It takes a folder with tokenizer.json and "
            "tokenizer_config.json, or a hub id that can be reached."
        ) from error
    _refuse_code(tokenizer.init_kwargs, name_or_path)
    # Said once of a text longer than the tokenizer's own limit, even where verbose is off: the model's is what counts.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def to_pretrained(tokenizer: ByteLevelTokenizer, context: int) -> PreTrainedTokenizerFast:
    """Wrap a trained tokenizer for transformers: `<|endoftext|>` ends a text, and nothing is added to a text.

    Args:
        tokenizer: A trained CharTokenizer or BPETokenizer.
        context: The model's longest sequence, in tokens.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that decides which ids a text becomes: model, special tokens, chat template."""
    facts: dict[str, object] = {
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "chat_template": tokenizer.chat_template,
        "habit": tokenizer("a")["input_ids"],
    }
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # The state that a padded or truncated call leaves behind is no part of the identity.
        facts["backend"] = {key: value for key, value in backend.items() if key not in {"truncation", "padding"}}
    else:
        facts["vocab"] = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _read_tokenizer_config(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'} can't be read: {error}. Copy the folder again."
        ) from error
    return config if isinstance(config, dict) else {}


def _refuse_code(config: dict[str, object], source: str | Path) -> None:
    if "auto_map" in config:
        raise ModelError(
            f"the tokenizer of {source} asks to run code of its own (auto_map in tokenizer_config.json), which is "
            "never done. Use a tokenizer of a class that transformers has."
        )
