"""From what a person calls a model to the folder that holds it: a path, or an id of the Hugging Face hub.

Nothing heavy is imported, so a mistaken name is said before torch and transformers have cost their seconds.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from smolora.errors import ModelError, clause, suggest_path
from smolora.runtime.hub import find_hub_problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SETTINGS_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_OTHER_COPIES = ["original/*", "onnx/*", "consolidated*"]


def require_model(name_or_path: str | Path, *, revision: str | None = None) -> None:
    """Raise unless there is such a folder, or such a model in the cache or on the hub; nothing is downloaded.

    Raises:
        ModelError: There is none, or no way to tell.
    """
    if find_local_folder(name_or_path) is not None or _is_cached(str(name_or_path), revision):
        return
    if problem := find_hub_problem(str(name_or_path), "model", revision=revision):
        raise _refuse_name(name_or_path, problem)


def resolve_model_folder(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a path or hub id, which is downloaded or taken from the cache.

    Raises:
        ModelError: There is no such folder, and no such model on the hub or no way to reach it.
    """
    folder = find_local_folder(name_or_path)
    if folder is not None:
        return folder
    problem = find_hub_problem(str(name_or_path), "model", revision=revision)
    fetch = partial(
        snapshot_download,
        str(name_or_path),
        revision=revision,
        ignore_patterns=_OTHER_COPIES,
        local_files_only=problem is not None,  # The cache may hold it all the same.
    )
    try:
        refuse_code(Path(fetch(allow_patterns=_SETTINGS_FILES)))  # Before the gigabytes.
        return Path(fetch(allow_patterns=[*_SETTINGS_FILES, "*.safetensors"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        if isinstance(error, ModelError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refuse_name(name_or_path, problem or reason) from error


def find_local_folder(name_or_path: str | Path) -> Path | None:
    """Return the folder of a path; None for what may be an id of the hub.

    Raises:
        ModelError: It is neither.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(name):
        kind = "a file, not a folder" if folder.exists() else "no folder"
        raise ModelError(
            f"{name} is {kind}.{suggest_path(folder)} Name a model folder, a run, or a hub id such as "
            "HuggingFaceTB/SmolLM2-135M."
        )
    return None


def _is_cached(name: str, revision: str | None) -> bool:
    found = (try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "adapter_config.json"))
    return any(isinstance(file, str) for file in found)


def _refuse_name(name: str | Path, reason: str) -> ModelError:
    return ModelError(
        f"no folder '{name}' here, and the hub didn't give it: {clause(reason)}. Check the name, or the network."
        f"{suggest_path(Path(name))}"
    )


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
