"""Folders and files that appear whole or not at all: written under a hidden name, flushed to disk, then renamed.

A folder may carry a MANIFEST.json with the size and SHA-256 of each file; `find_damage` reads it back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from safetensors import SafetensorError

from smolora.errors import ConfigError, StorageError

MANIFEST = "MANIFEST.json"
_DIGEST = "sha256"
_CHUNK = 1 << 20

_ABANDONED = 86_400
"""Seconds without a change after which what another machine is writing is taken for left behind."""

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space, or choose another place."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a folder that you may write."),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "Part of the path is a file; choose another folder."),
}


@contextmanager
def staged_folder(final: Path, *, last: str, rewritten: Set[Path] = frozenset()) -> Iterator[Path]:
    """Yield a temporary folder; what it holds is at `final` when the block ends without an error.

    A folder that isn't there appears whole or not at all. One that is there stays, as it may be a mount, be linked to
    or have rights of its own: its content is staged inside of it, and moves up entry by entry. What stops that, in its
    few milliseconds, leaves a part there, which is never the entry `last`.

    Args:
        final: The folder; a link is followed.
        last: Name of the entry that readers know the folder by.
        rewritten: What `final` may hold already, since the block writes it anew.

    Raises:
        ConfigError: `final` is a file, or holds something else.
        StorageError: The folder can't be written.
    """
    refuse_existing(final, rewritten=rewritten)
    place = _follow(final)
    with _staging(place, parent=place if place.is_dir() else place.parent, named=final) as staging:
        yield staging
        _flush_content(staging)
        refuse_existing(final, rewritten=rewritten)  # It took a while: something may have been put there.
        if place.is_dir():
            _move_up(staging, place, last=last)
        else:
            staging.rename(place)
            _flush_folder(place.parent)


@contextmanager
def _staging(place: Path, *, parent: Path, named: Path) -> Iterator[Path]:
    """Yield an empty hidden folder in `parent`, on its way to `place`; what is left of it goes when the block ends.

    Errors are said of `named`, since a person asked for that.
    """
    staging = parent / f".tmp-{place.name}@{platform.node()}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, place.name)
        shutil.rmtree(staging, ignore_errors=True)  # Of a killed process that had the number of this one.
        staging.mkdir()
        yield staging
    except OSError as error:
        if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # It names a file of the staging folder.
        raise error if isinstance(error, StorageError) else describe_os_error(error, named) from error
    except SafetensorError as error:  # Its writer wraps what the system says in an error of its own.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise describe_os_error(OSError(int(code[1]), os.strerror(int(code[1]))), named) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _follow(folder: Path) -> Path:
    """Return where links lead, also one to a folder that isn't there yet, and what `.` is called."""
    return Path(os.path.realpath(folder))  # Path.resolve raises where links lead round in a circle.


def _flush_content(staging: Path) -> None:
    for file in sorted(staging.rglob("*")):
        if file.is_file():
            share(file)
            _flush(file)
    _flush_folder(staging)


