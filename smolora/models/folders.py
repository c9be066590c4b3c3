"""From what a person calls a model to the folder that holds it: a path, or an id of the Hugging Face hub.

Nothing heavy is imported, so a mistaken name is said before torch and transformers have cost their seconds.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from smolora.errors import ModelError
from smolora.runtime.hub import find_hub_problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SETTINGS_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_OTHER_COPIES = ["original/*", "onnx/*", "consolidated*"]


def resolve_model_folder(
    name_or_path: str | Path, *, revision: str | None = None, has_weights: bool = True
) -> Path:
    """Return the local folder of a path or hub id, which is downloaded or taken from the cache.

    Args:
        name_or_path: A folder, or a hub id.
        revision: Branch, tag or commit of a hub id.
        has_weights: Whether the weights are needed, too; without them a model of the hub takes a second.

    Raises:
        ModelError: There is no such folder, and no such model on the hub or no way to reach it, or it has code.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(name):
        kind = "a file, not a folder" if folder.exists() else "no folder"
        raise ModelError(
            f"{name} is {kind}. Name a model folder, a run, or a hub id such as HuggingFaceTB/SmolLM2-135M."
        )
    problem = find_hub_problem(name, "model", revision=revision)
    fetch = partial(
        snapshot_download,
        name,
        revision=revision,
        ignore_patterns=_OTHER_COPIES,
        local_files_only=problem is not None,  # The cache may hold it all the same.
    )
    try:
        settings = Path(fetch(allow_patterns=_SETTINGS_FILES))
        refuse_code(settings)  # Before the gigabytes.
        return Path(fetch(allow_patterns=[*_SETTINGS_FILES, "*.safetensors"])) if has_weights else settings
    except (OSError, ValueError, HfHubHTTPError) as error:
        if isinstance(error, ModelError):
            raise
        reason = problem or (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"no folder '{name}' here, and the hub didn't give it: {reason}. Check the name, or the network."
        ) from error


def refuse_code(folder: Path) -> None:
    """Raise if a config asks to run code that comes with the model.

    Raises:
        ModelError: There is an `auto_map`.
    """
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if "auto_map" in (read_json(folder / name) or {}):
            raise ModelError(
                f"{folder / name} asks to run code of its own (auto_map), which is never done. "
                "Use a model whose type transformers has; if transformers has this one, remove auto_map from your copy."
            )


def read_json(file: Path) -> dict[str, object] | None:
    """Return the object in a file of settings; None where there is no such file.

    Raises:
        ModelError: It can't be read, or holds something else.
    """
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}. Copy or download it again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(values).__name__}.")
    return values
