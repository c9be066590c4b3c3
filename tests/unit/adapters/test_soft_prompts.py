"""Methods of virtual tokens: nothing of the base changes, and every row is read behind them."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smolora.adapters.attach import attach_adapter, quiet_peft
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import load_adapter, load_bundle, save_adapter
from smolora.adapters.toggling import disabled_adapter
from smolora.config.adapter import METHODS, PrefixTuningConfig
from smolora.data.collate import collate_padded
from smolora.data.token_dataset import build_example
from smolora.errors import ConfigError, ModelError
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.loading import load_model
from smolora.training.loss import target_logits_of
from tests.tiny import CONTEXT, random_input_ids, save_tiny_model, tiny_bundle
from tests.unit.adapters.conftest import write_tensors

ALL = ("prompt_tuning", "p_tuning", "prefix_tuning")
FAMILIES = ("llama", "gpt2", "bloom")
IDS = random_input_ids(9)
V = 5


def attach(bundle, method, **settings):
    adapted = attach_adapter(bundle, METHODS[method](num_virtual_tokens=V, **settings), seed=1)
    adapted.model.eval()
    return adapted


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("method", ALL)
def test_only_the_prompt_is_trained_in_float32_and_the_seed_decides_it(tmp_path, method):
    folder = save_tiny_model("llama", tmp_path, dtype=torch.bfloat16)
    drawn = []
    for seed in (1, 1, 2):
        model = attach_adapter(load_model(folder), METHODS[method](num_virtual_tokens=V), seed=seed).model
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(name.startswith("prompt_encoder.default.") for name in trained)
        assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in trained.values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "settings"), [*((m, {}) for m in ALL), ("prefix_tuning", {"prefix_projection": True})]
)
def test_a_prompt_comes_back_bit_by_bit_here_and_in_plain_peft(tmp_path, family, method, settings):
    base = save_tiny_model(family, tmp_path / "base")
    bundle = attach(load_model(base), method, **settings)
    save_adapter(bundle, tmp_path / "adapter")
    expected = logits_of(bundle.model)
    assert (expected - logits_of(load_model(base).model)).abs().max() > 0.1
    assert torch.equal(logits_of(load_bundle(tmp_path / "adapter").model), expected)
    with quiet_peft():
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(plain), expected)
    with disabled_adapter(bundle):
        assert torch.equal(logits_of(bundle.model), logits_of(load_model(base).model))


@pytest.mark.parametrize("method", ALL)
def test_the_context_is_shorter_by_the_virtual_tokens(tmp_path, method):
    bundle = attach(tiny_bundle("llama", tmp_path / "base"), method)
    assert bundle.context == CONTEXT - V
    save_adapter(bundle, tmp_path / "adapter")
    assert load_bundle(tmp_path / "adapter").context == CONTEXT - V


@pytest.mark.parametrize("method", ALL)
def test_rows_of_a_padded_batch_are_read_as_each_alone(tmp_path, method):
    model = attach(tiny_bundle("llama", tmp_path), method).model
    rows = [random_input_ids(length, seed=length)[0] for length in (9, 4)]
    batch = collate_padded([build_example(row.tolist(), [(1, len(row))]) for row in rows])
    with torch.no_grad():
        found = target_logits_of(model)(model, batch)
    expected = torch.cat([logits_of(model, row[None])[0, :-1] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ALL)
def test_answers_of_a_batch_are_those_of_a_plain_loop(tmp_path, family, method):
    bundle = attach(tiny_bundle(family, tmp_path), method)
    prompts = ["the cat", "the dog sat on the log", "name"]
    settings = SamplingSettings(temperature=0, max_new_tokens=5)
    found = TextGenerator(bundle).generate(prompts, settings=settings)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = bundle.tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(settings.max_new_tokens):
            chosen = logits_of(bundle.model, ids)[:, -1:].argmax(-1)
            if chosen.item() in bundle.eos_token_ids:
                break
            ids = torch.cat((ids, chosen), dim=1)
        assert answer == bundle.tokenizer.decode(ids[0, start:])


@pytest.mark.parametrize("method", ALL)
def test_what_does_not_fit_is_refused_and_so_is_a_merge(tmp_path, method):
    base = save_tiny_model("llama", tmp_path / "base")
    save_adapter(attach(load_model(base), method), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    with pytest.raises(ModelError, match="are no change of weights and can't be merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    whole = load_file(file)["prompt_embeddings"]
    ways = {"this base takes": whole[:-1], "NaN or infinity": whole * float("inf"), "1 tensors are missing": None}
    for said, tensor in ways.items():
        tensors = {"prompts": whole} if tensor is None else {"prompt_embeddings": tensor.contiguous()}
        write_tensors(file.parent, tensors)
        bundle = load_model(base)
        with pytest.raises(ModelError, match=said):
            load_adapter(bundle, tmp_path / "adapter")
        assert torch.equal(logits_of(bundle.model), logits_of(load_model(base).model))


def test_what_made_the_virtual_tokens_is_not_saved_so_it_is_not_trained_further(tmp_path):
    base = save_tiny_model("llama", tmp_path / "base")
    projected = attach_adapter(load_model(base), PrefixTuningConfig(prefix_projection=True), seed=0)
    for number, bundle in enumerate((attach(load_model(base), "p_tuning"), projected)):
        save_adapter(bundle, tmp_path / str(number))
        with pytest.raises(ConfigError, match="the network that made its virtual tokens isn't saved"):
            load_adapter(load_model(base), tmp_path / str(number), trainable=True)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_without_a_network_are_trained_further(tmp_path, method):
    base = save_tiny_model("llama", tmp_path / "base")
    bundle = attach(load_model(base), method)
    save_adapter(bundle, tmp_path / "adapter")
    again = load_adapter(load_model(base), tmp_path / "adapter", trainable=True)
    assert torch.equal(logits_of(again.model), logits_of(bundle.model))
    assert again.num_trainable_parameters == bundle.num_trainable_parameters > 0
