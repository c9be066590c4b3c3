"""One question to whatever a person names."""

from __future__ import annotations

import pytest

from smolora.adapters.store import open_model
from smolora.errors import DataError, ModelError
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.loading import load_model
from smolora.recipes.generate import generate
from tests.tiny import CONTEXT, save_tiny_model

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("generate") / "base")


def test_the_answer_is_the_generators_without_the_prompt(base):
    assert (
        generate(str(base), "the cat", GREEDY)
        == TextGenerator(load_model(base)).generate("the cat", settings=GREEDY)[0]
    )


def test_the_model_keeps_its_own_number_type_and_is_frozen_in_eval_mode(base):
    bundle = open_model(str(base), device="cpu")
    assert (str(bundle.dtype), bundle.device.type, bundle.model.training) == ("torch.float32", "cpu", False)


def test_a_model_that_isnt_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="is no folder"):
        generate(str(tmp_path / "none"), "the cat")


def test_a_prompt_past_the_context_is_a_data_error(base):
    with pytest.raises(DataError, match="no room"):
        generate(str(base), "\n" * CONTEXT)
