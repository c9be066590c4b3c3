"""JSON Schema of configuration files, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from smolora.config.base import Section


def describe_schema(kind: type[Section]) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a kind of configuration; descriptions are the fields' own."""
    schema = kind.model_json_schema()
    for field in schema["properties"].values():
        if "oneOf" in field:  # An adapter without a method is LoRA's, and other methods' sections fit it too.
            field["anyOf"] = field.pop("oneOf")
    for path in kind.unread:
        section, _, name = path.partition(".")
        field = schema["properties"][section]
        del field["default"][name], schema["$defs"][field["$ref"].rpartition("/")[2]]["properties"][name]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
