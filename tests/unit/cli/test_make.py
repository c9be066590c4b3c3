"""prepare, pretrain, train and merge, from the command line to the files they promise."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from tests.tiny import save_tiny_encoder, save_tiny_model

FIELDS = ("--prompt-field", "mr", "--completion-field", "ref")
SHORT = ("--max-steps", 4, "--batch-size", 4, "training.save_steps=2")


@pytest.fixture
def train(smolora, base, rows):
    return lambda out, *more: smolora("train", "--model", base, "--data", rows, *FIELDS, *SHORT, "-o", out, *more)


def test_prepare_writes_both_sides_and_reports_on_stderr(smolora, rows, tmp_path):
    code, out, err = smolora("prepare", rows, "-o", tmp_path / "data", *FIELDS)
    assert (code, out) == (0, "")
    assert "rows read" in err
    sides = [(tmp_path / "data" / f"{side}.jsonl").read_text().splitlines() for side in ("train", "validation")]
    assert (len(sides[0]), len(sides[1])) == (57, 3)
    assert json.loads(sides[0][0]).keys() == {"prompt", "completion"}


def test_prepare_takes_the_task_and_its_columns_as_train_does(smolora, tmp_path):
    (tmp_path / "reviews.csv").write_text("review,stars\nbad,1\nbad,5\n")
    names = ("--text-field", "review", "--label-field", "stars")
    code, _, err = smolora(
        "prepare", tmp_path / "reviews.csv", "-o", tmp_path / "data", "--task", "classification", *names
    )
    assert (code, "2 to learn from" in err) == (0, True)


def test_prepare_of_a_missing_column_is_3_and_lists_the_columns(smolora, rows, tmp_path):
    code, _, err = smolora("prepare", rows, "-o", tmp_path / "data", "--text-field", "txt")
    assert code == 3
    assert "no column 'txt'" in err
    assert "'mr', 'ref'" in err
    assert not (tmp_path / "data").exists()


def test_pretrain_leaves_a_model_that_generate_opens(smolora, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 40)
    shape = ("--layers", 1, "--heads", 2, "--width", 16, "--context", 16)
    run = RunDir(tmp_path / "run")
    code, out, err = smolora("pretrain", "--data", text, "-o", run.path, *shape, "--max-steps", 3, "--batch-size", 2)
    assert (code, out) == (0, "")
    assert (run.model / "model.safetensors").is_file()
    assert "step" in err
    code, out, _ = smolora("generate", run.path, "the", "--greedy", "--max-new-tokens", 4)
    assert code == 0
    assert out.strip("\n")


def test_what_comes_next_is_a_merge_where_the_adapter_can_be_merged(train, tmp_path):
    assert f"next: smolora merge {tmp_path / 'lora'}, or smolora generate" in train(tmp_path / "lora")[2]
    virtual = train(tmp_path / "virtual", "--method", "prompt_tuning", "adapter.num_virtual_tokens=2")
    assert f"next: smolora generate {tmp_path / 'virtual'}" in virtual[2]


def test_what_comes_next_after_a_whole_model_for_questions_is_no_text(smolora, tmp_path):
    row = {"context": "the cat is red", "question": "what is it?", "answers": {"text": ["red"], "answer_start": [11]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    base = ("--model", save_tiny_encoder("bert", tmp_path / "base"), "--data", tmp_path / "rows.jsonl")
    out = tmp_path / "run"
    code, _, err = smolora("train", *base, "--task", "qa", "--method", "full", "--max-steps", 1, "-o", out)
    assert code == 0
    assert err.endswith(f"next: smolora evaluate {out} --data FILE\n")
    assert smolora("evaluate", out, "--data", tmp_path / "rows.jsonl")[0] == 0


def test_train_then_merge_then_generate(smolora, train, tmp_path):
    run = RunDir(tmp_path / "run")
    code, out, err = train(run.path)
    assert (code, out) == (0, "")
    assert "prompt from column 'mr', completion from column 'ref'" in err
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert smolora("merge", run.path)[0] == 0
    answers = [
        smolora("generate", path, "name 3", "--greedy", "--max-new-tokens", 8) for path in (run.path, run.merged)
    ]
    assert answers[0][:2] == answers[1][:2]


def test_quiet_shows_no_line_of_progress(train, tmp_path):
    assert train(tmp_path / "run", "--quiet")[1:] == ("", "")


def test_train_on_an_existing_run_is_refused_with_what_to_do(train, tmp_path):
    train(tmp_path / "run")
    code, _, err = train(tmp_path / "run")
    assert code == 2
    assert "already holds a run. Continue it with --resume, or choose another output folder" in err


def test_resume_alone_goes_on_with_what_the_run_started_with(smolora, train, tmp_path):
    run = RunDir(tmp_path / "run")
    train(run.path)
    code, _, err = smolora("train", "--resume", "-o", run.path, "--max-steps", 6)
    assert code == 0
    assert "resuming with training.max_steps = 6 (was 4)" in err
    assert MetricsLog(run.metrics).read()[-1]["step"] == 6
    assert yaml.safe_load(run.resolved_config.read_text())["training"]["per_device_train_batch_size"] == 4


def test_resume_with_another_rank_is_refused(smolora, train, tmp_path):
    train(tmp_path / "run")
    code, _, err = smolora("train", "--resume", "-o", tmp_path / "run", "--r", 3)
    assert code == 2
    assert "adapter.r can't change within a run" in err


def test_show_prints_what_is_trained_and_writes_nothing(smolora, base, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = smolora("train", "--model", base, "--data", rows, *FIELDS, "--show")
    assert code == 0
    first = next(line for line in out.splitlines() if line.startswith("name"))
    number = first.split()[1].split("[")[0]
    assert first == f"name {number}[[ the cat sat {number}<|endoftext|>]]"
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_isnt_there_is_2_and_leaves_no_folder(train, tmp_path):
    code, _, err = train(tmp_path / "run", "--target", "c_atn")
    assert code == 2
    assert "Did you mean 'c_attn'" in err
    assert not (tmp_path / "run").exists()


def test_columns_that_fit_nothing_are_3_and_are_listed(smolora, base, rows, tmp_path):
    code, _, err = smolora("train", "--model", base, "--data", rows, "-o", tmp_path / "run")
    assert code == 3
    assert "'mr', 'ref'" in err
    assert not (tmp_path / "run").exists()


def test_where_no_row_is_left_the_error_comes_after_the_table(train, tmp_path):
    code, _, err = train(tmp_path / "run", "data.max_length=3", "--overlong", "drop")
    assert code == 3
    *_, table, error = err.splitlines()
    assert table.endswith("57 dropped as too long")
    assert error.startswith("smolora: error: none of the 57 train rows is left")
    assert not (tmp_path / "run").exists()


def test_a_rejected_row_is_3_and_named(smolora, base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "the cat"}) + "\nnot json\n")
    code, _, err = smolora("train", "--model", base, "--data", data, "-o", tmp_path / "run")
    assert code == 3
    assert "rows.jsonl:2" in err
    assert (tmp_path / "run" / "rejects.jsonl").is_file()


def test_a_folder_in_use_is_7(train, tmp_path):
    run = RunDir(tmp_path / "run")
    hold = f"with RunDir({str(run.path)!r}).locked(): print('held', flush=True); input()"
    script = f"from smolora.records.run_dir import RunDir\n{hold}"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()
        code, _, err = train(run.path)
        holder.communicate("\n")
    assert code == 7
    assert "another process is writing in" in err


def test_a_second_run_continues_from_the_adapter_of_the_first(train, tmp_path):
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first.path)
    code, _, _ = train(second.path, "--adapter", first.path, "--lr", 1e-9)
    assert code == 0
    weights = [load_file(run.adapter / "adapter_model.safetensors") for run in (first, second)]
    torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=0)  # A fresh adapter is 0 in half of them.


def test_an_adapter_on_another_base_is_4(smolora, train, rows, tmp_path):
    train(tmp_path / "run")
    other = save_tiny_model("gpt2", tmp_path / "other", seed=1)
    flags = ("--model", other, "--data", rows, *FIELDS, "--adapter", tmp_path / "run")
    code, _, err = smolora("train", *flags, "-o", tmp_path / "second")
    assert code == 4
    assert "Traceback" not in err


def test_an_output_path_that_cant_be_a_folder_is_5(train, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = train(tmp_path / "file" / "run")
    assert code == 5
    assert "can't write" in err


def test_phase_flags_give_the_steps_of_each_phase(train, tmp_path):
    run = RunDir(tmp_path / "run")
    flags = ("--dynamic-lora", "--phase-strategy", "both,mlp,attn", "--phase1-end", 1, "--phase2-end", 3)
    code, _, err = train(run.path, *flags)
    assert code == 0
    assert "phase 2 of 3 from step 2: mlp" in err
    report = json.loads(run.phase_report.read_text())
    assert report["starts"] == [0, 1, 3]
    assert run.checkpoint_path(1).is_dir()
    assert [line["phase"] for line in MetricsLog(run.metrics).read() if "loss" in line] == [1, 2, 2, 3]


def test_a_strategy_of_another_name_is_2(train, tmp_path):
    code, _, err = train(tmp_path / "run", "--phase-strategy", "both,attn")
    assert code == 2
    assert "phases.strategy" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def e2e(tmp_path, rows):
    """A folder with the files of E2E."""
    folder = tmp_path / "e2e"
    folder.mkdir()
    (folder / "trainset.csv").write_text(rows.read_text())
    (folder / "devset.csv").write_text("mr,ref\nname 99,the cat sat 99\n")
    return folder


def test_a_preset_runs_on_the_files_of_its_benchmark(smolora, base, e2e, tmp_path):
    flags = ("--preset", "e2e_dynamic", "--model", base, "--data-dir", e2e, "-o", tmp_path / "run")
    code, _, err = smolora("train", *flags, "--max-steps", 3, "--batch-size", 4, "--r", 2)
    assert code == 0
    assert "1 held out" in err
    config = yaml.safe_load((tmp_path / "run" / "resolved_config.yaml").read_text())
    assert (config["adapter"]["r"], config["adapter"]["lora_alpha"], config["training"]["max_steps"]) == (2, 32, 3)
    assert len(json.loads(RunDir(tmp_path / "run").phase_report.read_text())["phases"]) == 3


def test_a_preset_runs_on_a_file_too(smolora, base, rows, tmp_path):
    flags = ("--preset", "e2e_attention", "--model", base, "--data", rows, "-o", tmp_path / "run")
    assert smolora("train", *flags, "--max-steps", 2)[0] == 0


def test_a_run_from_a_preset_resumes_with_its_own_settings(smolora, base, rows, tmp_path):
    flags = ("--preset", "e2e_attention", "--model", base, "--data", rows, "-o", tmp_path / "run", "--max-steps")
    assert smolora("train", *flags, 2, "--r", 2)[0] == 0
    assert smolora("train", *flags, 3, "--resume")[0] == 0


def test_a_preset_of_another_name_is_2(smolora, base, rows, tmp_path):
    code, _, err = smolora("train", "--preset", "e2e_attn", "--model", base, "--data", rows, "-o", tmp_path / "run")
    assert code == 2
    assert "Did you mean 'e2e_attention'" in err


def test_a_data_dir_without_a_preset_is_2(smolora, base, e2e, tmp_path):
    code, _, err = smolora("train", "--model", base, "--data-dir", e2e, "-o", tmp_path / "run")
    assert code == 2
    assert "give --preset NAME" in err


def test_a_data_dir_without_the_files_is_3(smolora, base, tmp_path):
    flags = ("--preset", "samsum_mlp", "--model", base, "--data-dir", tmp_path, "-o", tmp_path / "run")
    code, _, err = smolora("train", *flags)
    assert code == 3
    assert "has none of train.jsonl" in err


def test_a_benchmark_is_learned_from_by_its_name(smolora, base, tmp_path):
    for name in ("sst2_train.jsonl", "sst2_dev.jsonl"):
        (tmp_path / name).write_text('{"text": "fine", "label": 1}\n{"text": "bad", "label": 0}\n')
    command = ("train", "--model", base, "--dataset", "sst2", "--quiet", "--max-steps", 1)
    code, _, _ = smolora(*command, "--data-dir", tmp_path, "-o", tmp_path / "run")
    assert code == 0
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["train"], report["held_out"]) == (2, 2)
    assert smolora(*command, "-o", tmp_path / "other")[0] == 2
    assert smolora(*command, "--data-dir", tmp_path, "--data", "x.csv", "-o", tmp_path / "other")[0] == 2
