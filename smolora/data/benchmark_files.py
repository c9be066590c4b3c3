"""Where the files of a benchmark are: in a folder that a person names, else downloaded into the cache, once.

A download is held to its SHA-256: the one that is known, or the one that was recorded when it first came. What a person
downloaded stays theirs: a file that isn't the official one is used, with a warning that says so.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from smolora.errors import DataError, suggest_path
from smolora.records.staging import describe_os_error, hash_file, write_json

logger = logging.getLogger(__name__)

RECORD = "SHA256.json"
"""In the cache, beside the files: name to SHA-256 at the first download."""

_PATIENCE = 30.0
"""Seconds to wait for the next bytes of a download."""

OFFICIAL_SHA256: Mapping[str, str] = {
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
"""Of the files of E2E NLG 1.0; the others weren't at hand to be hashed."""


def find_file(benchmark: str, folder: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` that is in `folder`.

    Raises:
        DataError: None is.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        lack = f"{folder} has none of" if folder.is_dir() else f"there is no folder {folder} with one of"
        raise DataError(
            f"{lack} {', '.join(names)}, which {benchmark} needs.{suggest_path(folder)} "
            "Name the folder that holds it with --data-dir."
        )
    return found


def warn_if_changed(file: Path) -> None:
    """Say so where a file has the name of an official one, and other bytes."""
    expected = OFFICIAL_SHA256.get(file.name)
    if expected is not None and hash_file(file) != expected:
        logger.warning(
            "%s isn't the official file (its SHA-256 differs): scores on it can't be held against published ones.", file
        )


def fetch_file(benchmark: str, urls: Sequence[str], folder: Path) -> Path:
    """Return the first of `urls` from the cache `folder`, downloaded where it isn't there yet.

    Raises:
        DataError: There is no network, or the file isn't the one that is pinned or was recorded.
    """
    if not urls:
        raise DataError(f"{benchmark} can't be downloaded file by file. Name a folder that holds it with --data-dir.")
    file = folder / urls[0].rpartition("/")[2]
    if not file.is_file():
        _download(benchmark, urls[0], file)
    record = folder / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    found, expected = hash_file(file), OFFICIAL_SHA256.get(file.name, known.get(file.name))
    if expected is None:
        write_json(record, {**known, file.name: found})
    elif found != expected:
        raise DataError(f"{file} has SHA-256 {found}, not {expected}. Delete it to download it again.")
    return file


def cache_folder(benchmark: str) -> Path:
    """Return where downloads of a benchmark are kept: under $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root) / "smolora" / "benchmarks" / benchmark


def _download(benchmark: str, url: str, file: Path) -> None:
    staging = file.with_name(f".tmp-{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        logger.info("downloading %s", url)
        with urllib.request.urlopen(url, timeout=_PATIENCE) as answer, staging.open("wb") as out:
            shutil.copyfileobj(answer, out)
        found, promised = staging.stat().st_size, answer.headers["Content-Length"]
        if promised is not None and found != int(promised):
            raise http.client.HTTPException(f"it ends after {found:,} of {int(promised):,} bytes")
        staging.replace(file)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"{url} can't be downloaded: {error}. Name a folder that holds the files of {benchmark} with --data-dir."
        ) from error
    except OSError as error:
        raise describe_os_error(error, file) from error
    finally:
        staging.unlink(missing_ok=True)
