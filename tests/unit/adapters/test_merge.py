from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from smolora.adapters.attach import quiet_peft
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import save_adapter
from smolora.data.chat import PLAIN_CHAT_TEMPLATE
from smolora.data.prompts import PromptFormat, encode_prompt, read_prompt_format, write_prompt_format
from smolora.errors import ConfigError, ModelError, StorageError
from smolora.models.loading import load_model
from smolora.tokenizers.pretrained import load_tokenizer
from tests.tiny import FAMILIES, random_input_ids, save_tiny_encoder, save_tiny_model
from tests.unit.adapters.conftest import attach_moved, change_json, move_all, write_tensors

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def plain_logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(random_input_ids(20)).logits


def peft_logits(base, adapter):
    with quiet_peft():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter)(random_input_ids(20)).logits


def peft_merged(base, adapter):
    with quiet_peft():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_merged(base, adapter, out):
    """Plain transformers on the merged folder computes what plain peft computes on base and adapter."""
    expected = peft_logits(base, adapter)
    assert (expected - plain_logits(base)).abs().max() > 0.1
    # float32 rounding of W x + B A x against (W + B A) x; the logits are up to 10 in size.
    torch.testing.assert_close(plain_logits(out), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_adapter_logits(save_pair, tmp_path, family):
    base, adapter = save_pair(family, r=4, lora_alpha=12)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_peft_adapter_is_merged(save_peft_pair, tmp_path, family):
    base, adapter = save_peft_pair(family, target_modules="all-linear", r=4)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


def test_rslora_and_patterns_of_rank_and_alpha_are_merged(save_peft_pair, tmp_path):
    base, adapter = save_peft_pair(
        target_modules="all-linear",
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"layers.0.mlp.down_proj": 3},
    )
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "mica", "orthogonal", "gaussian"])
def test_an_adapter_is_merged_however_it_began(save_peft_pair, tmp_path, start):
    base, adapter = save_peft_pair(target_modules="all-linear", r=4, init_lora_weights=start)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


EVERY_LINEAR = {"target_modules": "all-linear"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {**EVERY_LINEAR, "bias": "lora_only"}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
        ("gpt2", {**EVERY_LINEAR, "lora_bias": True, "use_rslora": True}),
        ("gpt2", {**EVERY_LINEAR, "lora_bias": True, "bias": "lora_only"}),
        ("phi", {**EVERY_LINEAR, "use_dora": True, "bias": "all"}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_proj"], "init_lora_weights": "pissa", "use_dora": True, "bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}),
        ("gpt2", {"target_modules": [], "target_parameters": ["c_attn.weight"]}),
        ("granitemoe_swa", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True}),
    ],
)
def test_what_a_lora_config_can_train_beside_a_and_b_is_merged_as_peft_does(save_peft_pair, tmp_path, family, settings):
    base, adapter = save_peft_pair(family, r=4, **settings)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    found, expected = load_file(tmp_path / "out/model.safetensors"), peft_merged(base, adapter)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_stacked_in_memory_only_are_merged_in_the_type_and_the_places_of_the_files(
    save_peft_pair, tmp_path, dtype
):
    base, adapter = save_peft_pair("mixtral", base={"dtype": dtype}, **EVERY_LINEAR, alpha_pattern={"down_proj": 3})
    report = merge_adapter(adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, dtype) for name, tensor in before.items()
    }
    assert after["model.norm.weight"].equal(before["model.norm.weight"])
    assert report.max_difference <= report.tolerance < 0.1 * report.adapter_effect
    if dtype == torch.float32:
        assert_merged(base, adapter, tmp_path / "out")