def _move_up(staging: Path, folder: Path, *, last: str) -> None:
    for entry in sorted(staging.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        if entry.name == last:
            _flush_folder(folder)  # On the disk, too, it comes after the others.
        entry.replace(folder / entry.name)
    _flush_folder(folder)


def _sweep(parent: Path, name: str) -> None:
    """Remove what killed writers of `name` left in `parent`."""
    pattern = re.compile(rf"\.tmp-{re.escape(name)}@([^@]*)-(\d{{1,9}})")
    for entry in parent.glob(".tmp-*"):
        if (writer := pattern.fullmatch(entry.name)) and _is_abandoned(entry, writer[1], int(writer[2])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_abandoned(leftover: Path, machine: str, process: int) -> bool:
    """Whether its writer has ended. Of another machine's processes nothing is known but when they last wrote."""
    if machine == platform.node() and os.name == "posix":  # On Windows, to ask would be to send a Ctrl-C.
        return not _is_alive(process)
    try:
        newest = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
    except OSError:  # What was there a moment ago has gone: somebody works here.
        return False
    return time.time() - newest > _ABANDONED


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # Another person's may not be asked, but is there.
    return True


def share(file: Path) -> None:
    """Give a file the rights that the umask leaves to new ones: safetensors writes 0600 whatever it is."""
    probe = file.with_name(f".tmp-rights-{file.name}")  # The umask can't be read without setting it for all threads.
    probe.touch()
    file.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def refuse_existing(folder: Path, *, rewritten: Set[Path] = frozenset()) -> None:
    """Raise where `folder` is a file, or holds more than what is to be written anew and what killed writers left.

    Raises:
        ConfigError: It is or does.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; the output must be a folder.")
    found = {path for path in folder.iterdir() if not path.name.startswith(".tmp-")} if folder.is_dir() else set()
    if others := sorted(found - rewritten):
        raise ConfigError(f"{folder} holds {others[0].name} already. Choose another output folder, or remove it first.")


@contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `final` when the block ends; until then `final` stays.

    Raises:
        StorageError: The folder can't be written, or the old one not be moved.
    """
    place = _follow(final)
    with _staging(place, parent=place.parent, named=final) as staging:
        yield staging
        _flush_content(staging)
        old = _vacate_aside(place)
        try:
            if place.exists():
                place.rename(old)
            staging.rename(place)
        except BaseException:  # Also KeyboardInterrupt: there must be one of the two.
            if old.exists() and not place.exists():
                old.rename(place)
            raise
        _flush_folder(place.parent)
    # Last: it takes a while, in which a kill must find the new one in its place.
    shutil.rmtree(old, ignore_errors=True)


def retire_folder(folder: Path) -> None:
    """Remove a folder in one step: a kill in between leaves a whole folder or none.

    Raises:
        StorageError: It can't be moved.
    """
    try:
        place = _follow(folder)
        doomed = place.rename(_vacate_aside(place))
    except OSError as error:
        raise describe_os_error(error, folder) from error
    shutil.rmtree(doomed, ignore_errors=True)


def _vacate_aside(folder: Path) -> Path:
    """Return where a folder may be moved to be removed."""
    aside = folder.with_name(f".tmp-retired-{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # Of a killed process that had the number of this one.
    return aside


def describe_os_error(error: OSError, path: Path) -> StorageError:
    """Turn an operating system's refusal into a sentence about `path`."""
    return StorageError(f"can't write {path}: {error.strerror or error}. {advise(error.errno)}")


def advise(code: int | None) -> str:
    """Return what a person can do about a system's error number in writing."""
    return _ADVICE.get(code or 0, "Choose another place.")


def require_writable(folder: Path) -> None:
    """Raise unless `folder` could be made, or written in where it exists; creates nothing.

    Raises:
        StorageError: A part of the path is a file, the file system is read-only, or the permission is missing.
    """
    # os.access, unlike Path.exists, takes a folder that may not be searched for one that isn't there.
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.access(place, os.F_OK))
    if nearest != folder and not nearest.is_dir():
        raise describe_os_error(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), folder)
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        is_read_only = sys.platform != "win32" and os.statvfs(nearest).f_flag & os.ST_RDONLY
        code = errno.EROFS if is_read_only else errno.EACCES
        raise describe_os_error(OSError(code, os.strerror(code)), folder)


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part.

    Raises:
        StorageError: It can't be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees the old file or the new one, never a part.

    Raises:
        StorageError: It can't be written.
    """
    staging = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise describe_os_error(error, path) from error


def write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically; without `indent` on one line, which takes a fifth of the time.

    Raises:
        StorageError: It can't be written.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Write MANIFEST.json: `facts`, the size and SHA-256 of every other file of the folder, and its own SHA-256."""
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": hash_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {**facts, "files": files}
    write_json(folder / MANIFEST, {**manifest, _DIGEST: _hash_content(manifest)})


def read_manifest(folder: Path) -> dict[str, object]:
    """Read MANIFEST.json; an unreadable one is empty."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder according to its manifest, or None when every byte is as written."""
    manifest = read_manifest(folder)
    if not manifest:
        return f"{MANIFEST} is missing or unreadable"
    if manifest.pop(_DIGEST, None) != _hash_content(manifest):
        return f"{MANIFEST} has changed (its own SHA-256 differs)"
    files = cast("dict[str, dict[str, object]]", manifest["files"])
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['size']}"
        if hash_file(file) != expected["sha256"]:
            return f"{name} has changed (its SHA-256 differs)"
    return None


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder by its name; empty where there is no folder."""
    return {file.name: hash_file(file) for file in sorted(folder.glob("*")) if file.is_file()}


def _hash_content(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows can't open a folder; its rename is flushed by the file system.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
