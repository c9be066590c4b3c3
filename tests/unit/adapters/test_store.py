from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smolora.adapters.adapter_files import is_same_adapter, read_adapter
from smolora.adapters.attach import attach_adapter, quiet_peft
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import (
    find_adapter,
    follow_adapter,
    load_adapter,
    load_bundle,
    open_model,
    read_on_base,
    save_adapter,
)
from smolora.config import ExperimentConfig
from smolora.config.adapter import METHODS
from smolora.data.prompts import PromptFormat, write_prompt_format
from smolora.errors import ConfigError, ModelError
from smolora.models.loading import load_model
from smolora.records.staging import write_manifest
from tests.tiny import FAMILIES, random_input_ids, save_tiny_encoder, save_tiny_model, tiny_bundle
from tests.unit.adapters.conftest import attach_moved, change_json, write_tensors

# peft 0.21 reads a property that transformers 5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    write_tensors(folder, change(tensors))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_loads_in_plain_peft(tmp_path, family):
    bundle = attach_moved(tiny_bundle(family, tmp_path / "base"))
    save_adapter(bundle, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = random_input_ids(9)
    assert torch.equal(plain(ids).logits, bundle.model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_peft_adapter_loads_here(save_peft_pair, family):
    base, adapter = save_peft_pair(family, target_modules="all-linear", r=4)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    bundle = load_adapter(load_model(base), adapter)
    ids = random_input_ids(9)
    assert torch.equal(bundle.model(ids).logits, plain(ids).logits)
    assert not torch.equal(bundle.model(ids).logits, load_model(base).model(ids).logits)


def test_an_adapter_is_the_same_wherever_its_base_stands(save_pair, tmp_path):
    _, adapter = save_pair()
    other = shutil.copytree(adapter, tmp_path / "other")
    change_json(other / "base_identity.json", relative_source="elsewhere")
    assert is_same_adapter(adapter, other)
    write_tensors(other, {name: tensor + 1 for name, tensor in read_adapter(other).tensors.items()})
    assert not is_same_adapter(adapter, other)


def test_an_adapter_folder_is_these_files_and_others_can_read_them(save_pair):
    _, adapter = save_pair()
    names = {file.name: file.stat().st_mode & 0o777 for file in adapter.iterdir()}
    assert names.keys() == {"adapter_config.json", "adapter_model.safetensors", "base_identity.json"}
    assert len(set(names.values())) == 1


def test_the_prompt_format_is_saved_and_comes_back(tmp_path):
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"})
    base = tiny_bundle("llama", tmp_path / "base")
    save_adapter(replace(attach_moved(base), prompt_format=fmt), tmp_path / "adapter")
    assert load_bundle(tmp_path / "adapter").prompt_format == fmt


def test_the_base_s_prompt_format_holds_where_the_adapter_has_none(save_pair):
    base, adapter = save_pair()
    fmt = PromptFormat(kind="text", columns={"text": "text"})
    write_prompt_format(fmt, base)
    assert load_bundle(adapter).prompt_format == fmt


def test_the_same_adapter_is_written_with_the_same_bytes(tmp_path):
    bundle = attach_moved(tiny_bundle("llama", tmp_path / "base"))
    save_adapter(bundle, tmp_path / "one")
    save_adapter(bundle, tmp_path / "two")
    targets = json.loads((tmp_path / "one/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_frozen_adapter_is_loaded_by_default_and_a_trainable_one_when_asked(save_pair):
    base, adapter = save_pair()
    frozen = load_adapter(load_model(base), adapter)
    assert frozen.num_trainable_parameters == 0
    trained = load_adapter(load_model(base), adapter, trainable=True)
    assert {n for n, p in trained.model.named_parameters() if p.requires_grad} == {
        n for n, _ in trained.model.named_parameters() if ".lora_" in n
    }


def test_a_half_precision_adapter_becomes_float32(save_pair):
    base, adapter = save_pair()
    change_tensors(adapter, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    bundle = load_adapter(load_model(base, dtype=torch.bfloat16), adapter, trainable=True)
    assert {p.dtype for n, p in bundle.model.named_parameters() if ".lora_" in n} == {torch.float32}


def test_loading_draws_no_random_number(save_pair):
    base, adapter = save_pair()
    bundle, state = load_model(base), torch.get_rng_state()
    load_adapter(bundle, adapter)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_on_another_base_of_the_same_shape_is_refused(save_pair, tmp_path):
    _, adapter = save_pair()
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="was trained on another base") as caught:
        load_adapter(load_model(other), adapter)
    assert caught.value.exit_code == 4


def test_a_base_that_changed_on_disk_is_another_base(save_pair, tmp_path):
    base, adapter = save_pair()
    shutil.rmtree(base)
    save_tiny_model("llama", base, seed=1)
    with pytest.raises(ModelError, match="was trained on another base"):
        load_bundle(adapter)


def test_a_plain_peft_adapter_on_a_base_of_another_name_is_taken_on_trust_and_a_line_says_so(
    save_pair, save_peft_pair, tmp_path, caplog
):
    base, adapter = save_peft_pair()
    other = shutil.copytree(base, tmp_path / "other")
    read_on_base(adapter, base)
    read_on_base(adapter, f"{tmp_path / 'moved' / 'base'}/")
    assert not caplog.messages
    read_on_base(adapter, other)
    [message] = caplog.messages
    assert f"names as its base: {base}. Whether {other} holds them can't be checked" in message
    shutil.rmtree(adapter)
    read_on_base(save_pair()[1], other)
    assert len(caplog.messages) == 1


def test_a_plain_peft_adapter_for_another_architecture_is_refused(save_peft_pair, tmp_path):
    _, adapter = save_peft_pair("llama", target_modules="all-linear")
    with pytest.raises(ModelError, match="doesn't fit this base"):
        load_adapter(tiny_bundle("gpt2", tmp_path / "other"), adapter)


def test_a_plain_peft_adapter_of_another_width_is_refused(save_peft_pair, tmp_path):
    _, adapter = save_peft_pair("llama", target_modules="all-linear")
    with pytest.raises(ModelError, match=r"gate_proj\.lora_B\.weight is \[48, 8\], and this base takes \[40, 8\]"):
        load_adapter(tiny_bundle("llama", tmp_path / "other", intermediate_size=40), adapter)


@pytest.mark.parametrize("family", ["llama", "phi"])  # Phi's head has a bias.
def test_an_adapter_on_the_head_brings_the_base_s_own_and_no_other(save_peft_pair, family):
    _, adapter = save_peft_pair(family, base={"tie_word_embeddings": False}, target_modules=["q_proj", "lm_head"])
    tensors, name = load_file(adapter / "adapter_model.safetensors"), "base_model.model.lm_head.base_layer.weight"
    assert name in tensors
    assert "lm_head.lora_A" in " ".join(name for name, _ in load_bundle(adapter).model.named_parameters())
    halved = tensors[name].half()  # As peft writes it beside a base that was opened so.
    save_file({**tensors, name: halved}, adapter / "adapter_model.safetensors")
    load_bundle(adapter, dtype=torch.bfloat16)
    save_file({**tensors, name: tensors[name] + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"brings a lm_head.base_layer.weight that isn't this base's"):
        load_bundle(adapter)


def test_an_adapter_of_a_transformers_that_had_a_module_for_each_expert_opens_and_merges(save_peft_pair, tmp_path):
    base, adapter = save_peft_pair("mixtral", target_modules=["q_proj"], r=4)
    tensors, generator = load_file(adapter / "adapter_model.safetensors"), torch.Generator().manual_seed(0)
    for layer, expert, (name, inputs, outputs) in product(
        range(2), range(2), (("w1", 32, 48), ("w2", 48, 32), ("w3", 32, 48))
    ):
        path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        for side, shape in (("A", (4, inputs)), ("B", (outputs, 4))):
            tensors[f"{path}.lora_{side}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors")
    change_json(adapter / "adapter_config.json", target_modules=["q_proj", "w1", "w2", "w3"], target_parameters=None)
    ids = random_input_ids(9)
    with quiet_peft():
        expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
    assert torch.equal(load_bundle(adapter).model(ids).logits, expected)
    merge_adapter(adapter, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_adapter_that_was_saved_with_the_base_s_embedding_and_head_opens_on_that_base_alone(tmp_path, is_tied):
    base = save_tiny_model("llama", tmp_path / "base", tie_word_embeddings=is_tied)
    with quiet_peft():
        adapted = peft.get_peft_model(load_model(base).model, peft.LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file, name = tmp_path / "adapter/adapter_model.safetensors", "base_model.model.model.embed_tokens.weight"
    tensors = load_file(file)
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    for other in (tensors[name] + 1, torch.cat((tensors[name], tensors[name][:1]))):  # Another base's; a token more.
        save_file({**tensors, name: other}, file)
        with pytest.raises(ModelError, match=r"brings a model\.embed_tokens\.weight that isn't this base's"):
            load_bundle(tmp_path / "adapter")


@pytest.mark.parametrize("setting", [{"bias": "all"}, {"bias": "lora_only"}, {"trainable_token_indices": [1, 5]}])
def test_what_was_trained_beside_lora_s_matrices_is_loaded_with_them(save_peft_pair, setting):
    base, folder = save_peft_pair("gpt2", target_modules=["c_attn"], **setting)
    with quiet_peft():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        expected = peft.PeftModel.from_pretrained(plain, folder)(random_input_ids(8)).logits
    assert torch.equal(load_bundle(folder).model(random_input_ids(8)).logits, expected)


def test_an_adapter_with_biases_of_its_own_is_not_trained_further_and_one_for_a_base_without_any_is(save_peft_pair):
    base, folder = save_peft_pair("gpt2", target_modules=["c_attn"], bias="all")
    with pytest.raises(ConfigError, match="can't be trained further: it has biases of its own for its base"):
        load_adapter(load_model(base), folder, trainable=True)
    base, folder = save_peft_pair("llama", target_modules=["q_proj"], bias="all")
    assert load_adapter(load_model(base), folder, trainable=True)


def test_a_module_that_is_trained_whole_goes_on_in_float32_only(save_peft_pair):
    base, folder = save_peft_pair(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert load_adapter(load_model(base), folder, trainable=True)
    narrow = load_model(base, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"trains lm_head\..* held as torch\.bfloat16 .*Set model\.dtype=float32"):
        load_adapter(narrow, folder, trainable=True)
    assert load_adapter(narrow, folder)


def test_an_adapter_that_repeats_layers_is_not_trained_further(save_peft_pair):
    base, adapter = save_peft_pair(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 1]])
    with pytest.raises(ConfigError, match="can't be trained further: it repeats layers of its base"):
        load_adapter(load_model(base), adapter, trainable=True)


def test_an_adapter_whose_keys_match_nothing_is_refused(save_pair):
    base, adapter = save_pair()
    change_tensors(adapter, lambda tensors: {name.replace("base_model.model.", ""): t for name, t in tensors.items()})
    with pytest.raises(ModelError, match="28 tensors are missing .* 28 are not expected"):
        load_adapter(load_model(base), adapter)


def test_an_adapter_that_lacks_tensors_is_refused_and_the_base_is_as_before(save_pair):
    base, adapter = save_pair()
    change_tensors(adapter, lambda tensors: {name: t for name, t in tensors.items() if ".layers.1." not in name})
    bundle, ids = load_model(base), random_input_ids(8)
    names, before = [name for name, _ in bundle.model.named_parameters()], bundle.model(ids).logits
    with pytest.raises(ModelError, match="14 tensors are missing"):
        load_adapter(bundle, adapter)
    assert [name for name, _ in bundle.model.named_parameters()] == names
    assert torch.equal(bundle.model(ids).logits, before)


def test_half_a_pair_of_matrices_is_refused(save_pair):
    base, adapter = save_pair()
    lonely = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change_tensors(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lonely})
    with pytest.raises(ModelError, match=r"1 tensors are missing .*layers\.0\.mlp\.up_proj\.lora_B"):
        load_adapter(load_model(base), adapter)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(save_pair, number):
    _, adapter = save_pair()

    def spoil(tensors):
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 2] = number
        return tensors

    change_tensors(adapter, spoil)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight holds NaN or infinity"):
        read_adapter(adapter)


def test_a_damaged_file_is_refused(save_pair):
    _, adapter = save_pair()
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ModelError, match="can't be read"):
        read_adapter(adapter)


def test_a_flipped_bit_is_refused_and_a_change_on_purpose_is_not(save_pair):
    _, adapter = save_pair()
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"isn't what was written: .* take \"weights\" out of base_identity\.json"):
        read_adapter(adapter)
    change_json(adapter / "base_identity.json", weights=None)
    assert read_adapter(adapter).tensors.keys() == load_file(file).keys()


def test_a_pickled_adapter_is_never_opened(save_pair):
    _, adapter = save_pair()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="Pickled weights"):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["{", "{}", '{"peft_type": "NONE_SUCH"}'])
