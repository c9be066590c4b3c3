"""Prompts and answers of encoder-decoders as tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import processors

from smolora.config import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.preprocessing import encode_rows, get_preprocessor
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row
from smolora.data.seq2seq import Seq2SeqPreprocessor, encode_answered
from smolora.errors import DataError
from tests.tiny import EOS_TOKEN, tiny_seq2seq_tokenizer, tiny_tokenizer

FORM = PromptFormat(kind="prompt_completion", columns={"prompt": "prompt", "completion": "completion"})


def bart_tokenizer():
    """Begin and end around every text, as BART has it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {EOS_TOKEN}", special_tokens=[("<s>", start), (EOS_TOKEN, 0)]
    )
    return tokenizer


def encode(rows, tokenizer, **data):
    report = DataReport()
    dataset = encode_rows(
        [Row({"prompt": prompt, "completion": completion}, "rows.jsonl", 1) for prompt, completion in rows],
        FORM,
        tokenizer,
        data=DataConfig(**data),
        context=None,
        report=report,
        preprocessor=get_preprocessor("seq2seq", fmt=FORM, tokenizer=tokenizer),
    )
    return dataset, report.encoding("train")


@pytest.mark.parametrize(
    ("make", "around"),
    [(tiny_seq2seq_tokenizer, ("", EOS_TOKEN)), (bart_tokenizer, ("<s>", EOS_TOKEN)), (tiny_tokenizer, ("", ""))],
    ids=["t5", "bart", "no template"],
)
def test_both_sides_are_in_the_tokenizers_template_and_an_answer_always_ends(make, around):
    tokenizer = make()
    [example] = encode_answered([("the cat", "a dog")], tokenizer)
    assert tokenizer.decode(example.input_ids) == f"{around[0]}the cat{around[1]}"
    assert tokenizer.decode(example.labels) == f"{around[0]}a dog{EOS_TOKEN}"
    assert not example.is_target.any() and example.num_target_tokens == len(example.labels)


def test_a_control_token_in_a_text_stays_text():
    [example] = encode_answered([(EOS_TOKEN, EOS_TOKEN)], tiny_seq2seq_tokenizer())
    assert np.count_nonzero(example.input_ids == 0) == np.count_nonzero(example.labels == 0) == 1
    assert len(example.labels) > 2


def test_half_of_a_surrogate_pair_is_refused_on_either_side():
    for pair in (("a\ud800", "b"), ("a", "b\ud800")):
        with pytest.raises(DataError, match="surrogate"):
            encode_answered([pair], tiny_seq2seq_tokenizer())


def test_an_instruction_is_asked_in_its_form():
    form = PromptFormat(kind="instruction", columns={"instruction": "instruction", "output": "output"})
    [example] = Seq2SeqPreprocessor(form, tiny_seq2seq_tokenizer()).encode([{"instruction": "Sum up.", "output": "x"}])
    assert tiny_seq2seq_tokenizer().decode(example.input_ids).startswith("### Instruction:\nSum up.\n\n### Response:")


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_rows_without_a_prompt_and_an_answer_are_refused(kind):
    with pytest.raises(DataError, match="It takes: prompt_completion, instruction"):
        Seq2SeqPreprocessor(PromptFormat(kind=kind, columns={kind: kind}), tiny_seq2seq_tokenizer())


LONG = "12 12 12 12 12 12"


@pytest.mark.parametrize("row", [(LONG, "a"), ("a", LONG)], ids=["prompt", "answer"])
def test_either_side_can_be_too_long(row):
    with pytest.raises(DataError, match="the longest allowed is 6"):
        encode([row], tiny_seq2seq_tokenizer(), max_length=6)
    dataset, counts = encode([row, ("a", "b")], tiny_seq2seq_tokenizer(), max_length=6, overlong="drop")
    assert len(dataset) == counts.dropped_overlong == 1


def test_a_cut_prompt_keeps_the_templates_end_and_loses_no_target():
    dataset, counts = encode([(LONG, "a")], tiny_seq2seq_tokenizer(), max_length=6, overlong="truncate")
    assert len(dataset[0]) == 6 and dataset[0].input_ids[-1] == 0
    assert (counts.truncated, counts.cut_target_tokens) == (1, 0)


def test_a_cut_answer_teaches_no_end_and_its_lost_targets_are_counted():
    whole, _ = encode([("a", LONG)], tiny_seq2seq_tokenizer())
    dataset, counts = encode([("a", LONG)], tiny_seq2seq_tokenizer(), max_length=6, overlong="truncate")
    assert dataset[0].labels.tolist() == whole[0].labels[:6].tolist() and 0 not in dataset[0].labels
    assert counts.cut_target_tokens == len(whole[0].labels) - 6
