"""From text to a Hugging Face folder: what is learned, what is written, what is refused."""

from __future__ import annotations

import json
import random
import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolora.config import PretrainConfig, resolve_config
from smolora.data.encoding import encode_texts
from smolora.errors import BrokenRunError, ConfigError, DataError
from smolora.recipes.pretrain import open_pretraining, pretrain, split_at_lines
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_file
from smolora.tokenizers.bpe import BPETokenizer
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained

SMALL = ["gpt.num_layers=1", "gpt.num_heads=2", "gpt.width=16", "gpt.context=16", "training.max_steps=20"]


@pytest.fixture
def text(tmp_path):
    """A file whose next letter is nearly always certain."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(random.Random(0).choices(["one", "two", "three", "four"], k=800)))
    return file


def config(text, *assignments):
    return resolve_config(
        PretrainConfig, assignments=[f"data.sources={text}", "training.learning_rate=1e-2", *SMALL, *assignments]
    )


def test_what_is_saved_loads_in_plain_transformers_and_has_learned(tmp_path, text):
    folder = pretrain(config(text), tmp_path / "run")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("one two three", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0  # An untrained model gives ln(257) = 5.5.
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_run_folder_holds_its_records(tmp_path, text):
    pretrain(config(text), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert json.loads(run.env.read_text())["versions"]["torch"] == torch.__version__
    assert json.loads(run.data_report.read_text())["read"] == 1
    assert "num_layers: 1" in run.resolved_config.read_text()
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == [0, 1, 4, 8, 10, 12, 16, 20]


def test_a_run_where_one_exists_is_refused(tmp_path, text):
    pretrain(config(text), tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        pretrain(config(text), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.validation_fraction=0.02"], "40 tokens to learn from, none held out: 2 % of them are no longer than"),
        (["data.validation_fraction=0"], "40 tokens to learn from, none held out"),
        (["data.max_validation_rows=0"], "40 tokens to learn from, none held out"),
        (["data.validation_fraction=0.5"], "20 tokens to learn from, 20 held out"),
        (
            ["data.eval_source=short.txt"],
            "40 tokens to learn from, none evaluated: the held-out text is no longer than",
        ),
    ],
)
def test_text_too_short_to_evaluate_on_is_learned_and_one_line_says_so(tmp_path, caplog, monkeypatch, settings, said):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "text.txt").write_text("abcd" * 10)
    pretrain(config("text.txt", "training.max_steps=1", *settings), tmp_path / "run")
    [line] = [message for message in caplog.messages if message.startswith("text: ")]
    assert line.partition(" a window of 16 tokens")[0] == f"text: 1 document, {said}"


def test_a_resumed_run_may_get_more_steps_but_not_another_shape(tmp_path, text):
    pretrain(config(text), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"gpt\.width can't change within a run: it was 16, now 32"):
        pretrain(config(text, "gpt.width=32"), tmp_path / "run", resume=True)
    pretrain(config(text, "training.max_steps=25"), tmp_path / "run", resume=True)
    assert RunDir(tmp_path / "run").newest_checkpoint().step == 25


def test_in_mixed_precision_a_run_learns_as_well_and_says_so(tmp_path, text):
    logs = {}
    for dtype in ("float32", "bfloat16"):
        run = RunDir(pretrain(config(text, f"dtype={dtype}"), tmp_path / dtype).parent)
        logs[dtype] = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert json.loads(run.env.read_text())["dtype"] == dtype
    losses = {dtype: [line["eval_loss"] for line in lines if "eval_loss" in line] for dtype, lines in logs.items()}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)  # They fall by a third.
    weights = load_file(tmp_path / "bfloat16" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    with pytest.raises(ConfigError, match="dtype can't change within a run: it was 'bfloat16', now 'float32'"):
        pretrain(config(text), tmp_path / "bfloat16", resume=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(tmp_path, text, dtype):
    own = [f"dtype={dtype}", "training.lr_scheduler_type=constant"]
    whole = pretrain(config(text, *own), tmp_path / "whole")
    pretrain(config(text, *own, "training.max_steps=11"), tmp_path / "stopped")
    resumed = pretrain(config(text, *own), tmp_path / "stopped", resume=True)
    assert hash_file(resumed / "model.safetensors") == hash_file(whole / "model.safetensors")


def test_a_resume_on_another_text_is_refused(tmp_path, text):
    pretrain(config(text), tmp_path / "run")
    text.write_text(text.read_text().replace("one", "noe"))
    with pytest.raises(DataError, match="other data"):
        pretrain(config(text), tmp_path / "run", resume=True)


def test_a_text_that_is_too_short_leaves_no_folder(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="fewer than one window"):
        pretrain(config(tmp_path / "short.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bpe_tokenizer_is_learned_from_the_text(tmp_path, text, caplog):
    caplog.set_level("INFO")
    folder = pretrain(config(text, "tokenizer.kind=bpe", "tokenizer.vocab_size=270"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert any(line.startswith("learning a tokenizer of up to 270 tokens from 3,") for line in caplog.messages)
    assert len(tokenizer) <= 270
    assert len(tokenizer("three four")["input_ids"]) < len("three four")


def test_the_same_seed_gives_the_same_model_bit_by_bit(tmp_path, text):
    first, second = (pretrain(config(text), tmp_path / name) / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_of_many_texts_ends_each_and_holds_whole_ones_out(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"this is text number {number}, and it ends here.")
    model = pretrain(config(folder, "data.validation_fraction=0.2"), tmp_path / "run")
    assert json.loads((model / "config.json").read_text())["eos_token_id"] is not None
    lines = [json.loads(line) for line in RunDir(tmp_path / "run").metrics.read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def read_pretrained_text(config):
    """Return what a run would learn and what it would hold out, as text."""
    run = open_pretraining(config)
    decode = run.bundle.tokenizer.decode
    return decode(run.train.tokens), decode(run.held_out.tokens)


def test_no_text_of_a_few_ends_where_it_was_cut(tmp_path):
    texts = [f"Poem {number} begins here and goes on. The last words are THE END." for number in range(40)]
    for number, words in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(words)
    learned, held_out = read_pretrained_text(config(tmp_path))
    assert learned.count("THE END.<|endoftext|>") == learned.count("<|endoftext|>") == 38
    assert held_out.count("THE END.<|endoftext|>") == held_out.count("<|endoftext|>") == 2


def test_a_text_in_pieces_has_no_end_between_them(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"book {name}: " + "one two three four " * 40 + "the end")
    learned, _held_out = read_pretrained_text(config(tmp_path, "data.chunk_size=9", "data.deduplicate=false"))
    assert learned.count("<|endoftext|>") == learned.count("the end<|endoftext|>") == 1


def test_of_too_few_texts_the_end_of_the_longest_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("a book: " + "one two three four " * 40 + "the end")
    for name in "bc":
        (tmp_path / f"{name}.txt").write_text(f"note {name}.")
    learned, held_out = read_pretrained_text(config(tmp_path))
    assert learned.startswith("note b.<|endoftext|>note c.<|endoftext|>a book: one")
    assert learned.count("<|endoftext|>") == 2
    assert held_out.endswith("four the end")


@pytest.mark.parametrize(("rate", "has_learned"), [(1e-2, True), (5, False)])
def test_a_run_that_was_to_learn_and_has_not_is_broken_and_kept(tmp_path, text, rate, has_learned):
    asked = config(text, f"training.learning_rate={rate}", "training.max_steps=5", "evaluation.require=learned")
    said = "the held-out loss never fell below its start, and evaluation.require=learned. The run is kept in"
    with nullcontext() if has_learned else pytest.raises(BrokenRunError, match=said):
        pretrain(asked, tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_that_is_to_learn_needs_held_out_text(tmp_path, text):
    with pytest.raises(ConfigError, match="evaluation.require looks at the held-out loss, and no rows are held out"):
        pretrain(config(text, "data.validation_fraction=0", "evaluation.require=learned"), tmp_path / "run")


@pytest.mark.parametrize("bound", [7, 8, 39])
def test_no_more_windows_are_evaluated_than_asked_for(text, bound):
    settings = ["gpt.context=2", "data.validation_fraction=0.05", f"data.max_validation_rows={bound}"]
    run = open_pretraining(config(text, *settings))
    assert bound / 2 < len(run.held_out) <= bound


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (60, "kept                      60  57 to learn from, 3 held out"),
        (3, "kept                       3  3 to learn from, 0 held out\n  held out besides: the end of 1 row"),
    ],
)
def test_the_account_of_the_texts_says_what_is_held_out_and_what_is_dropped(tmp_path, caplog, count, said):
    caplog.set_level("INFO")
    texts = [f"{number} is the number of this text, and it ends here." for number in range(count)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts]))
    open_pretraining(config(tmp_path / "rows.jsonl", "gpt.context=2"))
    assert f"rows read          {2 * count:>9}  from 1 file\n  duplicate        {count:>9}\n{said}" in caplog.messages


def test_held_out_text_that_stands_in_the_text_to_learn_from_is_warned_of(tmp_path, caplog):
    lines = [f"{number} is the number of this line of the text.\n" for number in range(30)]
    (tmp_path / "all.txt").write_text("".join(lines))
    (tmp_path / "end.txt").write_text("".join(lines[-3:]) + "0 is the number of another line in place.\n")
    open_pretraining(config(tmp_path / "all.txt", f"data.eval_source={tmp_path / 'end.txt'}"))
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "75 % of the held-out text is learned too, line by line: a low held-out loss proves little"


def test_so_are_texts_that_were_held_out_beside_near_copies_of_them(tmp_path, caplog):
    for number in range(30):
        text = "".join(f"{number} is the number of text {number}, in line {line}.\n" for line in range(9))
        (tmp_path / f"{number:02}.txt").write_text(text)
        (tmp_path / f"{number:02}-copy.txt").write_text(f"{text}This line alone is new.\n")
    open_pretraining(config(tmp_path))
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.match(r"(9\d|100) % of the held-out text is learned too", warning)


def test_texts_of_two_lengths_are_held_out_whole_and_none_becomes_empty(tmp_path):
    for number in range(45):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02} " + "one two three four " * (1 if number % 3 else 4))
    for seed in range(4):
        run = open_pretraining(config(tmp_path, f"training.seed={seed}"))
        ends = run.bundle.tokenizer.decode(run.train.tokens).split("<|endoftext|>")
        assert "" not in ends[:-1]
        assert (run.report.train + run.report.held_out, run.report.ends_held_out) == (45, 0)
        assert run.report.held_out > 0


_TEXT = (
    "To be, or not to be:\n\nthat is the question.\n  Whether 'tis nobler\n\tin the mind;\r\nto suffer 12 slings\n" * 3
)
_TOKENIZERS = [
    to_pretrained(CharTokenizer.train(_TEXT), 64),
    to_pretrained(BPETokenizer(300).train([_TEXT]), 64),
]


@pytest.mark.parametrize("tokenizer", _TOKENIZERS, ids=["char", "bpe"])
@given(text=st.text(alphabet="ab é\n\t\r'.1", max_size=80) | st.text(max_size=40))
def test_a_text_in_pieces_becomes_the_tokens_of_the_whole(tokenizer, text):
    pieces = split_at_lines(text, length=3)
    assert "".join(pieces) == text
    joined = [token for ids in encode_texts(pieces, tokenizer) for token in ids]
    assert joined == encode_texts([text], tokenizer)[0]
