"""Runs of encoder-decoders, from rows to text, to a file of its own weights, and to a score."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from smolora.adapters.store import load_bundle
from smolora.config import DataConfig, EvaluationConfig, ExperimentConfig, LoRAConfig, ModelConfig, TrainingConfig
from smolora.config.adapter import FullConfig, IA3Config, PromptTuningConfig, PTuningConfig
from smolora.data.collate import get_data_collator
from smolora.errors import DataError
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.evaluation.row_source import open_data
from smolora.evaluation.tasks import evaluate_model
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.inference.pipeline import InferencePipeline
from smolora.models.packing import can_pack_rows
from smolora.recipes.finetune import encode_data, finetune, load_base, open_tuning, read_rows, show_examples
from smolora.recipes.merge import merge
from smolora.records.staging import hash_folder
from smolora.training.activations import recomputed_activations
from smolora.training.loss import sum_cross_entropy, target_logits_of
from tests.tiny import CONTEXT, ENCODER_DECODERS, EOS_TOKEN, save_tiny_encoder

WORDS = ("good", "fine", "bad", "grim")
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=8)
PROMPTS = ["the good dog 3", "the bad dog 17", "the grim dog 147"]


def write_rows(folder: Path) -> Path:
    rows = [{"dialogue": f"the {WORDS[i % 4]} dog {i}", "summary": f"{WORDS[i % 4]} cat"} for i in range(60)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(tmp_path: Path, family: str = "t5", adapter=None, **training) -> ExperimentConfig:
    base = tmp_path / f"base-{family}"
    if not base.exists():
        save_tiny_encoder(family, base)
    return ExperimentConfig(
        model=ModelConfig(name_or_path=str(base), task_type="seq2seq", dtype="float32"),
        data=DataConfig(sources=(str(write_rows(tmp_path)),), prompt_field="dialogue", completion_field="summary"),
        adapter=adapter or LoRAConfig(r=2),
        training=TrainingConfig(**{"max_steps": 6, "learning_rate": 1e-2, "save_steps": 3, **training}),
        evaluation=EvaluationConfig(verdict_share=0.01),
    )


def read_batch(config: ExperimentConfig, count: int = 5):
    data = encode_data(config, read_rows(config), load_base(config)[0])
    return get_data_collator("padded", "seq2seq")([data.train[index] for index in range(count)])


def read_logits(bundle, batch) -> torch.Tensor:
    with torch.no_grad():
        return target_logits_of(bundle.model, "seq2seq")(bundle.model.eval(), batch)


def ask_plainly(model, batch) -> torch.Tensor:
    """Logits of transformers' own shift of its labels, -100 behind each answer."""
    labels = torch.full_like(batch.answer_ids, -100).flatten()
    labels[batch.target_positions] = batch.targets
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels.view_as(batch.answer_ids),
        )


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def trained(request, tmp_path_factory):
    """A run that has learned to answer, its settings, and its bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    adapter = LoRAConfig(r=8, lora_dropout=0.0)
    config = settings(folder, request.param, adapter, max_steps=100, save_steps=100, learning_rate=1e-2)
    run = finetune(config, folder / "run")
    return run, config, load_bundle(run.path)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_loss_is_that_of_plain_transformers(family, tmp_path):
    config = settings(tmp_path, family)
    batch, bundle = read_batch(config), load_base(config)[0]
    ours = sum_cross_entropy(read_logits(bundle, batch), batch.targets) / batch.num_target_tokens
    torch.testing.assert_close(ours, ask_plainly(bundle.model, batch).loss)  # Float32, summed in another order.


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_what_fills_up_a_row_changes_no_logit(family, tmp_path):
    config = settings(tmp_path, family)
    bundle, batch = load_base(config)[0], read_batch(config, 12)
    logits = read_logits(bundle, batch)
    batch.input_ids[batch.attention_mask == 0] = 7
    is_filler = torch.ones_like(batch.answer_ids, dtype=torch.bool).flatten()
    is_filler[batch.target_positions] = False
    batch.answer_ids[is_filler.view_as(batch.answer_ids)] = 7
    assert (batch.attention_mask == 0).any() and is_filler.any()
    assert torch.equal(read_logits(bundle, batch), logits)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_every_block_and_its_cross_attention_are_targets(family, tmp_path):
    bundle = open_tuning(settings(tmp_path, family)).bundle
    adapted = [name for name, _ in bundle.model.named_parameters() if ".lora_A." in name]
    cross = [name for name in adapted if "EncDecAttention" in name or "encoder_attn" in name]
    assert len([name for name in adapted if ".encoder." in name]) == 2 * 6
    assert len([name for name in adapted if ".decoder." in name]) == 2 * 10 and len(cross) == 2 * 4
    assert not any("lm_head" in name for name in adapted)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_rows_are_never_packed(family, tmp_path):
    is_packable, reason = can_pack_rows(load_base(settings(tmp_path, family))[0].model)
    assert not is_packable and "encoder-decoder" in reason


def test_the_fast_path_is_probed_with_an_answer(trained):
    assert json.loads(trained[0].env.read_text())["fast_path"].startswith("fused LoRA")


@pytest.mark.parametrize("adapter", [IA3Config(), FullConfig()], ids=["ia3", "full"])
def test_other_methods_train_and_are_opened_again(adapter, tmp_path):
    config = settings(tmp_path, adapter=adapter)
    batch, before = read_batch(config), load_base(config)[0]
    bundle = load_bundle(finetune(config, tmp_path / "run").path)
    assert bundle.task == "seq2seq"
    losses = [sum_cross_entropy(read_logits(one, batch), batch.targets) for one in (before, bundle)]
    assert losses[1] < losses[0]


@pytest.fixture(scope="module", params=[("t5", PromptTuningConfig), ("bart", PTuningConfig)], ids=["t5", "bart"])
def prompted(request, tmp_path_factory):
    """A run with virtual tokens, and its settings."""
    family, method = request.param
    folder = tmp_path_factory.mktemp(f"prompted-{family}")
    config = settings(folder, family, method(num_virtual_tokens=4), learning_rate=1e-1)
    return finetune(config, folder / "run"), config


def open_plainly(run, config):
    base = AutoModelForSeq2SeqLM.from_pretrained(config.model.name_or_path)
    return peft.PeftModel.from_pretrained(base, run.adapter).eval()


def test_virtual_tokens_stand_before_the_encoder_alone_and_plain_peft_has_the_same_logits(prompted):
    run, config = prompted
    [tokens] = load_file(run.adapter / "adapter_model.safetensors").values()
    assert len(tokens) == 4
    batch = read_batch(config)
    theirs = ask_plainly(open_plainly(run, config), batch).logits.flatten(0, 1)[batch.target_positions]
    assert torch.equal(read_logits(load_bundle(run.path), batch), theirs)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_behind_virtual_tokens_answers_are_those_of_plain_peft_one_by_one(prompted, num_beams):
    bundle, plain = load_bundle(prompted[0].path), open_plainly(*prompted)
    ours = TextGenerator(bundle).generate(PROMPTS, settings=GREEDY.replace(num_beams=num_beams))
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        asked = bundle.tokenizer([prompt], return_tensors="pt")
        ids = plain.generate(**asked, max_new_tokens=8, do_sample=False, num_beams=num_beams)
        assert bundle.tokenizer.decode(ids[0, 1:], skip_special_tokens=True) == answer


def test_a_verdict_on_virtual_tokens_is_held_against_the_base_without_them(prompted):
    run, config = prompted
    found = json.loads(run.verdict.read_text())
    held_out = encode_data(config, read_rows(config), load_base(config)[0]).held_out
    batch = get_data_collator("padded", "seq2seq")([held_out[index] for index in range(len(held_out))])
    base = sum_cross_entropy(read_logits(load_base(config)[0], batch), batch.targets) / len(batch.targets)
    assert found["loss"]["base"] == pytest.approx(base.item(), rel=1e-4)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_recomputed_activations_give_the_same_gradients(family, tmp_path):
    config = settings(tmp_path, family, LoRAConfig(r=2, lora_dropout=0.0))
    model, batch = open_tuning(config).bundle.model.train(), read_batch(config)
    gradients = []
    for recomputed in (nullcontext(), recomputed_activations(model)):
        model.zero_grad()
        with recomputed:
            sum_cross_entropy(target_logits_of(model, "seq2seq")(model, batch), batch.targets).backward()
        found = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        gradients.append({name: gradient for name, gradient in found if gradient is not None})
    assert gradients[0]
    torch.testing.assert_close(*gradients)


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path):
    config = settings(tmp_path)
    whole = finetune(config, tmp_path / "whole")
    half = tmp_path / "half"
    finetune(config, half)
    for folder in (half / "step-000006", half / "adapter_checkpoint"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = finetune(config, half, resume=True)
    assert hash_folder(resumed.adapter) == hash_folder(whole.adapter)


def test_examples_are_shown_with_the_answer_that_is_learned(tmp_path):
    shown = show_examples(settings(tmp_path))[0]
    assert shown == [(f"the good dog 0{EOS_TOKEN}", False), (" ", False), (f"good cat{EOS_TOKEN}", True)]


def test_plain_peft_opens_the_adapter_with_the_same_logits(trained):
    run, config, bundle = trained
    assert json.loads((run.adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(config.model.name_or_path)
    plain = peft.PeftModel.from_pretrained(base, run.adapter).eval()
    assert isinstance(plain, peft.PeftModelForSeq2SeqLM)
    batch = read_batch(config)
    theirs = ask_plainly(plain, batch).logits.flatten(0, 1)[batch.target_positions]
    assert torch.equal(read_logits(bundle, batch), theirs)


def test_answers_are_what_was_learned_and_batched_as_one_by_one_and_streamed(trained):
    generator = TextGenerator(trained[2])
    answers = generator.generate(PROMPTS, settings=GREEDY)
    assert answers == ["good cat", "bad cat", "grim cat"]
    assert [generator.generate(prompt, settings=GREEDY)[0] for prompt in PROMPTS] == answers
    assert ["".join(generator.stream(prompt, settings=GREEDY)) for prompt in PROMPTS] == answers


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_untrained_model_answers_as_transformers_generates(family, num_beams, tmp_path):
    bundle = load_base(settings(tmp_path, family))[0]
    ours = TextGenerator(bundle).generate(PROMPTS, settings=GREEDY.replace(num_beams=num_beams))
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        asked = bundle.tokenizer([prompt], return_tensors="pt")
        ids = bundle.model.generate(asked["input_ids"], max_new_tokens=8, num_beams=num_beams, do_sample=False)
        assert bundle.tokenizer.decode(ids[0, 1:], skip_special_tokens=True) == answer


def test_a_prompt_may_fill_the_context_and_not_pass_it(tmp_path):
    generator = TextGenerator(load_base(settings(tmp_path, "bart"))[0])
    generator.generate("1" * (CONTEXT - 1), settings=GREEDY)  # And the end token.
    with pytest.raises(DataError, match=f"of {CONTEXT + 1} tokens is too long.*at most {CONTEXT}"):
        generator.generate("1" * CONTEXT, settings=GREEDY)


def test_a_pipeline_summarises(trained):
    assert InferencePipeline(trained[2]).summarise("the fine dog 5") == "fine cat"


def test_an_evaluation_scores_answers_and_references(trained):
    _, config, bundle = trained
    rows = open_data(config.data, trained=bundle.prompt_format, tokenizer=bundle.tokenizer, num_samples=12)
    result = evaluate_model(bundle, rows, batch_size=5, settings=GREEDY)
    assert result.metrics["rougeL"] > 0.9
    pairs = [(f"the {WORDS[i % 4]} dog {i}", f"{WORDS[i % 4]} cat") for i in range(12)]
    losses = []
    for prompt, answer in pairs:
        asked = {name: torch.tensor(bundle.tokenizer([prompt])[name]) for name in ("input_ids", "attention_mask")}
        labels = torch.tensor(bundle.tokenizer([answer])["input_ids"])
        with torch.no_grad():
            losses.append((bundle.model(**asked, labels=labels).loss.item() * labels.numel(), labels.numel()))
    measured = LikelihoodScorer(bundle, batch_size=5).measure(pairs)
    assert [one.num_tokens for one in measured] == [count for _, count in losses]
    assert [one.loss_sum for one in measured] == pytest.approx([loss for loss, _ in losses], rel=1e-4)
    mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert result.metrics["loss"] == pytest.approx(mean, rel=1e-4)


def test_the_verdict_weighs_answers_and_the_use_of_prompts(trained):
    found = json.loads(trained[0].verdict.read_text())
    assert found["verdict"] == "learned"
    assert found["prompt_use"]["other"] > found["prompt_use"]["own"]
    assert not any("measured by its loss" in line for line in found["skipped"])


def test_a_merged_run_has_the_adapters_logits_in_plain_transformers(trained):
    run, config, bundle = trained
    merge(run.path)
    plain, batch = AutoModelForSeq2SeqLM.from_pretrained(run.merged).eval(), read_batch(config)
    theirs = ask_plainly(plain, batch).logits.flatten(0, 1)[batch.target_positions]
    torch.testing.assert_close(read_logits(bundle, batch), theirs, atol=1e-5, rtol=1e-5)
    assert load_bundle(run.merged).task == "seq2seq"