def test_a_broken_adapter_config_is_refused(save_pair, text):
    _, adapter = save_pair()
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json can't be read"):
        read_adapter(adapter)


def test_a_method_that_is_not_ours_is_refused(save_pair):
    _, adapter = save_pair()
    (adapter / "adapter_config.json").write_text(json.dumps(peft.LoHaConfig().to_dict()))
    with pytest.raises(ModelError, match="is a LOHA adapter; LORA, ADALORA, IA3"):
        read_adapter(adapter)


def test_a_broken_identity_is_refused(save_pair):
    _, adapter = save_pair()
    (adapter / "base_identity.json").write_text("{}")
    with pytest.raises(ModelError, match=r"base_identity\.json can't be read"):
        read_adapter(adapter)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no adapter"):
        read_adapter(tmp_path)


def test_a_model_without_an_adapter_has_none_to_save(tmp_path):
    with pytest.raises(ConfigError, match="there is no adapter to save"):
        save_adapter(tiny_bundle("llama", tmp_path / "base"), tmp_path / "adapter")


def test_a_base_that_is_gone_is_named(save_pair):
    base, adapter = save_pair()
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"the base of .*adapter isn't there"):
        load_bundle(adapter)


def test_a_base_that_was_moved_with_its_adapter_is_found(save_pair, tmp_path):
    save_pair()
    for name in ("base", "adapter"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert load_bundle(tmp_path / "elsewhere/adapter").source == str((tmp_path / "elsewhere/base").resolve())
    save_tiny_model("llama", tmp_path / "base", seed=1)  # The place that is recorded goes before.
    with pytest.raises(ModelError, match="was trained on another base"):
        load_bundle(tmp_path / "elsewhere/adapter")


def test_another_model_where_a_moved_base_would_be_is_refused(save_pair, tmp_path):
    base, adapter = save_pair()
    shutil.rmtree(base)
    shutil.move(adapter, tmp_path / "elsewhere/adapter")
    save_tiny_model("llama", tmp_path / "elsewhere/base", seed=1)
    with pytest.raises(ModelError, match="was trained on another base"):
        load_bundle(tmp_path / "elsewhere/adapter")


def test_an_adapter_that_names_no_base_is_refused(save_peft_pair):
    _, adapter = save_peft_pair(target_modules="all-linear")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model"):
        load_bundle(adapter)


def test_an_adapter_that_goes_on_names_the_place_where_its_base_is_now(save_pair, tmp_path):
    base, adapter = save_pair()
    moved = base.rename(tmp_path / "moved")
    save_adapter(load_adapter(load_model(moved), adapter, trainable=True), tmp_path / "again")
    assert load_bundle(tmp_path / "again").source == str(moved.resolve())


class TestLoadBundle:
    def test_a_model_folder(self, tmp_path):
        folder = save_tiny_model("llama", tmp_path / "base")
        assert load_bundle(folder, dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_an_adapter_folder_is_opened_on_its_base_from_anywhere(self, save_pair, tmp_path, monkeypatch):
        _, adapter = save_pair()
        monkeypatch.chdir(tmp_path.parent)
        assert isinstance(load_bundle(adapter).model, peft.PeftModel)

    def test_a_pretraining_run_is_its_model(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/resolved_config.yaml").write_text("")
        folder = save_tiny_model("gpt2", tmp_path / "run/model")
        assert load_bundle(tmp_path / "run").source == str(folder.resolve())

    def test_a_tuning_run_is_its_adapter_on_its_base(self, save_pair, tmp_path):
        base, adapter = save_pair()
        (tmp_path / "run").mkdir()
        (tmp_path / "run/resolved_config.yaml").write_text("")
        shutil.copytree(base, tmp_path / "run/final_merged")
        assert not isinstance(load_bundle(tmp_path / "run").model, peft.PeftModel)
        adapter.rename(tmp_path / "run/adapter_checkpoint")
        bundle = load_bundle(tmp_path / "run")
        assert isinstance(bundle.model, peft.PeftModel)
        assert bundle.source == str(base.resolve())

    def test_a_run_that_has_made_nothing_yet_is_refused(self, tmp_path):
        (tmp_path / "resolved_config.yaml").write_text("")
        with pytest.raises(ModelError, match=r"no model or adapter yet. Finish it with --resume\.$"):
            load_bundle(tmp_path)

    def test_a_stopped_run_names_its_last_checkpoint_which_can_be_asked(self, save_pair, tmp_path):
        _, adapter = save_pair()
        (tmp_path / "run").mkdir()
        (tmp_path / "run/resolved_config.yaml").write_text("")
        saved = adapter.rename(tmp_path / "run/step-000002")
        write_manifest(saved, {"step": 2})
        for open_run in (load_bundle, find_adapter):
            with pytest.raises(ModelError, match=f"or name its last checkpoint, which is an adapter: {saved}"):
                open_run(tmp_path / "run")
        assert isinstance(load_bundle(saved).model, peft.PeftModel)


def save_classifier(folder, method="lora"):
    base = load_model(save_tiny_encoder("bert", folder / "base"), task="classification", labels=("no", "yes"))
    save_adapter(attach_adapter(base, METHODS[method](), seed=0), folder / "adapter")
    return {"model": {"name_or_path": str(folder / "base")}, "adapter": {"path": str(folder / "adapter")}}


def test_a_run_that_continues_an_adapter_has_its_task_and_its_method(tmp_path):
    settings = save_classifier(tmp_path, "dora")
    followed = follow_adapter(ExperimentConfig(**settings))
    assert (followed.model.task_type, followed.adapter.method) == ("classification", "dora")
    assert follow_adapter(followed) == followed


def test_a_run_of_another_task_than_the_adapter_it_continues_is_refused(tmp_path):
    settings = save_classifier(tmp_path)
    settings["model"]["task_type"] = "qa"
    with pytest.raises(ConfigError, match="adapter is for classification, and goes on as that; found qa. Leave --task"):
        follow_adapter(ExperimentConfig(**settings))


def test_an_adapter_that_names_no_task_goes_on_as_it_is_asked(tmp_path):
    settings = save_classifier(tmp_path)
    change_json(tmp_path / "adapter" / "adapter_config.json", task_type=None)
    settings["model"]["task_type"] = "classification"
    assert follow_adapter(ExperimentConfig(**settings)).model.task_type == "classification"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_on_a_base_that_is_named_an_adapter_is_asked_its_own_task(tmp_path, family):
    save = save_tiny_encoder if family == "bert" else save_tiny_model
    base = load_model(save(family, tmp_path / "base"), task="classification", labels=("no", "maybe", "yes"))
    fmt = PromptFormat(kind="classification", columns={"text": "text", "label": "label"}, labels=base.labels)
    save_adapter(replace(attach_moved(base), prompt_format=fmt), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    bundle = open_model(tmp_path / "adapter", tmp_path / "moved")
    assert (bundle.task, bundle.labels) == ("classification", ("no", "maybe", "yes"))


@pytest.mark.parametrize("num_labels", [3, 40])
def test_an_adapter_that_names_no_labels_has_as_many_as_its_head_answers(tmp_path, num_labels):
    names = [f"LABEL_{number}" for number in range(num_labels)]
    base = load_model(save_tiny_encoder("distilbert", tmp_path / "base"), task="classification", labels=names)
    save_adapter(attach_moved(base), tmp_path / "adapter")  # Its head has a layer of 32 x 32 before the labels.
    assert load_bundle(tmp_path / "adapter").labels == tuple(names)


def test_a_trained_embedding_is_not_taken_for_the_head(tmp_path):
    base = load_model(save_tiny_model("llama", tmp_path / "base"), task="classification", labels=["a", "b", "c"])
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["embed_tokens", "score"])
    peft.get_peft_model(base.model, lora).save_pretrained(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_trained_tokens_are_not_taken_for_the_head(tmp_path):
    base = load_model(save_tiny_encoder("roberta", tmp_path / "base"), task="classification", labels=["a", "b", "c"])
    tokens = {"word_embeddings": [1, 2]}  # In the files they come behind the head.
    lora = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", trainable_token_indices=tokens)
    with quiet_peft():
        peft.get_peft_model(base.model, lora).save_pretrained(tmp_path / "adapter")
    assert load_bundle(tmp_path / "adapter").labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_run_that_holds_a_model_can_be_named_as_a_base(save_pair, tmp_path):
    base, adapter = save_pair()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/resolved_config.yaml").write_text("")
    base.rename(tmp_path / "run/model")
    assert open_model(adapter, tmp_path / "run").source == str((tmp_path / "run/model").resolve())


def test_an_adapter_that_names_no_task_is_asked_what_its_base_is(tmp_path):
    base = load_model(save_tiny_encoder("t5", tmp_path / "base"))
    peft.get_peft_model(base.model, peft.LoraConfig(target_modules=["q", "v"])).save_pretrained(tmp_path / "adapter")
    assert load_bundle(tmp_path / "adapter").task == "seq2seq"


@pytest.mark.parametrize(("modules", "is_saved"), [(["classifier"], True), (["classifier", "word_embeddings"], False)])
def test_an_embedding_behind_the_head_is_not_taken_for_the_answer(tmp_path, modules, is_saved):
    base = load_model(save_tiny_encoder("roberta", tmp_path / "base"), task="classification", labels=["a", "b", "c"])
    with quiet_peft():
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=modules)
        peft.get_peft_model(base.model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=is_saved)
    assert load_bundle(tmp_path / "adapter").labels == ("LABEL_0", "LABEL_1", "LABEL_2")
