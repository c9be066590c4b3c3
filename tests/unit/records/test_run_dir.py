"""One writer at a time, and the newest checkpoint is the highest step that is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from smolora.errors import ConfigError, FolderInUseError, ModelError, StorageError
from smolora.records.run_dir import RunDir
from smolora.records.staging import write_manifest

HOLDER = """
import sys, time
from smolora.records.run_dir import RunDir
with RunDir(sys.argv[1]).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def write_checkpoint(run, step):
    folder = run.checkpoint_path(step)
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    write_manifest(folder, {"step": step})


def damage(run, step):
    (run.checkpoint_path(step) / "weights").write_text("X")


def test_a_folder_locked_by_another_process_is_refused_until_it_is_killed(run):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(FolderInUseError, match="another process"), run.locked():
            pass
        holder.send_signal(signal.SIGKILL)
    with run.locked():
        pass


TRIER = """
import sys
from smolora.errors import FolderInUseError
from smolora.records.run_dir import RunDir
try:
    with RunDir(sys.argv[1]).locked():
        print("free")
except FolderInUseError:
    print("in use")
"""


def seen_by_another_process(run):
    command = [sys.executable, "-c", TRIER, str(run.path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_second_run_of_one_process_is_refused(run):
    with run.locked(), pytest.raises(FolderInUseError, match="this process is writing"), RunDir(run.path).locked():
        pass


def test_another_spelling_of_the_folder_is_the_same_folder(run, tmp_path):
    (tmp_path / "link").symlink_to(run.path, target_is_directory=True)
    with run.locked(), pytest.raises(FolderInUseError), RunDir(tmp_path / "link").locked():
        pass


def test_a_refused_second_run_leaves_the_lock_of_the_first(run):
    with run.locked():
        with pytest.raises(FolderInUseError), RunDir(run.path).locked():
            pass
        assert seen_by_another_process(run) == "in use"


def test_the_folder_is_free_for_all_when_the_run_ends(run):
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    assert seen_by_another_process(run) == "free"
    with run.locked():
        pass


def test_a_folder_of_another_process_can_be_had_by_this_one_once_it_is_done(run):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(FolderInUseError, match="another process"), run.locked():
            pass
        with pytest.raises(FolderInUseError, match="another process"), run.locked():
            pass
        holder.kill()


def test_a_forked_child_does_not_inherit_the_lock(run):
    reading, writing = os.pipe()
    with run.locked():
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with run.locked():
            pass
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_a_folder_that_holds_a_run_is_refused(run):
    run.path.mkdir()
    run.resolved_config.write_text("")
    with pytest.raises(ConfigError, match="already holds a run"):
        run.refuse_existing()


def test_a_folder_that_holds_a_run_is_usable_for_going_on_unless_it_is_in_use(run):
    run.path.mkdir()
    run.resolved_config.write_text("")
    run.require_usable(resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        run.require_usable(resume=False)
    with run.locked(), pytest.raises(FolderInUseError):
        run.require_usable(resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("names", [["adapter_checkpoint"], ["report.html"], ["data_report.json", "train.jsonl"]])
def test_a_folder_with_what_a_run_would_overwrite_is_refused_with_its_name(run, names, resume):
    run.path.mkdir()
    for name in names:
        (run.path / name).touch()
    with pytest.raises(ConfigError, match=f"holds {names[0]} already, which a run would overwrite"):
        run.require_usable(resume=resume)


def test_what_an_attempt_leaves_that_failed_before_it_was_a_run_keeps_nobody_out(run):
    with run.locked():
        for name in (".tmp-env.json-99", "env.json", "rejects.jsonl", "data_report.json"):
            (run.path / name).touch()
    run.require_usable(resume=False)


def test_what_a_run_leaves_alone_keeps_nobody_out(run):
    run.path.mkdir()
    for name in (".gitkeep", "slurm.log", "rows.csv"):
        (run.path / name).touch()
    run.require_usable(resume=False)


def test_a_file_in_place_of_the_folder_is_refused(run):
    run.path.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run.refuse_existing()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), RunDir(tmp_path / "file" / "run").locked():
        pass


def test_the_newest_checkpoint_is_the_highest_step(run):
    for step in (9, 1_000_000, 10):
        write_checkpoint(run, step)
    assert run.newest_checkpoint().step == 1_000_000


def test_the_newest_checkpoint_is_one_that_is_whole(run):
    write_checkpoint(run, 1)
    write_checkpoint(run, 2)
    damage(run, 2)
    assert run.newest_checkpoint().step == 1


def test_where_no_checkpoint_is_whole_each_is_named(run):
    for step in (1, 2):
        write_checkpoint(run, step)
        damage(run, step)
    with pytest.raises(
        ModelError, match=r"no whole checkpoint to go on from: step-000002 \(weights .*, step-000001 \("
    ):
        run.newest_checkpoint()


def test_pruning_keeps_the_newest_and_the_protected_one(run):
    for step in range(1, 6):
        write_checkpoint(run, step)
    run.prune_checkpoints(keep=2, protected={1})
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 4, 5]
    assert not list(run.path.glob(".tmp-*"))


def test_leftovers_of_a_killed_writer_are_swept(run):
    (run.path / ".tmp-step-000003-99").mkdir(parents=True)
    (run.path / ".tmp-state.json-99").touch()
    run.sweep_leftovers()
    assert list(run.path.iterdir()) == []


def test_damaged_checkpoints_are_named_and_set_aside_under_a_name_of_their_own(run, caplog):
    write_checkpoint(run, 1)
    for _ in range(2):
        write_checkpoint(run, 2)
        damage(run, 2)
        run.set_aside_damaged(run.newest_checkpoint())
    asides = ["damaged-step-000002", "damaged-step-000002-2"]
    assert sorted(entry.name for entry in run.path.iterdir()) == [*asides, "step-000001"]
    change = "step-000002 is skipped: weights has changed (its SHA-256 differs). It is now"
    assert caplog.messages == [f"{change} {aside}." for aside in asides]
