"""Which files a source is and how each is read, and which files of a folder are left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from smolora.config.data import DataConfig, FileType
from smolora.data.readers import find_suffix, infer_type, list_files
from smolora.errors import DataError, suggest_path
from smolora.records.run_dir import RunDir

TRAIN_FILE = "train.jsonl"
VALIDATION_FILE = "validation.jsonl"
_VALIDATION_FILES = (VALIDATION_FILE, "valid.jsonl", "val.jsonl", "dev.jsonl")
"""Beside a train.jsonl, one of these holds the held-out rows; test.jsonl is never read with either."""

_DATASET_FILES, _DATASET_INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
"""Of a folder that `Dataset.save_to_disk` wrote: which files hold its rows, and what they are; of one with splits."""

_PAGES = (".html", ".htm")
_BY_LINES = (".txt", ".text")
"""Whose lines are rows even where markup is cleaned away; other text is a page then."""

_UNREAD_PACKINGS = (".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz")
_TYPES = "arrow, csv, json, jsonl, parquet, txt"
_SHOWN = 5


def locate(source: str, file_type: FileType | None) -> list[tuple[Path, FileType]] | None:
    """Return the files of a source and how to read them; None where it is of the hub.

    Raises:
        DataError: There is no such file or folder, or how to read it can't be told.
        StorageError: A folder may not be read.
    """
    path = Path(source).expanduser()
    if file_type == "hub" or (file_type is None and not path.exists() and _may_be_hub_id(source)):
        return None
    if not path.exists():
        here = "" if path.is_absolute() else f" Relative names are looked for in the current folder, {Path.cwd()}."
        raise DataError(f"no such file or folder: {source}.{suggest_path(path) or here}")
    return _search_folder(path, file_type) if path.is_dir() else [(path, _require_type(path, file_type))]


def choose_held_out_type(source: str, file_type: FileType | None) -> FileType | None:
    """Return how to read held-out rows beside sources of a type: alike, but where a name tells another one."""
    path = Path(source).expanduser()
    files = list_files(path) if path.is_dir() else [path]
    tells = any(infer_type(file) not in {None, file_type} for file in files)
    return None if tells or file_type == "hub" or not path.exists() else file_type


def is_one_text(path: Path, data: DataConfig) -> bool:
    """Whether a text file is one text, and no row a line: chunks are longer, and markup of a page goes over lines."""
    return data.chunk_size > 0 or ("strip_html" in data.clean and find_suffix(path) not in _BY_LINES)


def describe_left_out(source: str, file_type: FileType | None) -> str | None:
    """Return how many files of a folder aren't read, by suffix; None where all are.

    Hidden files don't count, and neither does what `prepare` or `Dataset.save_to_disk` leaves beside the rows.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or file_type == "hub" or _is_saved(path, file_type):
        return None
    files = list_files(path)
    read = {file for file, _ in _search_folder(path, file_type)}
    is_prepared = _is_prepared(path, file_type)
    beside = {find_validation_file(path), *RunDir(path).account} if is_prepared else set()
    left_out = [file for file in files if file not in read | beside]
    if not left_out:
        return None
    verb = "is" if len(left_out) == 1 else "are"
    said = f"{len(left_out):,} of {len(files):,} files in {source} {verb} left out: {_describe_unread(left_out)}"
    return (
        f"{said} Beside {TRAIN_FILE} only held-out rows are read; name other files one by one." if is_prepared else said
    )


def find_validation_file(folder: Path, file_type: FileType | None = None) -> Path | None:
    """Return the file of held-out rows in a folder that is read as one that `prepare` wrote, or one like it."""
    folder = folder.expanduser()
    if not _is_prepared(folder, file_type):
        return None
    return next((folder / name for name in _VALIDATION_FILES if (folder / name).is_file()), None)


def _may_be_hub_id(source: str) -> bool:
    """Whether a name that is no path here could be one of the hub: `name` or `owner/name`, with no known suffix."""
    parts = source.split("/")
    return len(parts) <= 2 and all(parts) and not source.startswith((".", "~")) and infer_type(Path(source)) is None


def _require_type(path: Path, file_type: FileType | None) -> FileType:
    if path.name.lower().endswith(_UNREAD_PACKINGS):
        raise DataError(
            f"{path} is packed as {path.suffix}, which isn't read. Unpack it, or pack it as .gz, .bz2 or .xz."
        )
    kind = file_type or infer_type(path)
    if kind is None:
        raise DataError(f"can't tell the type of {path} from its name. Name it with data.file_type: {_TYPES}.")
    return kind


def _search_folder(path: Path, file_type: FileType | None) -> list[tuple[Path, FileType]]:
    files = list_files(path)  # First, as it says so where the folder is locked.
    if _is_prepared(path, file_type):
        return [(path / TRAIN_FILE, "jsonl")]
    if _is_saved(path, file_type):
        return [(path / name, "arrow") for name in _read_dataset_files(path / _DATASET_FILES)]
    typed = [(file, kind) for file in files if (kind := _find_type(file, file_type)) is not None]
    kinds = {kind for _, kind in typed}
    if not typed:
        found = f" It holds {_describe_unread(files)}" if files else ""
        raise DataError(f"the folder {path} holds no file to read ({file_type or _TYPES}), at any depth.{found}")
    if len(kinds) > 1:
        raise DataError(
            f"{path} holds files of several types ({', '.join(sorted(kinds))}). Choose with data.file_type=TYPE."
        )
    return typed


def _is_prepared(path: Path, file_type: FileType | None) -> bool:
    """Whether a folder is one that `prepare` wrote, or like it, unless files of another type are asked for."""
    return file_type in (None, "jsonl") and (path / TRAIN_FILE).is_file()


def _is_saved(path: Path, file_type: FileType | None) -> bool:
    """Whether a folder is one that `Dataset.save_to_disk` wrote, unless files of another type are asked for."""
    if file_type not in (None, "arrow"):
        return False
    if (path / _SPLITS).is_file():
        splits = sorted(str(file.parent) for file in path.glob(f"*/{_DATASET_FILES}"))
        raise DataError(f"{path} holds a dataset in splits. Name the one to read: {' or '.join(splits)}.")
    return (path / _DATASET_FILES).is_file() and (path / _DATASET_INFO).is_file()


def _read_dataset_files(state: Path) -> list[str]:
    try:
        # Only what lies beside it: a name from a file must not lead elsewhere.
        return [Path(file["filename"]).name for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{state} doesn't name the files of its dataset. Save that again, with save_to_disk.") from None


def _find_type(file: Path, asked: FileType | None) -> FileType | None:
    """Return how a file of a folder is read; None where it isn't. Pages are text where text is asked for."""
    kind: FileType | None = "txt" if asked == "txt" and find_suffix(file) in _PAGES else infer_type(file)
    return kind if asked in (None, kind) else None


def _describe_unread(files: Sequence[Path]) -> str:
    """Say how many files there are of each suffix, and how to read those that may be.

    >>> _describe_unread([Path("a.docx"), Path("b.docx"), Path("LICENSE")])
    '2 .docx, 1 without a suffix.'
    """
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    others = sum(count for _, count in counts.most_common()[_SHOWN:])
    shown = [f"{count:,} {suffix}" for suffix, count in counts.most_common(_SHOWN)]
    hint = " data.file_type=txt reads pages of HTML too." if any(find_suffix(file) in _PAGES for file in files) else ""
    return ", ".join([*shown, *([f"{others:,} others"] if others else [])]) + f".{hint}"
