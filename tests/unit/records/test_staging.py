"""Folders and files appear whole or not at all, and a manifest notices every changed byte."""

from __future__ import annotations

import errno
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from smolora.errors import ConfigError, StorageError
from smolora.records.staging import (
    MANIFEST,
    find_damage,
    replaced_folder,
    require_writable,
    retire_folder,
    staged_folder,
    write_json,
    write_manifest,
    write_text,
)
from tests.read_only import run_read_only


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with staged_folder(tmp_path / "out", last="a.txt") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "out", last="a.txt") as folder:
        (folder / "a.txt").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "reason"), [("out", "holds a.txt already"), ("out/a.txt", "is a file")])
def test_a_folder_that_holds_something_and_a_file_are_refused_and_kept(tmp_path, name, reason):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("kept")
    with pytest.raises(ConfigError, match=reason), staged_folder(tmp_path / name, last="a.txt"):
        pass
    assert (tmp_path / "out" / "a.txt").read_text() == "kept"


@pytest.mark.parametrize("way", ["out", "link", "."])
def test_an_empty_folder_is_filled_and_stays_the_one_that_it_was(tmp_path, monkeypatch, way):
    """It may be a mount, which nobody can rename or remove."""
    folder = tmp_path / "out"
    folder.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(folder if way == "." else tmp_path)
    before = folder.stat()
    with staged_folder(Path(way), last="a.txt") as staging:
        (staging / "a.txt").write_text("a")
        (staging / "b").mkdir()
        (staging / "b" / "c.txt").write_text("c")
    assert sorted(entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*")) == [
        "link", "out", "out/a.txt", "out/b", "out/b/c.txt",
    ]  # fmt: skip
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_a_folder_that_is_not_there_yet_leads_to_the_new_one(tmp_path):
    (tmp_path / "link").symlink_to("disk/out")
    with staged_folder(tmp_path / "link", last="a.txt") as staging:
        (staging / "a.txt").write_text("a")
    assert [entry.name for entry in (tmp_path / "disk" / "out").iterdir()] == ["a.txt"]
    assert (tmp_path / "link").is_symlink()


def test_links_that_lead_round_in_a_circle_are_a_storage_error(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(StorageError, match="can't write .*link"), staged_folder(tmp_path / "link", last="a.txt"):
        pass


def test_what_is_rewritten_may_be_there(old):
    with staged_folder(old, last="new.txt", rewritten={old / "old.txt"}) as staging:
        (staging / "old.txt").write_text("older")
        (staging / "new.txt").write_text("new")
        assert (old / "old.txt").read_text() == "old"
    assert {file.name: file.read_text() for file in old.iterdir()} == {"old.txt": "older", "new.txt": "new"}


def test_what_appears_in_an_empty_folder_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ConfigError, match="holds mine already"), staged_folder(folder, last="a.txt") as staging:
        (staging / "a.txt").write_text("a")
        (folder / "mine").write_text("precious")
    assert [entry.name for entry in folder.iterdir()] == ["mine"]


@pytest.fixture
def ended():
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


HERE, ELSEWHERE, HOUR = platform.node(), "another-machine", 3600


@pytest.mark.skipif(os.name != "posix", reason="processes are asked for as POSIX does")
@pytest.mark.parametrize(
    ("name", "machine", "is_alive", "age", "stays"),
    [
        ("out", HERE, False, 0, False),
        ("out", HERE, True, 25 * HOUR, True),
        ("out", ELSEWHERE, False, 23 * HOUR, True),
        ("out", ELSEWHERE, False, 25 * HOUR, False),
        ("out-2", HERE, False, 25 * HOUR, True),
        ("out@2", HERE, False, 25 * HOUR, True),
    ],
)
@pytest.mark.parametrize("place", [".", "out"])
def test_what_a_killed_process_left_is_removed_where_it_surely_has_ended(
    tmp_path, ended, name, machine, is_alive, age, stays, place
):
    (tmp_path / place).mkdir(exist_ok=True)
    leftover = tmp_path / place / f".tmp-{name}@{machine}-{os.getppid() if is_alive else ended}"
    leftover.mkdir()
    (leftover / "a.txt").write_text("half")
    for path in (leftover / "a.txt", leftover):
        os.utime(path, times=(time.time() - age,) * 2)
    with staged_folder(tmp_path / "out", last="a.txt") as staging:
        (staging / "a.txt").write_text("a")
    assert leftover.exists() == stays
    assert (tmp_path / "out" / "a.txt").read_text() == "a"


