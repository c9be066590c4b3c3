"""Settings that a person wrote as YAML: files, and values behind a key; a key that stands twice is refused.

PyYAML keeps the last of equal keys and says nothing of the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from smolora.errors import ConfigError, suggest_path


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping names a key twice."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys as they are written: when values are made of them, `<<` has put others between them."""
        mapping = super().compose_mapping_node(anchor)
        first: dict[str, yaml.ScalarNode] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (before := first.setdefault(key.value, key)) is not key:
                places = f"at {_name_place(before.start_mark)} and again at {_name_place(key.start_mark)}"
                raise _RepeatedKeyError(f"the key {key.value!r} stands {places}")
        return mapping


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the settings of a file, empty ones left out.

    Raises:
        ConfigError: There is none, it isn't a YAML mapping, or a key stands twice in it.
    """
    if file.is_dir():
        raise ConfigError(
            f"{file} is a folder, not a configuration file. A run in it goes on with -o {file} --resume; "
            "rows are named behind --data."
        )
    if not file.is_file():
        raise ConfigError(f"no configuration file {file}.{suggest_path(file)}")
    try:
        values = _load(file.read_text(encoding="utf-8"))
    except _RepeatedKeyError as error:
        raise ConfigError(f"{file}: {error}. Put what belongs under it in one place.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _refuse_file(file, _locate_mistake(error)) from None
    if not isinstance(values, dict):
        kind = {type(None): "it is empty", str: "it holds text", list: "it holds a list"}.get(type(values))
        raise _refuse_file(file, kind or f"it holds {values!r}")
    return {name: value for name, value in values.items() if value is not None}  # A section may be empty.


def parse_value(assignment: str, text: str) -> Any:
    """Return the value that stands behind `key.path=` in `assignment`.

    Raises:
        ConfigError: It isn't YAML, or a key stands twice in it.
    """
    try:
        return _load(text)  # YAML 1.1 reads 1e-4 as a string; pydantic reads that as the float it is.
    except _RepeatedKeyError as error:
        raise ConfigError(f"'{assignment}': {error}. Give it once.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"'{assignment}': the value can't be read: {_locate_mistake(error)}.") from None


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _refuse_file(file: Path, problem: str) -> ConfigError:
    """Return what to say of a file without settings: it may well be rows."""
    if file.suffix.lower() in (".yaml", ".yml"):
        advice = "A configuration has sections such as 'model:' and 'training:'; smolora init writes one."
    else:
        advice = f"If it holds rows, give it as --data {file}."
    return ConfigError(f"{file} is no configuration file: {problem}. {advice}")


def _locate_mistake(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it isn't UTF-8 text"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        is_plain = error.problem and "<" not in error.problem  # Else it names the parser's own tokens.
        return f"it isn't YAML at {_name_place(error.problem_mark)}" + (f" ({error.problem})" if is_plain else "")
    return "it isn't YAML"


def _name_place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
