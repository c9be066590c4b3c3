from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from smolora.data.prompts import PromptFormat, write_prompt_format
from smolora.errors import ModelError
from smolora.models.loading import load_model, quiet_transformers
from smolora.models.weight_files import fingerprint_weights
from tests.tiny import (
    FAMILIES,
    random_input_ids,
    save_tiny_encoder,
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
)


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_opened_as_it_was_saved(tmp_path, family):
    folder = save_tiny_model(family, tmp_path / "base")
    bundle = load_model(folder)
    ids = random_input_ids(8)
    torch.testing.assert_close(bundle.model(ids).logits, tiny_model(family)(ids).logits, atol=0, rtol=0)
    assert bundle.anatomy.family == family
    assert bundle.source == str(folder.resolve())
    assert bundle.fingerprint == fingerprint_weights(folder)
    assert bundle.tokenizer("the cat")["input_ids"] == tiny_tokenizer()("the cat")["input_ids"]
    assert bundle.prompt_format is None
    assert not bundle.model.training


def test_the_type_is_the_file_s_unless_told(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_on_meta_a_model_has_its_shapes_and_no_weights(tmp_path, family):
    folder = save_tiny_model(family, tmp_path / "base")
    whole, shapes = load_model(folder), load_model(folder, device="meta")
    assert {parameter.device.type for parameter in shapes.model.parameters()} == {"meta"}
    assert shapes.anatomy == whole.anatomy
    assert shapes.fingerprint == whole.fingerprint
    found, expected = ({name: p.shape for name, p in bundle.model.named_parameters()} for bundle in (shapes, whole))
    assert found == expected


def test_on_meta_a_missing_tensor_is_refused_too(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
        load_model(folder, device="meta")


def test_sharded_weights_are_opened(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base", max_shard_size="40KB")
    ids = random_input_ids(8)
    assert torch.equal(load_model(folder).model(ids).logits, tiny_model("llama")(ids).logits)


def test_the_prompt_format_of_a_tuned_model_comes_along(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    fmt = PromptFormat(kind="text", columns={"text": "text"})
    write_prompt_format(fmt, folder)
    assert load_model(folder).prompt_format == fmt


def test_opening_draws_no_random_number_and_says_nothing(tmp_path, capfd):
    folder = save_tiny_model("gpt2", tmp_path / "base")
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    state = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    transformers_logging.disable_progress_bar()


def test_threads_open_models_with_tied_weights_at_once(tmp_path):
    folder = save_tiny_model("llama", tmp_path, tie_word_embeddings=True)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: load_model(folder).model, range(12)))
    assert all(model.lm_head.weight is model.get_input_embeddings().weight for model in opened)


def test_transformers_speaks_again_after_the_quiet_block():
    transformers_logging.enable_progress_bar()
    level = transformers_logging.get_verbosity()
    with quiet_transformers():
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == level
    transformers_logging.disable_progress_bar()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_to_run_code_is_refused(tmp_path, name):
    folder = save_tiny_model("llama", tmp_path / "base")
    change_json(folder / name, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="auto_map"):
        load_model(folder)


def test_pickled_weights_are_never_opened(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="only pickled weights") as caught:
        load_model(folder)
    assert caught.value.exit_code == 4


def test_a_missing_tensor_is_refused_instead_of_drawn_at_random(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 tensors of a LlamaForCausalLM, such as model\.layers\.1\.mlp\.up_proj"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        (
            "bert",
            "causal_lm",
            r"a bert model, .* causal .*the default\). .*--task classification or token_classif.* or qa",
        ),
        ("bert", "seq2seq", "a bert model, which can't become a sequence-to-sequence model .*--task classification or"),
        ("t5", "causal_lm", r"--task causal_lm, the default.*with --task seq2seq; or take another base"),
        ("phi", "qa", r"\(--task qa\)\. It can be trained with --task causal_lm or classification or token_class"),
        (
            "llama",
            "qa",
            "lacks 20 tensors of a LlamaForQuestionAnswering.* a LlamaForCausalLM, or incomplete. It can be",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_task_that_a_family_has_no_head_for_is_refused_with_those_it_has(tmp_path, family, task, message, device):
    save = save_tiny_model if family in FAMILIES else save_tiny_encoder
    with pytest.raises(ModelError, match=message):
        load_model(save(family, tmp_path / "base"), task=task, device=device)


def test_an_encoder_with_a_head_for_masked_words_writes_no_text_either(tmp_path):
    folder = save_tiny_encoder("roberta", tmp_path / "base")
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ModelError, match="a roberta model, which can't become a causal language model"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    change_json(folder / "config.json", intermediate_size=40)
    with pytest.raises(ModelError, match="can't be opened as a causal language model"):
        load_model(folder)


def test_a_cut_file_is_refused(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match="it was cut"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "can't be read"), ("[]", "must hold a JSON object"), ("{}", "names no model_type")]
)
def test_a_broken_config_is_refused(tmp_path, text, message):
    folder = save_tiny_model("llama", tmp_path / "base")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_a_model_type_that_nobody_knows_is_refused(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base")
    change_json(folder / "config.json", model_type="adopt")
    with pytest.raises(ModelError, match="can't be opened as a causal language model"):
        load_model(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "../a/b"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match="is no folder"):
        load_model(name)


def test_an_adapter_in_place_of_its_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, and no model. .* --adapter"):
        load_model(tmp_path)


def test_a_folder_with_nothing_but_rejected_rows_says_what_stopped_the_model(tmp_path):
    (tmp_path / "rejects.jsonl").touch()
    with pytest.raises(ModelError, match=r"was stopped by rows that can't be used, listed in rejects\.jsonl. Repair"):
        load_model(tmp_path)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file, not a folder"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(("status", "reason"), [(404, "it has no such model"), (503, "it can't be reached")])
def test_a_hub_id_that_is_not_there_is_asked_for_once_and_is_one_clear_message(hub, status, reason):
    hub.status = status
    with pytest.raises(ModelError, match=f"no folder 'someone/model' here, and the hub didn't give it: {reason}"):
        load_model("someone/model")
    assert hub.requests == ["/api/models/someone/model"]


def test_a_real_model_tells_the_story_it_was_trained_on():
    folder = Path(os.environ.get("SMOLORA_SHARED", Path(__file__).parents[4] / "shared")) / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"the real model is not here: {folder}")
    bundle = load_model(folder)
    assert (bundle.num_parameters, bundle.context, bundle.eos_token_ids) == (260_032, 512, (1, 2))
    ids = torch.tensor([[1]])
    for _ in range(30):
        ids = torch.cat([ids, bundle.model(ids).logits[:, -1:].argmax(-1)], 1)
    text = bundle.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