KILLED_MOVING = """
import os, signal, sys
from pathlib import Path
from smolora.records.staging import staged_folder

moves = int(sys.argv[2])

def die(event, arguments):
    global moves
    if event == "os.rename":
        moves -= 1
        if moves < 0:
            os.kill(os.getpid(), signal.SIGKILL)

with staged_folder(Path(sys.argv[1]), last="b") as staging:
    for name in "abc":
        (staging / name).write_text(name)
    sys.addaudithook(die)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize(("moves", "there"), [(0, ""), (1, "a"), (2, "ac")])
def test_a_kill_while_entries_move_up_leaves_none_that_the_folder_is_known_by(tmp_path, moves, there):
    done = subprocess.run([sys.executable, "-c", KILLED_MOVING, str(tmp_path), str(moves)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")) == list(there)


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"), staged_folder(tmp_path / "file" / "out", last="a.txt"):
        pass


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with staged_folder(tmp_path / "out", last="a.txt") as folder:
            (folder / "a.txt").touch(mode=0o600)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "a.txt").stat().st_mode) == mode


@pytest.fixture
def manifested(tmp_path):
    (tmp_path / "weights").write_bytes(b"0123456789")
    write_manifest(tmp_path, {"step": 1})
    return tmp_path


def test_an_untouched_folder_has_no_damage(manifested):
    assert find_damage(manifested) is None


def test_a_flipped_bit_is_named(manifested):
    (manifested / "weights").write_bytes(b"0123456788")
    assert find_damage(manifested) == "weights has changed (its SHA-256 differs)"


def test_a_missing_file_is_named(manifested):
    (manifested / "weights").unlink()
    assert find_damage(manifested) == "weights is missing"


def test_a_short_file_is_named(manifested):
    (manifested / "weights").write_bytes(b"0")
    assert find_damage(manifested) == "weights has 1 bytes, not 10"


def test_a_missing_manifest_is_damage(manifested):
    (manifested / "MANIFEST.json").unlink()
    assert "MANIFEST.json is missing" in (find_damage(manifested) or "")


def test_json_with_a_number_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(manifested):
    content = (manifested / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (manifested / MANIFEST).write_bytes(flipped)
        assert find_damage(manifested) is not None, f"bit {bit}"


def test_no_torn_manifest_goes_unnoticed(manifested):
    content = (manifested / MANIFEST).read_bytes().rstrip()
    for length in range(len(content)):
        (manifested / MANIFEST).write_bytes(content[:length])
        assert find_damage(manifested) is not None, f"{length} bytes"


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", '{"sha256": null}', "NaN"])
def test_json_that_is_no_manifest_is_damage(manifested, content):
    (manifested / MANIFEST).write_text(content)
    assert find_damage(manifested) is not None


def test_a_disk_that_fills_up_in_the_block_is_a_storage_error_and_leaves_nothing(tmp_path):
    with pytest.raises(StorageError, match="can't write .*out: No space left on device"):
        fill_up(staged_folder(tmp_path / "out", last="a.txt"))
    assert list(tmp_path.iterdir()) == []


def fill_up(folder):
    with folder as staging:
        (staging / "a.txt").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_storage_error_of_the_block_keeps_its_words(tmp_path):
    with pytest.raises(StorageError, match="^my words$"), staged_folder(tmp_path / "out", last="a.txt"):
        raise StorageError("my words")


def test_an_os_error_in_the_words_of_safetensors_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="can't write .*out"), staged_folder(tmp_path / "out", last="a.txt"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_safetensors_stays_one_and_leaves_nothing(tmp_path):
    with pytest.raises(SafetensorError, match="invalid dtype"), staged_folder(tmp_path / "out", last="a.txt"):
        raise SafetensorError("invalid dtype")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def old(tmp_path):
    """A folder with one file in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