def test_experts_beside_a_head_that_parts_from_its_embedding_are_refused(save_peft_pair, tmp_path):
    base = {"tie_word_embeddings": True}
    _, adapter = save_peft_pair("mixtral", base=base, **EVERY_LINEAR, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"parts lm_head\.weight from the weight that it shares"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_s_base_in_float32_is_not_rounded_to_what_its_config_names(save_classifier, tmp_path):
    base, adapter = save_classifier()
    change_json(base / "config.json", dtype="bfloat16")
    assert merge_adapter(adapter, tmp_path / "out").dtype == "F32"


def test_a_classifier_with_trained_biases_is_merged_with_its_head(tmp_path):
    base = save_tiny_encoder("bert", tmp_path / "base")
    with quiet_peft():
        plain = load_model(base, task="classification", labels=("no", "yes")).model
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all")
        adapted = peft.get_peft_model(plain, config)
        move_all(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.eval()(random_input_ids(6)).logits
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(load_model(tmp_path / "out").model(random_input_ids(6)).logits, expected)


def test_conv1d_is_recognised_in_the_model_and_not_believed_from_the_config(save_pair, tmp_path):
    base, adapter = save_pair("gpt2")  # attn.c_proj is square: only the module says how it is stored.
    change_json(adapter / "adapter_config.json", fan_in_fan_out=False)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_stay_tied(save_pair, tmp_path, family):
    base, adapter = save_pair(family, base={"tie_word_embeddings": True})
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_a_sharded_base_keeps_its_shards(save_pair, tmp_path):
    base, adapter = save_pair(base={"max_shard_size": "40KB"})
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    shards = {file.name for file in base.glob("*.safetensors*")}
    assert len(shards) > 3
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors*")} == shards


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once(save_pair, tmp_path):
    base, adapter = save_pair(base={"dtype": torch.bfloat16}, r=4)
    report = merge_adapter(adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    lora, path = load_file(adapter / "adapter_model.safetensors"), "model.layers.1.mlp.up_proj"
    delta = 4 * lora[f"base_model.model.{path}.lora_B.weight"] @ lora[f"base_model.model.{path}.lora_A.weight"]
    assert torch.equal(after[f"{path}.weight"], (before[f"{path}.weight"].float() + delta).bfloat16())
    assert report.dtype == "BF16"
    assert 0 < report.max_difference <= report.tolerance < report.adapter_effect


def test_float32_files_are_proved_in_float32_whatever_type_the_config_names(save_pair, tmp_path):
    base, adapter = save_pair()
    change_json(base / "config.json", dtype="bfloat16")
    assert merge_adapter(adapter, tmp_path / "out").max_difference < 1e-4


def test_only_the_targets_change(save_pair, tmp_path):
    base, adapter = save_pair(target_modules="attention_only")
    merge_adapter(adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.self_attn.{name}.weight" for layer in range(2) for name in ("q_proj", "v_proj")
    }


def test_these_files_are_left_and_no_others(save_pair, tmp_path):
    base, adapter = save_pair()
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "README.md").write_text("the base's")
    (base / "LICENSE").write_text("MIT")
    merge_adapter(adapter, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == MODEL_FILES | {"LICENSE", "merge_report.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}
    assert len({file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}) == 1


def test_base_and_adapter_are_left_as_they_were(save_pair, tmp_path):
    folders = save_pair()
    before = {file: file.read_bytes() for folder in folders for file in folder.iterdir()}
    merge_adapter(folders[1], tmp_path / "out")
    assert {file: file.read_bytes() for folder in folders for file in folder.iterdir()} == before


def test_the_report_says_what_was_merged(save_pair, tmp_path):
    base, adapter = save_pair()
    report = merge_adapter(adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out/merge_report.json").read_text()) == asdict(report)
    assert (report.num_merged_tensors, report.num_copied_tensors, report.dtype) == (14, 7, "F32")
    assert report.base == str(base)
    assert report.adapter_effect > 0.1
    assert report.compared.startswith("each merged weight on 8 random vectors")
    assert report.max_difference <= report.tolerance == 1e-5


def test_the_adapter_s_prompt_format_goes_along_before_the_base_s(save_pair, tmp_path):
    base, adapter = save_pair()
    of_base, of_adapter = (PromptFormat(kind="text", columns={"text": name}) for name in ("base", "adapter"))
    write_prompt_format(of_base, base)
    merge_adapter(adapter, tmp_path / "one")
    assert read_prompt_format(tmp_path / "one") == of_base
    write_prompt_format(of_adapter, adapter)
    merge_adapter(adapter, tmp_path / "two")
    assert read_prompt_format(tmp_path / "two") == of_adapter


def _give_template(base, kept):
    """Give a base a chat template, in one of the places that transformers reads."""
    if kept == "jinja":
        (base / "chat_template.jinja").write_text("of the base")
    elif kept == "config":
        change_json(base / "tokenizer_config.json", chat_template="of the base")
    elif kept == "named":
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = {"default": "of the base", "tool_use": "tools"}
        tokenizer.save_pretrained(base)


@pytest.mark.parametrize("kept", ["nowhere", "jinja", "config", "named"])
def test_plain_transformers_prompts_a_merged_model_as_it_was_trained(save_pair, tmp_path, kept):
    base, adapter = save_pair()
    _give_template(base, kept)
    fmt = PromptFormat(kind="messages", columns={"messages": "messages"}, chat_template=PLAIN_CHAT_TEMPLATE)
    write_prompt_format(fmt, adapter)
    merge_adapter(adapter, tmp_path / "out")
    talk = [{"role": "user", "content": "The cat?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == encode_prompt(talk, fmt, load_model(base).tokenizer)
    assert (tmp_path / "out/chat_template.jinja").read_text() == tokenizer.chat_template == PLAIN_CHAT_TEMPLATE


@pytest.mark.parametrize("has_settings", [True, False])
def test_a_merged_model_ends_its_answers_where_the_template_of_the_training_ends_a_turn(
    save_pair, tmp_path, has_settings
):
    base, adapter = save_pair()
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(base)
    settings = base / "generation_config.json"
    if has_settings:
        change_json(settings, eos_token_id=0, top_k=7)
    else:
        settings.unlink()
    template = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    write_prompt_format(PromptFormat(kind="messages", columns={"messages": "x"}, chat_template=template), adapter)
    merge_adapter(adapter, tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.top_k == 7) == ([0, len(tokenizer) - 1], has_settings)


def test_named_templates_go_along_where_the_base_s_own_was_trained(save_pair, tmp_path):
    base, adapter = save_pair()
    _give_template(base, "named")
    fmt = PromptFormat(kind="messages", columns={"messages": "messages"}, chat_template="of the base")
    write_prompt_format(fmt, adapter)
    merge_adapter(adapter, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == {"default": "of the base", "tool_use": "tools"}


def test_a_merged_model_can_be_adapted_and_merged_again(save_pair, tmp_path):
    _, adapter = save_pair()
    merge_adapter(adapter, tmp_path / "out")
    assert load_model(tmp_path / "out").model(random_input_ids(4)).logits.isfinite().all()


def test_another_place_of_the_base_can_be_named(save_pair, tmp_path):
    base, adapter = save_pair()
    base.rename(tmp_path / "moved")
    merge_adapter(adapter, tmp_path / "out", base=tmp_path / "moved")
    assert_merged(tmp_path / "moved", adapter, tmp_path / "out")


@pytest.fixture
def save_classifier(tmp_path):
    """Return a function that saves a tiny BERT and a classifier's adapter on it, and returns both folders."""

    def save():
        base = load_model(save_tiny_encoder("bert", tmp_path / "base"), task="classification", labels=("no", "yes"))
        save_adapter(attach_moved(base), tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return save


def test_a_classifier_is_merged_into_another_place_of_its_base(save_classifier, tmp_path):
    base, adapter = save_classifier()
    base.rename(tmp_path / "moved")
    merge_adapter(adapter, tmp_path / "out", base=tmp_path / "moved")
    assert load_model(tmp_path / "out").task == "classification"


class TestRefused:
    """Nothing appears at the final path, and nothing is left beside it."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".tmp-*"))

    def test_another_base_of_the_same_shape(self, save_pair, tmp_path):
        _, adapter = save_pair()
        other = save_tiny_model("llama", tmp_path / "other", seed=1)
        with pytest.raises(ModelError, match="was trained on another base"):
            merge_adapter(adapter, tmp_path / "out", base=other)

    def test_numbers_that_are_not_finite(self, save_pair, tmp_path):
        _, adapter = save_pair()
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
        write_tensors(adapter, tensors)
        with pytest.raises(ModelError, match="holds NaN or infinity"):
            merge_adapter(adapter, tmp_path / "out")

    def test_an_update_that_overflows_the_base_s_type_half_way(self, save_pair, tmp_path):
        _, adapter = save_pair(base={"dtype": torch.float16})
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] *= 1e7
        write_tensors(adapter, tensors)
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight merged holds NaN or infinity"):
            merge_adapter(adapter, tmp_path / "out")

    @pytest.mark.parametrize(
        "setting",
        [
            {"layer_replication": [[0, 2]]},
            {"init_lora_weights": "pissa_niter_4"},
            {"init_lora_weights": "corda", "corda_config": {}},
        ],
    )
    def test_what_is_more_than_plain_lora(self, save_pair, tmp_path, setting):
        _, adapter = save_pair()
        change_json(adapter / "adapter_config.json", **setting)
        with pytest.raises(ModelError, match=next(iter(setting))):
            merge_adapter(adapter, tmp_path / "out")

    def test_repeated_layers_without_a_word_of_peft_s_own_merge_which_is_wrong(self, save_peft_pair, tmp_path):
        _, adapter = save_peft_pair(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
        with pytest.raises(ModelError, match=r"isn't known here\. Keep base and adapter side by side\.$"):
            merge_adapter(adapter, tmp_path / "out")

    @pytest.mark.parametrize("family", ["mamba", "jamba"])
    def test_lora_on_a_weight_that_the_family_reads_past_it(self, save_peft_pair, tmp_path, family):
        _, adapter = save_peft_pair(family, target_modules=["in_proj", "dt_proj"])
        with pytest.raises(ModelError, match="the merged model isn't the adapter's"):
            merge_adapter(adapter, tmp_path / "out")

    def test_tensors_that_are_not_lora_s(self, save_pair, tmp_path):
        _, adapter = save_pair()
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 288)
        write_tensors(adapter, tensors)
        with pytest.raises(ModelError, match=r"1 are not expected .*lora_embedding_A"):
            merge_adapter(adapter, tmp_path / "out")

    def test_an_adapter_that_lacks_the_matrices_of_a_module(self, save_pair, tmp_path):
        _, adapter = save_pair()
        tensors = load_file(adapter / "adapter_model.safetensors")
        for side in "AB":
            del tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"]
        write_tensors(adapter, tensors)
        with pytest.raises(ModelError, match=r"2 tensors are missing .*layers\.1\.mlp\.up_proj"):
            merge_adapter(adapter, tmp_path / "out")

    def test_an_adapter_that_names_no_targets(self, save_pair, tmp_path):
        _, adapter = save_pair()
        change_json(adapter / "adapter_config.json", target_modules=None)
        with pytest.raises(ModelError, match="doesn't hold what its adapter_config.json promises"):
            merge_adapter(adapter, tmp_path / "out")

    def test_a_bias_where_the_base_has_none(self, save_peft_pair, tmp_path):
        _, adapter = save_peft_pair(target_modules=["q_proj"], lora_bias=True)
        with pytest.raises(ModelError, match=r"self_attn\.q_proj \(lora_bias\), which has none in the base"):
            merge_adapter(adapter, tmp_path / "out")

    @pytest.mark.parametrize(
        ("setting", "key"),
        [({"bias": "lora_only"}, ".bias"), ({"trainable_token_indices": [1, 2]}, "trainable_tokens")],
    )
    def test_an_adapter_that_lacks_what_was_trained_beside_its_matrices(self, save_pair, tmp_path, setting, key):
        _, adapter = save_pair("gpt2")
        change_json(adapter / "adapter_config.json", **setting)
        with pytest.raises(ModelError, match=f"tensors are missing .*{key}"):
            merge_adapter(adapter, tmp_path / "out")

    def test_a_quantised_base(self, save_pair, tmp_path):
        base, adapter = save_pair()
        change_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        with pytest.raises(ModelError, match="is quantised"):
            merge_adapter(adapter, tmp_path / "out")

    def test_a_quantised_base_of_a_classifier(self, save_classifier, tmp_path):
        base, adapter = save_classifier()
        change_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
        with pytest.raises(ModelError, match="is quantised, and merging into rounded weights loses the adapter"):
            merge_adapter(adapter, tmp_path / "out")


def test_a_conversion_that_found_nothing_to_name_is_no_obstacle(save_pair, tmp_path):
    _, adapter = save_pair()
    change_json(adapter / "adapter_config.json", target_parameters=[])
    assert merge_adapter(adapter, tmp_path / "out").num_merged_tensors > 0


def test_an_untied_head_is_merged(save_peft_pair, tmp_path):
    base, adapter = save_peft_pair(target_modules=["lm_head", "q_proj"])
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


def test_an_existing_output_is_refused_and_kept(save_pair, tmp_path):
    _, adapter = save_pair()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(ConfigError, match="holds mine already"):
        merge_adapter(adapter, tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "precious"


def test_an_output_that_can_not_be_written_is_refused_before_the_adapter_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write .*out: .*Part of the path is a file"):
        merge_adapter(tmp_path / "missing", tmp_path / "file/out")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_merge_leaves_nothing_at_the_final_path_and_can_be_repeated(save_pair, tmp_path):
    base, adapter = save_pair(base={"max_shard_size": "10KB"})
    child = os.fork()
    if child == 0:
        merge_adapter(adapter, tmp_path / "out")
        os._exit(0)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    assert not list(tmp_path.glob(".tmp-*"))
