"""The end of a run in one word: what each kind of run gets, what it is measured on, and what a resume makes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from smolora.adapters.store import load_bundle
from smolora.analysis.summary import generate_summary_report
from smolora.config import ExperimentConfig, resolve_config
from smolora.errors import BrokenRunError, ConfigError, ModelError
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.loading import load_model
from smolora.recipes.finetune import finetune
from smolora.recipes.verdict import expect_seconds
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_folder
from tests.tiny import save_tiny_model

ANSWERS = {"one": "cat", "two": "dog", "three": "log", "four": "mat", "five": "area", "six": "place"}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs():
    """The last number decides."""
    return [
        {"prompt": f"{a} and {b} of {c}", "completion": ANSWERS[c]} for a in ANSWERS for b in ANSWERS for c in ANSWERS
    ]


def config(base, rows, *assignments):
    settings = {
        "model.name_or_path": base,
        "model.dtype": "float32",
        "data.sources": rows,
        "data.validation_fraction": 0.2,
        "training.learning_rate": 1e-2,
        "training.max_steps": 60,
        "training.per_device_train_batch_size": 16,
        "evaluation.verdict_share": 1000,  # However busy the machine is, all rows are measured.
    }
    return resolve_config(
        ExperimentConfig, assignments=[*(f"{name}={value}" for name, value in settings.items()), *assignments]
    )


def read(run):
    return json.loads(RunDir(run.path).verdict.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("verdict") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", pairs())


@pytest.fixture(scope="module")
def learned(tmp_path_factory, base, rows):
    return finetune(config(base, rows), tmp_path_factory.mktemp("runs") / "learned")


def test_a_run_that_learns_is_told_so_with_what_it_stands_on(learned):
    found = read(learned)
    assert found["verdict"] == "learned"
    assert found["loss"]["num_rows"] == 43
    assert found["loss"]["high"] < -3
    assert found["metric"]["name"] == "rougeL"
    assert found["metric"]["low"] > 0.2
    assert found["prompt_use"]["low"] > 0.5
    assert len(found["movement"]["modules"]) == 14
    assert found["overlap"] == {"num_held_out": 43, "rows": 0, "prompts": 0}


def test_the_held_out_losses_are_those_that_the_run_measured(learned):
    lines = [json.loads(line) for line in learned.metrics.read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    found = read(learned)["loss"]
    assert found["base"] == pytest.approx(losses[0], rel=1e-5)
    assert found["tuned"] == pytest.approx(min(losses), rel=1e-5)


def test_five_samples_show_the_answers_of_the_plain_base_and_of_the_saved_adapter(base, learned):
    tuned = load_bundle(learned.path)
    plain = replace(load_model(str(base)), prompt_format=tuned.prompt_format)
    samples = read(learned)["samples"]
    prompts = [sample["prompt"] for sample in samples]
    assert len(samples) == 5
    for name, bundle in (("base", plain), ("tuned", tuned)):
        settings = SamplingSettings(temperature=0.0, max_new_tokens=len(samples[0][name]) + 8)
        answers = TextGenerator(bundle).generate(prompts, settings=settings)
        for answer, sample in zip(answers, samples, strict=True):
            assert answer.startswith(sample[name])


def test_the_report_shows_word_and_samples(learned):
    summary = generate_summary_report(learned.path)
    page = learned.report.read_text()
    assert "Verdict\n- learned: loss is better" in summary
    assert "Answers to held-out rows" in page
    assert "<h3>Verdict</h3>" in page


def test_shuffled_answers_are_not_learned_though_the_loss_falls(tmp_path, base):
    spoiled = pairs()
    answers = [row["completion"] for row in spoiled]
    random.Random(0).shuffle(answers)
    spoiled = [{**row, "completion": answer} for row, answer in zip(spoiled, answers, strict=True)]
    asked = config(
        base, write_rows(tmp_path / "s.jsonl", spoiled), "training.max_steps=30", "evaluation.require=learned"
    )
    with pytest.raises(BrokenRunError, match=r"paired rightly\? The run is kept in"):
        finetune(asked, tmp_path / "run")
    found = read(RunDir(tmp_path / "run"))
    assert found["loss"]["high"] < -2
    assert found["verdict"] in ("no change", "worse")


def test_a_learning_rate_of_zero_is_broken(tmp_path, base, rows):
    with pytest.raises(BrokenRunError, match="did not move") as caught:
        finetune(config(base, rows, "training.learning_rate=0", "training.max_steps=3"), tmp_path / "run")
    assert caught.value.exit_code == 6
    assert read(RunDir(tmp_path / "run"))["verdict"] == "broken"


def test_a_learning_rate_of_ten_is_worse_or_broken(tmp_path, base, rows):
    found = read(finetune(config(base, rows, "training.learning_rate=10", "training.max_steps=10"), tmp_path / "run"))
    assert found["verdict"] in ("worse", "broken")


def test_an_adapter_of_another_base_is_refused_before_anything_is_said_of_the_rows(tmp_path, rows, learned):
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(ModelError) as caught:
        finetune(config(other, rows, f"adapter.path={learned.path}", "data.max_length=2"), tmp_path / "run")
    assert caught.value.exit_code == 4


def test_a_finished_run_resumes_without_measuring_again_and_says_it_in_a_few_lines(learned, base, rows, caplog):
    caplog.set_level("INFO", logger="smolora.recipes.verdict")
    before = learned.verdict.read_bytes()
    finetune(config(base, rows), learned.path, resume=True)
    assert learned.verdict.read_bytes() == before
    assert caplog.messages[0].startswith("verdict: learned: ")
    assert len(caplog.messages) <= 8


def test_a_verdict_that_was_not_finished_is_measured_by_a_resume(learned, base, rows):
    before, adapter = read(learned), hash_folder(learned.adapter)
    learned.verdict.write_text('{"verdict": "broken", "reason": "an earlier attempt"}')
    (learned.path / ".tmp-verdict.json-1").write_text("half")
    finetune(config(base, rows), learned.path, resume=True)
    found = read(learned)
    assert (found["verdict"], found["loss"], found["samples"]) == ("learned", before["loss"], before["samples"])
    assert hash_folder(learned.adapter) == adapter
    assert not list(learned.path.glob(".tmp-*"))


def test_a_required_word_that_is_not_reached_ends_the_run_as_broken_and_keeps_it(tmp_path, base, rows):
    asked = config(base, rows, "training.learning_rate=1e-6", "training.max_steps=2", "evaluation.require=learned")
    with pytest.raises(BrokenRunError, match="the verdict is no change, and evaluation.require=learned"):
        finetune(asked, tmp_path / "run")
    assert read(RunDir(tmp_path / "run"))["verdict"] == "no change"
    assert (tmp_path / "run" / "adapter_checkpoint").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_required_word_without_held_out_rows_is_refused_before_there_is_a_folder(tmp_path, base):
    few = write_rows(tmp_path / "few.jsonl", pairs()[:20])
    with pytest.raises(ConfigError, match="evaluation.require looks at the held-out loss, and no rows are held out"):
        finetune(config(base, few, "evaluation.require=learned"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_time_for_a_verdict_is_none(tmp_path, base, rows):
    run = finetune(config(base, rows, "training.max_steps=2", "evaluation.verdict_share=0"), tmp_path / "run")
    assert not run.verdict.exists()


def test_plain_text_is_continued_from_its_first_words(tmp_path, base):
    texts = [{"text": f"{row['prompt']} is the {row['completion']}"} for row in pairs()]
    found = read(
        finetune(config(base, write_rows(tmp_path / "t.jsonl", texts), "training.max_steps=10"), tmp_path / "run")
    )
    assert found["verdict"] == "learned"
    assert found["metric"] is None
    assert found["prompt_use"] is None
    assert all(len(sample["prompt"].split()) in (3, 4) for sample in found["samples"])
    assert found["overlap"]["prompts"] is None


def converse(row, weight=1):
    asked = {"role": "user", "content": row["prompt"]}
    return {"messages": [asked, {"role": "assistant", "content": row["completion"], "weight": weight}]}


def test_conversations_are_asked_up_to_their_last_answer(tmp_path, base):
    talks = [converse(row) for row in pairs()]
    few = "training.max_steps=3"
    found = read(finetune(config(base, write_rows(tmp_path / "m.jsonl", talks), few), tmp_path / "run"))
    assert found["samples"][0]["prompt"].startswith("user: ")
    assert found["prompt_use"]["num_rows"] == 43


def test_an_answer_that_is_context_alone_is_not_asked_for(tmp_path, base):
    talks = [converse(row, weight=number % 2) for number, row in enumerate(pairs())]
    few = "training.max_steps=3"
    found = read(finetune(config(base, write_rows(tmp_path / "m.jsonl", talks), few), tmp_path / "run"))
    assert 0 < found["prompt_use"]["num_rows"] < 43


def test_a_continued_adapter_is_held_against_the_one_it_started_from(tmp_path, base, rows, learned):
    went_on = config(base, rows, f"adapter.path={learned.path}", "training.max_steps=4", "training.learning_rate=1e-5")
    run = finetune(went_on, tmp_path / "run")
    found, before = read(run), read(learned)
    assert found["loss"]["base"] == pytest.approx(before["loss"]["tuned"], rel=1e-3)
    assert found["verdict"] == "no change"
    assert found["started_from"] == str(learned.path)
    assert f"the adapter of {learned.path}, where the run started" in found["findings"][0]
    assert found["samples"][0]["base"] == before["samples"][0]["tuned"]
    assert before["started_from"] is None


@pytest.mark.parametrize(
    ("seconds", "reached", "run_seconds", "expected"),
    [
        (2.0, 1.0, 1000, 2.0),  # All of it was done; a longer run has nothing to add.
        (2.0, 0.5, 1000, 4.0),
        (2.0, 0.01, 1000, 90.0),  # Nine tenths of a tenth of the run.
        (2.0, 0.0, 1000, 90.0),  # Nobody knows how much there is to ask.
        (9.0, 0.0, 20, 9.0),  # 16 rows are measured in any case.
    ],
)
def test_the_verdict_of_a_longer_run_takes_its_share_unless_less_does(seconds, reached, run_seconds, expected):
    found = {"verdict": "learned", "seconds": seconds, "reached": reached}
    assert expect_seconds(found, 0.1, run_seconds) == pytest.approx(expected)
