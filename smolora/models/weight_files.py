"""The safetensors files of a model folder, read without loading a weight: what is in them, and a fingerprint.

safetensors only: a pickle from outside can run code, so there is no fall-back to pytorch_model.bin.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smolora.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Settings that change a model's arithmetic and can't be seen in the shapes of its tensors.
_ESSENTIAL_SETTINGS = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads")
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes `start` to `end` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def list_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in a fixed order.

    Raises:
        ModelError: There are none, or a shard of the index is missing.
    """
    if (folder / INDEX_FILE).is_file():
        files = [folder / name for name in sorted(set(_read_index(folder / INDEX_FILE).values()))]
        for file in files:
            if not file.is_file() or file.parent != folder:
                raise ModelError(
                    f"{folder} is incomplete: {INDEX_FILE} names {file.name}, which isn't there. Copy it again."
                )
        return files
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} holds only pickled weights (*.bin), which can run code when they are opened. "
            "Convert them to safetensors, on a machine that you can lose, or take another copy of the model."
        )
    raise ModelError(f"{folder} holds no weights. A model folder has {SINGLE_FILE}, or shards with {INDEX_FILE}.")


def read_stored_tensors(file: Path) -> list[StoredTensor]:
    """Return the tensors of one safetensors file, in the order of their bytes.

    Raises:
        ModelError: It isn't a whole safetensors file.
    """
    try:
        with file.open("rb") as stream:
            header, start = read_header(stream)
        fields = json.loads(header)
        fields.pop("__metadata__", None)
        tensors = [_locate(name, field, file, start) for name, field in fields.items()]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} isn't a safetensors file ({error}). Copy or download it again.") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end, tensor.name))
    if tensors and tensors[-1].end != file.stat().st_size:
        raise ModelError(f"{file} has {file.stat().st_size} bytes, not {tensors[-1].end}: it was cut. Copy it again.")
    return tensors


def name_in_files(name: str) -> tuple[str, str]:
    """Return the names that files may give a parameter: its own, and that without the first part, as older ones do."""
    return name, name.partition(".")[2]


def read_header(stream: BinaryIO) -> tuple[bytes, int]:
    """Read (the JSON header, the offset at which the tensors begin) of a safetensors file."""
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 100_000_000:
        raise ValueError("its header is longer than 100 MB")
    header = stream.read(length)
    if len(header) != length:
        raise ValueError("its header is cut")
    return header, 8 + length


def fingerprint_weights(folder: Path) -> str:
    """Return a SHA-256 that tells two base models apart, also two of one shape.

    It covers the settings that shapes can't show, and of each tensor: name, type, shape, and 4 KiB from the start,
    the middle and the end of its bytes. That takes milliseconds for gigabytes, and doesn't depend on how the tensors
    are split into files.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps({name: config.get(name) for name in _ESSENTIAL_SETTINGS}).encode())
    tensors = [tensor for file in list_weight_files(folder) for tensor in read_stored_tensors(file)]
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape} ".encode())
        with tensor.file.open("rb") as stream:
            for block in _iter_probes(stream, tensor):
                digest.update(block)
    return digest.hexdigest()


def _iter_probes(stream: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    middle = (tensor.start + tensor.end) // 2
    for start in (
        tensor.start,
        max(tensor.start, middle - _PROBE_BYTES // 2),
        max(tensor.start, tensor.end - _PROBE_BYTES),
    ):
        stream.seek(start)
        yield stream.read(min(_PROBE_BYTES, tensor.end - start))


def _read_index(file: Path) -> dict[str, str]:
    try:
        shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file} isn't an index of safetensors files. Copy or download it again.") from None


def _locate(name: str, field: dict[str, object], file: Path, offset: int) -> StoredTensor:
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError(f"tensor {name} has no shape or place")
    start, end = (offset + int(number) for number in offsets)
    return StoredTensor(name, str(dtype), tuple(map(int, shape)), file, start, end)
