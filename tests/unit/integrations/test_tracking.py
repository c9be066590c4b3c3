"""Trackers: each tool really gets the lines of metrics.jsonl, offline, each step once, and never harms a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from smolora.config import EvaluationConfig, ExperimentConfig, ModelConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.errors import ConfigError
from smolora.integrations.trackers import Tracker
from smolora.integrations.tracking import TrackerCallback, WandBCallback, build_trackers, require_trackers
from smolora.recipes.finetune import finetune
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from smolora.training.callback import Callback
from smolora.training.checkpoint import RunIdentity
from smolora.training.trainer import Trainer
from tests.tiny import random_input_ids, tiny_bundle

IDENTITY = RunIdentity(base="b", tokenizer="t", data="d", held_out="h", settings="s")
HAS = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "trackio", "wandb", "mlflow")}


def needs(tool):
    return pytest.mark.skipif(not HAS[tool], reason=f"{tool} isn't installed: pip install 'smolora[{tool}]'")


def examples(count, *, seed):
    return TokenDataset([build_example(random_input_ids(8, seed=seed + n)[0].tolist(), [(0, 8)]) for n in range(count)])


def train(tmp_path, callbacks, *, max_steps=4, resume=False, run_name="run"):
    """Train a tiny model in a folder, from the same start each time."""
    run = RunDir(tmp_path / run_name)
    run.path.mkdir(exist_ok=True)
    trainer = Trainer(
        tiny_bundle("gpt2", tmp_path / "base"),
        examples(4, seed=0),
        TrainingConfig(max_steps=max_steps, logging_steps=1, save_steps=2, per_device_train_batch_size=2, eval_steps=2),
        collate=collate_packed,
        eval_dataset=examples(2, seed=9),
        evaluation=EvaluationConfig(),
        run_dir=run,
        identity=IDENTITY,
        callbacks=callbacks,
    )
    trainer.train(resume=resume)
    return run


class _Remembering(Tracker):
    """A tool that keeps what it gets in a file."""

    tool = "tensorboard"

    def open(self, run):
        self.file = (run.folder / "got.jsonl").open("a")
        self.file.write(json.dumps({"open": run.key, "resumed": run.is_resumed, **run.settings}) + "\n")

    def log(self, step, values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


class _Failing(_Remembering):
    def log(self, step, values):
        if step == 2:
            raise sqlite3.OperationalError("disk I/O error")
        super().log(step, values)


class Remembering(TrackerCallback):
    kind = _Remembering

    def __init__(self):
        self.project, self._feed = "p", None


class Failing(Remembering):
    kind = _Failing


class Stops(Callback):
    """Ends the process's run abruptly after a step."""

    def __init__(self, step):
        self.step = step

    def on_log(self, trainer, record):
        if record.step == self.step:
            raise RuntimeError("killed")


def got(run):
    lines = (run.trackers / "tensorboard" / "got.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_tracker_gets_the_lines_of_the_metrics_and_the_configuration(tmp_path):
    run = train(tmp_path, [Remembering()])
    opened, *lines = got(run)
    assert opened["training.max_steps"] == 4
    logged = [{k: v for k, v in line.items() if v is not None} for line in MetricsLog(run.metrics).read()]
    assert lines == logged
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert "eval_loss" in lines[2]


def test_a_resumed_run_goes_on_in_the_same_tracker_run_with_each_step_once(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, [Remembering(), Stops(3)], max_steps=6)  # The newest checkpoint is of step 2.
    run = train(tmp_path, [Remembering()], max_steps=6, resume=True)
    (
        first,
        *_,
    ) = got(run)
    again = [line for line in got(run) if "open" in line][1]
    assert (again["open"], first["resumed"], again["resumed"]) == (first["open"], False, True)
    assert [line["step"] for line in got(run) if "step" in line] == [0, 1, 2, 3, 4, 5, 6]


def test_a_tracker_named_at_a_resume_gets_the_whole_curve(tmp_path):
    train(tmp_path, [], max_steps=2)
    run = train(tmp_path, [Remembering()], max_steps=4, resume=True)
    assert [line["step"] for line in got(run)[1:]] == [0, 1, 2, 3, 4]


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, [Failing()])
    warnings = [record.getMessage() for record in caplog.records if "gets no more numbers" in record.getMessage()]
    [warning] = warnings
    assert warning.startswith("tensorboard gets no more numbers: OperationalError: disk I/O error. The run goes on")
    assert [line["step"] for line in got(run)[1:]] == [0, 1]
    assert MetricsLog(run.metrics).read()[-1]["step"] == 4


def test_without_a_run_folder_there_is_nothing_to_forward(tmp_path):
    config = TrainingConfig(max_steps=1, per_device_train_batch_size=2)
    trainer = Trainer(
        tiny_bundle("gpt2", tmp_path / "base"),
        examples(4, seed=0),
        config,
        collate=collate_packed,
        callbacks=[Remembering()],
    )
    with pytest.raises(ConfigError, match="Remembering forwards metrics.jsonl: give the Trainer a run_dir"):
        trainer.train()


