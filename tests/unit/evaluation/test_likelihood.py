"""The loss of answers is that of plain transformers on the row alone, in every form that a model is trained in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smolora.data.chat import PLAIN_CHAT_TEMPLATE
from smolora.data.prompts import PromptFormat, encode_row
from smolora.evaluation import likelihood
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.models.gpt import GPTModel
from tests.tiny import CONTEXT, FAMILIES, LONG_ROPE, tiny_bundle

FORMS = {
    "plain": None,
    "text": PromptFormat(kind="text", columns={"text": "body"}),
    "pairs": PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"}),
    "instruction": PromptFormat(kind="instruction", columns={"instruction": "i", "output": "o"}),
    "messages": PromptFormat(kind="messages", columns={"messages": "m"}, chat_template=PLAIN_CHAT_TEMPLATE),
}
ROWS = {
    "instruction": {"i": "the cat", "o": "sat"},
    "messages": {"m": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]},
}


def expect(bundle, row, fmt):
    example = encode_row(row, fmt, bundle.tokenizer)
    ids = torch.from_numpy(example.input_ids).long()
    labels = torch.where(torch.from_numpy(example.is_target), ids, -100)
    loss = bundle.model(input_ids=ids[None], labels=labels[None]).loss.item()
    return loss * example.num_target_tokens, example.num_target_tokens


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_an_answer_in_each_form(bundle, form):
    fmt = FORMS[form]
    pairs = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})
    row = ROWS.get(form, {"p": "the cat", "c": "sat"})
    expected = expect(bundle, row, fmt if form in ROWS else pairs)
    scorer = LikelihoodScorer(replace(bundle, prompt_format=fmt))
    [found, _] = scorer.measure([("the cat", "sat"), ("name 12: The Eagle", "a longer answer")])
    # float32 sums in another order: 1e-5 of a loss of about 30.
    assert (found.loss_sum, found.num_tokens) == (pytest.approx(expected[0], rel=1e-5), expected[1])


@pytest.mark.parametrize(("family", "changes"), [("opt", {}), ("gpt2", {}), ("phi3", LONG_ROPE)])
def test_answers_of_different_lengths_are_measured_as_each_alone(tmp_path, family, changes):
    bundle = tiny_bundle(family, tmp_path / family, **changes)
    pairs = [("the cat", "sat"), ("name 12: The Eagle", "a longer answer")]
    together = LikelihoodScorer(bundle).measure(pairs)
    alone = [LikelihoodScorer(bundle).measure([pair])[0] for pair in pairs]
    assert [one.loss_sum for one in together] == pytest.approx([one.loss_sum for one in alone], rel=1e-5)


def test_what_is_past_the_context_is_not_measured(bundle):
    [none, some] = LikelihoodScorer(bundle).measure([("\n" * CONTEXT, "sat"), ("\n" * (CONTEXT - 4), "x" * 40)])
    assert (none.num_tokens, some.num_tokens) == (0, 4)


def test_an_answer_knows_whether_it_is_whole(bundle):
    found = LikelihoodScorer(bundle).measure([("the cat", "sat"), ("\n" * (CONTEXT - 4), "x" * 40)])
    assert [one.is_whole for one in found] == [True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_targets_alone_are_computed(tmp_path, family):
    bundle = tiny_bundle(family, tmp_path / family)
    shapes = []
    head = bundle.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, logits: shapes.append(logits.shape))
    found = LikelihoodScorer(bundle).measure([("the cat " * 8, "sat"), ("the dog " * 8, "sat there")])
    assert [shape[:2] for shape in shapes] == [(1, sum(one.num_tokens for one in found))]


def test_a_batch_holds_no_more_logits_than_it_may(bundle, monkeypatch):
    pairs = [(f"name {number}", "yes") for number in range(6)]
    expected = LikelihoodScorer(bundle).measure(pairs)
    num_targets = []
    handle = bundle.model.lm_head.register_forward_hook(lambda _m, _i, logits: num_targets.append(logits.shape[1]))
    monkeypatch.setattr(likelihood, "_MOST_LOGITS", 2 * 8 * len(bundle.tokenizer))
    found = LikelihoodScorer(bundle).measure(pairs)
    handle.remove()
    assert 0 < max(num_targets) <= 2 * 8 < sum(num_targets)
    assert [one.loss_sum for one in found] == pytest.approx([one.loss_sum for one in expected], rel=1e-5)


def test_turns_are_measured_through_the_chat_template(bundle):
    fmt = FORMS["messages"]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    asked = [*turns, {"role": "user", "content": "sure?"}]
    [found] = LikelihoodScorer(replace(bundle, prompt_format=fmt)).measure([(asked, "no")])
    assert found.num_tokens > 0


def test_a_gpt_of_ours_is_measured_as_its_copy_in_transformers(tmp_path):
    gpt2 = tiny_bundle("gpt2", tmp_path / "gpt2", activation_function="gelu")
    ours = replace(gpt2, model=GPTModel.from_pretrained(str(tmp_path / "gpt2")).eval())
    pairs = [("the cat", "sat"), ("name 12: The Eagle", "a longer answer")]
    expected, found = (LikelihoodScorer(bundle).measure(pairs) for bundle in (gpt2, ours))
    assert [one.loss_sum for one in found] == pytest.approx([one.loss_sum for one in expected], rel=1e-5)
