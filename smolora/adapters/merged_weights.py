"""Writes what an adapter makes of a base into safetensors files, tensor by tensor, and reads them back beside.

A merged tensor has the name, type and shape of the base's, so a merged file has the base's header, byte for byte, and
the tensors follow in the same order: updated ones computed in float32 and cast back, all others copied. One is in
memory to be written, and one to be checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from smolora.adapters.changes import Change
from smolora.config.model import Quantization
from smolora.errors import ModelError
from smolora.models.quantised import round_trip
from smolora.models.weight_files import StoredTensor, name_in_files, read_header, read_stored_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 20
_DISK_BLOCK = 8 << 20
"""Bytes that are handed to the disk at a time, at least."""

_MOST_WAITING = 8
"""Tensors that may be written before an earlier one is checked: a mistake ends the merge soon."""


@dataclass(frozen=True)
class Update:
    """What becomes of one stored parameter: the rounding of a quantised base, then what the adapter makes of it."""

    change: Change | None
    """None is a layer that is quantised and not adapted."""
    is_transposed: bool = False
    """The weight is stored [in, out] (GPT-2's Conv1D)."""
    quantization: Quantization = "none"
    """How the layer was held while the adapter was trained."""

    def apply(self, weight: Tensor) -> Tensor:
        """Return the updated weight in its own type, computed in float32."""
        stored = round_trip(weight.T if self.is_transposed else weight, self.quantization)
        updated = self.change.apply(stored) if self.change else stored
        return (updated.T if self.is_transposed else updated).to(weight.dtype).contiguous()


Check = Callable[[str, Update, Tensor, Tensor], None]
"""Takes a tensor's name, what becomes of it, the base's tensor, and what was written, read back."""


def match_updates(
    updates: Mapping[str, Update], stored: Iterable[StoredTensor]
) -> dict[str, tuple[Update, StoredTensor]]:
    """Return the updates by the name of the stored tensor they go on.

    Args:
        updates: By the name of the parameter in memory.
        stored: Every tensor of the base.

    Raises:
        ModelError: A parameter isn't in the files, or isn't of a type that can be added to.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    matched = {}
    for path, update in updates.items():
        tensor = next((by_name[name] for name in name_in_files(path) if name in by_name), None)
        if tensor is None:
            raise ModelError(f"the base's files hold no {path} to merge into. Merge into another copy of the base.")
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{tensor.name} is stored as {tensor.dtype}; only {', '.join(DTYPES)} can be merged into. "
                "Name an unquantised base."
            )
        matched[tensor.name] = (update, tensor)
    return matched


def write_merged_file(source: Path, target: Path, updates: Mapping[str, Update], check: Check) -> None:
    """Copy the safetensors file `source` to `target` with `updates` added to the tensors they name.

    A second thread reads back what was written, and the base's: merged tensors go to `check`, of all others every byte
    is compared.

    Raises:
        ModelError: `check` refuses a merged tensor, or a copied one isn't the base's.
    """
    checks: list[Future[None]] = []
    with _two_threads() as checker, source.open("rb") as reader, _written(target) as (writer, flush):
        header, _ = read_header(reader)
        writer.write(len(header).to_bytes(8, "little") + header)
        for tensor in read_stored_tensors(source):
            update = updates.get(tensor.name)
            if update:
                writer.write(_view_bytes(update.apply(_read(reader, tensor))))
            else:
                writer.writelines(_iter_blocks(reader, tensor))
            flush()
            checks.append(checker.submit(_check_written, tensor, target, update, check))
            if len(checks) > _MOST_WAITING:
                checks[-_MOST_WAITING].result()
        for checked in checks:
            checked.result()
    if target.stat().st_size != source.stat().st_size:
        raise ModelError(f"{target.name} isn't as long as the base's, although nothing was to be added. Merge again.")


@contextmanager
def _written(target: Path) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    """Yield a new file, and what makes all that was written to it readable.

    A thread of its own hands that to the disk where enough has come together: at the end, in one go, it took a fifth of
    a merge.
    """
    with target.open("wb") as writer, ThreadPoolExecutor(1) as disk:
        handing: Future[None] | None = None
        handed_to = 0

        def flush() -> None:
            nonlocal handing, handed_to
            writer.flush()
            if writer.tell() - handed_to >= _DISK_BLOCK and (handing is None or handing.done()):
                if handing is not None:
                    handing.result()
                handed_to = writer.tell()
                handing = disk.submit(os.fsync, writer.fileno())

        yield writer, flush
        if handing is not None:
            handing.result()


@contextmanager
def _two_threads() -> Iterator[Executor]:
    """Yield a second thread; it and this one have half of torch's threads each for the block.

    Where other work runs beside, torch's threads wait for each other at every operation: a merge with two of them took
    3 to 12 seconds there, and 1 in two threads of one.
    """
    before = torch.get_num_threads()
    share = max(1, before // 2)
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(1) as other:
            yield other
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _check_written(tensor: StoredTensor, target: Path, update: Update | None, check: Check) -> None:
    """Hold what lies in `target` to the base's tensor, and to what becomes of it."""
    with tensor.file.open("rb") as base, target.open("rb") as written:
        if update:
            check(tensor.name, update, _read(base, tensor), _read(written, tensor))
        elif any(a != b for a, b in zip(_iter_blocks(base, tensor), _iter_blocks(written, tensor), strict=True)):
            raise ModelError(
                f"{tensor.name} was copied, and reads back as something else. Check the disk; merge again."
            )


def _read(reader: BufferedReader, tensor: StoredTensor) -> Tensor:
    weight = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    reader.seek(tensor.start)
    reader.readinto(_view_bytes(weight))
    return weight


def _iter_blocks(reader: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    """Yield the bytes of a tensor."""
    reader.seek(tensor.start)
    for start in range(tensor.start, tensor.end, _CHUNK):
        yield reader.read(min(_CHUNK, tensor.end - start))


def _view_bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