@pytest.mark.skipif(all(HAS.values()), reason="every tracker is installed")
def test_a_tool_that_isnt_installed_is_refused_with_the_extra_that_brings_it():
    name = next(name for name, has in HAS.items() if not has)
    with pytest.raises(ConfigError, match=rf"{name} isn't installed. Install it with: pip install 'smolora\[{name}\]'"):
        require_trackers([name])


@pytest.mark.skipif(all(HAS.values()), reason="every tracker is installed")
def test_a_run_says_so_before_it_loads_a_model_or_makes_a_folder(tmp_path):
    missing = TrainingConfig(report_to=next(name for name, has in HAS.items() if not has))
    config = ExperimentConfig(model=ModelConfig(name_or_path="no/such-model"), training=missing)
    with pytest.raises(ConfigError, match="isn't installed"):
        finetune(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@needs("wandb")
def test_a_tool_that_a_callback_brings_isnt_added_again():
    assert build_trackers(["wandb"], [WandBCallback()]) == []


def expected(run):
    return {line["step"]: line for line in MetricsLog(run.metrics).read()}


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_written_over_a_resume(tmp_path):
    train(tmp_path, build_trackers(["tensorboard"], []), max_steps=2)
    run = train(tmp_path, build_trackers(["tensorboard"], []), max_steps=4, resume=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.trackers / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert found == pytest.approx({step: expected(run)[step]["loss"] for step in found}, rel=1e-6)
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 2, 4]
    assert "training.max_steps" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_was_written_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train(tmp_path, build_trackers(["mlflow"], []), max_steps=2)
    run = train(tmp_path, build_trackers(["mlflow"], []), max_steps=4, resume=True)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.trackers / 'mlflow' / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'smolora'")
    [found] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {entry.step: entry.value for entry in history} == {n: expected(run)[n]["loss"] for n in (1, 2, 3, 4)}
    assert len(history) == 4
    assert found.data.params["training.max_steps"] == "2"
    assert found.info.status == "FINISHED"


@needs("trackio")
@pytest.mark.filterwarnings("ignore")
def test_trackio_reads_back_what_was_written_over_a_resume(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.unit.integrations.test_tracking import train\n"
        "from smolora.integrations.tracking import build_trackers\n"
        "for steps, resume in ((2, False), (4, True)):\n"
        "    train(Path(sys.argv[1]), build_trackers(['trackio'], []), max_steps=steps, resume=resume)\n"
    )
    # In a process of its own: trackio reads where its place is when it is imported.
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "place"), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment, timeout=120)
    [file] = (tmp_path / "place").glob("*.db")
    with sqlite3.connect(file) as store:
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    lines = expected(RunDir(tmp_path / "run"))
    assert [step for _, step, _ in rows] == [0, 1, 2, 3, 4]
    assert {step: json.loads(text).get("loss") for _, step, text in rows} == {n: lines[n].get("loss") for n in lines}
    assert len({name for name, _, _ in rows}) == 1


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_reads_back_what_was_written_over_a_resume(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    train(tmp_path, [WandBCallback()], max_steps=2)
    run = train(tmp_path, [WandBCallback()], max_steps=4, resume=True)
    import wandb

    wandb.teardown()  # Waits for the process that writes.
    files = sorted((run.trackers / "wandb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2, "an offline run is a file for each time it was open"
    assert len({file.name for file in files}) == 1, "of one id"
    found = [line for file in files for line in read_wandb(file)]
    lines = expected(run)
    assert [line["_step"] for line in found] == [0, 1, 2, 3, 4]
    assert [line.get("loss") for line in found] == [lines[n].get("loss") for n in range(5)]


def read_wandb(file: Path):
    """Yield the history of a .wandb file: LevelDB's log of protobuf records, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # What is left of a block is too short for a record's head.
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # Whole, or the last part.
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted(HAS))
@pytest.mark.filterwarnings("ignore")
def test_no_tool_looks_for_the_network(tool, tmp_path):
    if not HAS[tool]:
        pytest.skip(f"{tool} isn't installed: pip install 'smolora[{tool}]'")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}
    environment |= {"TRACKIO_DIR": str(tmp_path / "place"), "PYTHONWARNINGS": "ignore"}
    made = subprocess.run(
        [sys.executable, "-c", _WATCHED, tool, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.splitlines()[-1] == "[]"


_WATCHED = """
import socket, sys
from pathlib import Path
asked = []
def watch(event, values):
    if event == "socket.getaddrinfo" and values[0] not in ("localhost", "127.0.0.1", "::1", None, ""):
        asked.append(str(values[0]))
    if event == "socket.connect" and isinstance(values[1], tuple) and values[1][0] not in ("127.0.0.1", "::1"):
        asked.append(str(values[1]))
sys.addaudithook(watch)
from tests.unit.integrations.test_tracking import train
from smolora.integrations.tracking import build_trackers
train(Path(sys.argv[2]), build_trackers([sys.argv[1]], []), max_steps=2)
print(asked)
"""
