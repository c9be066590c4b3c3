"""Names of numbered labels, as `datasets` keeps them: in the features of a dataset, and in the files it saves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from smolora.data.labels import name_label
from smolora.data.rows import Values


def find_label_names(features: object) -> dict[str, Sequence[str]]:
    """Return the names of each column of numbered labels, or of lists of them.

    Args:
        features: What `datasets.Features.to_dict` returns.

    >>> find_label_names({"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "text": {"_type": "Value"}})
    {'label': ['no', 'yes']}
    """
    found = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        inner = feature.get("feature", feature) if isinstance(feature, Mapping) else None
        if isinstance(inner, Mapping) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            found[column] = inner["names"]
    return found


def read_label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    """Return what `find_label_names` does, from the metadata of a Parquet or .arrow file; nothing where it has none."""
    try:
        return find_label_names(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def spell_labels(values: Values, names: Mapping[str, Sequence[str]]) -> Values:
    """Return a row with labels called by their names; numbers without one, such as -1 for no label, stay.

    >>> spell_labels({"label": 1, "n": 1, "tags": [0, -1]}, {"label": ["no", "yes"], "tags": ["O", "PER"]})
    {'label': 'yes', 'n': 1, 'tags': ['O', -1]}
    """
    return {column: _spell(value, names.get(column, ())) for column, value in values.items()} if names else values


def spell_numbers(value: object, numbers: Mapping[str, str]) -> object:
    """Return a label, or each of a list, by the name that its number stands for elsewhere; a name stays.

    >>> spell_numbers("1", {"0": "no", "1": "yes"}), spell_numbers([0, -1, "no"], {"0": "no", "1": "yes"})
    ('yes', ['no', -1, 'no'])
    """
    if isinstance(value, list):
        return [spell_numbers(one, numbers) for one in value]
    return numbers.get(name_label(value) or "", value)


def _spell(value: object, names: Sequence[str]) -> object:
    if names and isinstance(value, list):
        return [_spell(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
