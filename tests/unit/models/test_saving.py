from __future__ import annotations

from dataclasses import replace

from transformers import AutoModelForCausalLM, AutoTokenizer

from smolora.data.chat import PLAIN_CHAT_TEMPLATE
from smolora.data.prompts import PromptFormat, encode_prompt
from smolora.models.loading import load_model
from smolora.models.saving import save_model
from tests.tiny import tiny_bundle

TALK = [{"role": "user", "content": "The cat?"}]


def test_plain_transformers_prompts_a_saved_model_as_it_was_trained(tmp_path):
    bundle = tiny_bundle("gpt2", tmp_path / "base")
    bundle.tokenizer.chat_template = "of the base"
    fmt = PromptFormat(kind="messages", columns={"messages": "messages"}, chat_template=PLAIN_CHAT_TEMPLATE)
    save_model(replace(bundle, prompt_format=fmt), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == encode_prompt(TALK, fmt, bundle.tokenizer)


def test_an_answer_in_plain_transformers_ends_where_the_template_of_the_training_ends_a_turn(tmp_path):
    bundle = tiny_bundle("gpt2", tmp_path / "base")
    bundle.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    bundle.model.resize_token_embeddings(len(bundle.tokenizer), mean_resizing=False)
    template = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    fmt = PromptFormat(kind="messages", columns={"messages": "messages"}, chat_template=template)
    save_model(replace(bundle, prompt_format=fmt), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.generation_config.eos_token_id == [0, len(bundle.tokenizer) - 1]
    assert load_model(tmp_path / "out").eos_token_ids == (0, len(bundle.tokenizer) - 1)


def test_a_saved_model_that_is_opened_and_saved_again_stays_as_it_is(tmp_path):
    fmt = PromptFormat(kind="messages", columns={"messages": "messages"}, chat_template=PLAIN_CHAT_TEMPLATE)
    save_model(replace(tiny_bundle("gpt2", tmp_path / "base"), prompt_format=fmt), tmp_path / "one")
    save_model(load_model(tmp_path / "one"), tmp_path / "two")
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_model_that_learned_no_conversations_keeps_its_tokenizer_s_template(tmp_path):
    bundle = tiny_bundle("gpt2", tmp_path / "base")
    bundle.tokenizer.chat_template = "of the base"
    save_model(replace(bundle, prompt_format=PromptFormat(kind="text", columns={"text": "text"})), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the base"