def test_a_folder_is_replaced_as_a_whole(old, tmp_path):
    with replaced_folder(old) as staging:
        (staging / "new.txt").write_text("new")
        assert [file.name for file in old.iterdir()] == ["old.txt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in old.iterdir()] == ["new.txt"]


def test_a_link_to_the_old_folder_leads_to_the_new_one(old, tmp_path):
    (tmp_path / "link").symlink_to("out")
    with replaced_folder(tmp_path / "link") as staging:
        (staging / "new.txt").write_text("new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "out"]
    assert [file.name for file in old.iterdir()] == ["new.txt"]


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    with replaced_folder(tmp_path / "out") as staging:
        (staging / "new.txt").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_keeps_the_old_folder(old, tmp_path):
    with pytest.raises(StorageError, match="No space left on device"):
        fill_up(replaced_folder(old))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (old / "old.txt").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from smolora.records.staging import replaced_folder

def die(event, arguments):
    if event == "shutil.rmtree" and Path(arguments[0]).is_dir():
        os.kill(os.getpid(), signal.SIGKILL)

with replaced_folder(Path(sys.argv[1])) as staging:
    (staging / "new.txt").write_text("new")
    sys.addaudithook(die)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_process_that_is_killed_as_it_removes_the_old_folder_leaves_the_new_one(old):
    done = subprocess.run([sys.executable, "-c", KILLED, str(old)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in old.iterdir()] == ["new.txt"]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(old, tmp_path):
    """In a container, a process often has the number of the one before it."""
    for name in (f".tmp-out@{platform.node()}-{os.getpid()}", f".tmp-retired-out-{os.getpid()}"):
        (tmp_path / name / "a").mkdir(parents=True)
    with replaced_folder(old) as staging:
        (staging / "new.txt").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in old.iterdir()] == ["new.txt"]


def test_a_folder_that_can_not_be_set_aside_stays_and_is_a_storage_error(old, tmp_path):
    in_the_way = tmp_path / f".tmp-retired-out-{os.getpid()}"
    in_the_way.write_text("a file, where a folder is to go")
    with pytest.raises(StorageError, match=f"^can't write {old}: Not a directory"), replaced_folder(old):
        pass
    with pytest.raises(StorageError, match=f"^can't write {old}: Not a directory"):
        retire_folder(old)
    assert sorted(tmp_path.iterdir()) == [in_the_way, old]
    assert (old / "old.txt").read_text() == "old"


REFUSED = """
import errno, os, sys
from pathlib import Path
from smolora.records.staging import replaced_folder

final = Path(sys.argv[1])

def refuse(event, arguments):
    if event == "os.rename" and Path(arguments[1]) == final and "-retired-" not in str(arguments[0]):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

sys.addaudithook(refuse)
with replaced_folder(final) as staging:
    (staging / "new.txt").write_text("new")
"""


def test_the_old_folder_is_put_back_where_the_new_one_may_not_take_its_place(old, tmp_path):
    done = subprocess.run([sys.executable, "-c", REFUSED, str(old)], capture_output=True, text=True, check=False)
    assert f"StorageError: can't write {old}: Permission denied" in done.stderr
    assert list(tmp_path.iterdir()) == [old]
    assert (old / "old.txt").read_text() == "old"


def test_a_failed_replacement_names_the_folder_that_the_person_knows(old):
    with pytest.raises(StorageError) as caught:
        fill_up(replaced_folder(old))
    assert ".tmp-" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_folder(old, tmp_path, error):
    with pytest.raises(error), replaced_folder(old):
        raise error
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (old / "old.txt").read_text() == "old"


@pytest.mark.parametrize("way", ["out", "link"])
def test_a_retired_folder_is_gone(old, tmp_path, way):
    (tmp_path / "link").symlink_to("out")
    retire_folder(tmp_path / way)
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_a_text_replaces_the_old_one_and_leaves_nothing_beside_it(old):
    write_text(old / "old.txt", "é")
    assert {file.name: file.read_bytes() for file in old.iterdir()} == {"old.txt": "é".encode()}


def test_a_text_that_cannot_take_its_place_is_a_storage_error_and_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="can't write .*taken"):
        write_text(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.EACCES, "Choose a folder that you may write"),
        (errno.EPERM, "Choose a folder that you may write"),
        (errno.EROFS, "Choose a folder that you may write"),
        (errno.ENOTDIR, "Part of the path is a file"),
        (errno.EIO, "Choose another place"),
    ],
)
def test_the_advice_fits_what_the_system_said(tmp_path, code, advice):
    with (
        pytest.raises(StorageError, match=f"^can't write {tmp_path / 'out'}: {os.strerror(code)}. {advice}"),
        staged_folder(tmp_path / "out", last="a.txt"),
    ):
        raise OSError(code, os.strerror(code))


def test_a_text_that_can_not_be_written_in_the_block_is_said_of_the_folder_asked_for(tmp_path):
    with pytest.raises(StorageError) as caught, staged_folder(tmp_path / "out", last="a.txt") as staging:
        write_text(staging / "no" / "a.txt", "text")
    assert str(caught.value).startswith(f"can't write {tmp_path / 'out'}: ")


def test_a_folder_that_can_be_made_is_writable_and_not_made(tmp_path):
    require_writable(tmp_path)
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"can't write {tmp_path / 'file' / 'a' / 'b'}: Not a directory"):
        require_writable(tmp_path / "file" / "a" / "b")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_read_only_file_system_is_said_to_be_one(tmp_path, capfd):
    assert run_read_only(tmp_path, require_writable, tmp_path) == 1
    said = capfd.readouterr().err
    assert f"can't write {tmp_path}: Read-only file system. Choose a folder that you may write." in said


@pytest.mark.parametrize("mode", [0o500, 0o000])
@pytest.mark.parametrize("below", [".", "run"])
def test_a_folder_without_the_right_to_write_is_said_so(tmp_path, mode, below):
    folder = tmp_path / "mine"
    folder.mkdir()
    folder.chmod(mode)
    if os.access(folder, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(StorageError, match=f"can't write {folder / below}: Permission denied. Choose a folder that"):
        require_writable(folder / below)
    folder.chmod(0o700)
