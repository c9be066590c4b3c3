from __future__ import annotations

import pytest

from smolora.errors import ConfigError
from smolora.models.anatomy import build_anatomy
from smolora.models.registry import ModelRegistry
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_target_modules_are_the_linear_layers_of_the_anatomy(family):
    names = {path.rpartition(".")[2] for path in build_anatomy(tiny_model(family)).linear_modules()}
    targets = ModelRegistry.get_target_modules(family)
    assert set(targets) == names
    assert len(targets) == len(names)


def test_a_hyphen_in_a_family_s_name_is_understood():
    assert ModelRegistry.get_target_modules("gpt-neox") == ModelRegistry.get_target_modules("gpt_neox")


@pytest.mark.parametrize("name", ["adopt", "dolphin-phi", "my-llama-7b"])
def test_a_model_s_name_that_holds_a_family_s_is_not_the_family(name):
    with pytest.raises(ConfigError, match=f"no family '{name}' in the registry"):
        ModelRegistry.get_target_modules(name)


def test_advice_is_a_copy():
    ModelRegistry.get_special_config("bloom")["layout"] = "packed"
    assert ModelRegistry.get_special_config("bloom") == {"layout": "padded"}
