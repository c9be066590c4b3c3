"""JSON Schema of configuration files."""

from __future__ import annotations

import pytest

from smolora.config import ExperimentConfig, PrepareConfig, PretrainConfig
from smolora.config.schema import describe_schema

KINDS = [ExperimentConfig, PretrainConfig, PrepareConfig]


def _walk(node):
    yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _walk(child)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_leads_to_a_definition(kind):
    schema = describe_schema(kind)
    references = [node["$ref"] for node in _walk(schema) if isinstance(node, dict) and "$ref" in node]
    assert references
    assert {reference.removeprefix("#/$defs/") for reference in references} <= schema["$defs"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_described_and_unknown_ones_are_refused(kind):
    schema = describe_schema(kind)
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert [name for name, field in section["properties"].items() if not field.get("description")] == []


def test_what_pretraining_does_not_read_is_not_in_it():
    schema = describe_schema(PretrainConfig)
    for section, definition in (("data", "DataConfig"), ("evaluation", "EvaluationConfig")):
        written = {path.partition(".")[2] for path in PretrainConfig.unread if path.startswith(section)}
        assert written
        assert not written & schema["$defs"][definition]["properties"].keys()
        assert schema["$defs"][definition]["properties"].keys() == schema["properties"][section]["default"].keys()


def test_ranges_and_choices_are_part_of_it():
    training = describe_schema(ExperimentConfig)["$defs"]["TrainingConfig"]["properties"]
    assert training["learning_rate"]["minimum"] == 0
    assert "cosine" in training["lr_scheduler_type"]["enum"]


def test_an_adapter_needs_no_method():
    schema = describe_schema(ExperimentConfig)
    assert {"$ref": "#/$defs/LoRAConfig"} in schema["properties"]["adapter"]["anyOf"]
    assert not [node for node in _walk(schema) if isinstance(node, dict) and "oneOf" in node]
    assert not [node for node in _walk(schema) if isinstance(node, dict) and "method" in node.get("required", ())]
