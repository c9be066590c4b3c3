"""Writes what an adapter makes of a base into safetensors files, tensor by tensor, and reads each back.

A merged tensor has the name, type and shape of the base's, so a merged file has the base's header, byte for byte (but
for a head that is tied to the embedding no longer, which comes last), and every tensor's place is known beforehand:
updated ones are computed in float32 and cast back, all others copied. Two are in work at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedRandom, BufferedReader
from pathlib import Path
from threading import Event
from typing import BinaryIO

import torch
from torch import Tensor

from smolora.adapters.changes import Change
from smolora.config.model import Quantization
from smolora.errors import ModelError
from smolora.models.quantised import round_trip
from smolora.models.weight_files import StoredTensor, name_in_files, read_header, read_stored_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNED = 8
"""Bytes; tensors begin at a multiple of this."""

_CHUNK = 1 << 18

_PAUSE = 0.03
"""Seconds between two times that what was written is handed to the disk."""


@dataclass(frozen=True)
class Update:
    """What becomes of one stored parameter: the rounding of a quantised base, then what the adapter makes of it."""

    change: Change | None
    """None is a layer that is quantised and not adapted, or the embedding's weight that an untied head starts with."""
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
    updates: Mapping[str, Update], stored: Iterable[StoredTensor], untied: Mapping[str, str] | None = None
) -> dict[str, tuple[Update, StoredTensor]]:
    """Return the updates and the stored tensors they go on, by the name that the merged tensor has.

    That is the stored tensor's own, but for one that is no longer tied.

    Args:
        updates: By the name of the parameter in memory.
        stored: Every tensor of the base.
        untied: Parameters that the base may not hold, and those whose tensor is theirs too.

    Raises:
        ModelError: A parameter isn't in the files, or isn't of a type that can be added to.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    matched = {}
    for path, update in updates.items():
        own = [by_name[name] for name in name_in_files(path) if name in by_name]
        shared = [by_name[name] for name in name_in_files((untied or {}).get(path, "")) if name in by_name]
        tensor = next(iter([*own, *shared]), None)
        if tensor is None:
            raise ModelError(f"the base's files hold no {path} to merge into. Merge into another copy of the base.")
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{tensor.name} is stored as {tensor.dtype}; only {', '.join(DTYPES)} can be merged into. "
                "Name an unquantised base."
            )
        matched[tensor.name if own else path] = (update, tensor)
    return matched


def write_merged_file(
    source: Path,
    target: Path,
    updates: Mapping[str, Update],
    check: Check,
    added: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Copy the safetensors file `source` to `target` with `updates` added to the tensors they name.

    What was written is read back: merged tensors go to `check`, of all others every byte is compared.

    Args:
        source: The base's file.
        target: The new one.
        updates: What becomes of tensors, by the names they have in `target`; all others are copied.
        check: What looks at them, in two threads.
        added: Tensors of `source` that `target` holds once more, behind all others, under a further name.

    Raises:
        ModelError: `check` refuses a merged tensor, or a copied one isn't the base's.
    """
    header, places = _lay_out(source, target, added or {})
    target.write_bytes(header)
    with _handed_to_disk(target), _two_threads() as pool:
        for merged in [pool.submit(_merge, *pair, updates.get(pair[1].name), check) for pair in places]:
            merged.result()
    if target.stat().st_size != max((place.end for _, place in places), default=len(header)):
        raise ModelError(f"{target.name} isn't as long as its tensors are. Merge again.")


def _lay_out(
    source: Path, target: Path, added: Mapping[str, StoredTensor]
) -> tuple[bytes, list[tuple[StoredTensor, StoredTensor]]]:
    """Return what stands before the tensors of a merged file, and each tensor of the base with its place there."""
    stored = read_stored_tensors(source)
    with source.open("rb") as reader:
        header, start = read_header(reader)
    end, fields = max((tensor.end for tensor in stored), default=start), json.loads(header)
    further = []
    for name, tensor in added.items():
        place = replace(tensor, name=name, start=end, end=end + tensor.end - tensor.start)
        offsets = [place.start - start, place.end - start]
        fields[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        further.append((tensor, place))
        end = place.end
    if added:
        header = json.dumps(fields).encode()
        header += b" " * (-len(header) % _ALIGNED)
    moved = 8 + len(header) - start
    places = [
        (tensor, replace(place, file=target, start=place.start + moved, end=place.end + moved))
        for tensor, place in [*zip(stored, stored, strict=True), *further]
    ]
    return len(header).to_bytes(8, "little") + header, places


@contextmanager
def _handed_to_disk(target: Path) -> Iterator[None]:
    """Hand what the block writes to the disk all along: at the end, in one go, it took a fifth of a merge."""
    is_over = Event()

    def hand_over() -> None:
        with target.open("r+b") as file:
            while not is_over.wait(_PAUSE):
                os.fsync(file.fileno())

    with ThreadPoolExecutor(1) as disk:
        try:
            handing = disk.submit(hand_over)
            yield
        finally:
            is_over.set()
        handing.result()


@contextmanager
def _two_threads() -> Iterator[Executor]:
    """Yield two threads that have half of torch's threads each; what waits for them when the block ends is dropped.

    Where other work runs beside, torch's threads wait for each other at every operation: a merge with two of them took
    3 to 12 seconds there, and 1 in two threads of one.
    """
    before, pool = torch.get_num_threads(), ThreadPoolExecutor(2)
    torch.set_num_threads(max(1, before // 2))
    try:
        yield pool
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(before)


@torch.no_grad()
def _merge(tensor: StoredTensor, place: StoredTensor, update: Update | None, check: Check) -> None:
    """Write what becomes of the base's tensor to its place in the merged file, and hold what lies there to both."""
    with tensor.file.open("rb") as base, place.file.open("r+b") as target:
        target.seek(place.start)
        if update:
            weight = _read(base, tensor)
            target.write(_view_bytes(update.apply(weight)))
            target.flush()
            check(place.name, update, weight, _read(target, place))
        else:
            target.writelines(_iter_blocks(base, tensor))
            target.flush()
            _compare(base, tensor, target, place)


def _compare(base: BinaryIO, tensor: StoredTensor, target: BinaryIO, place: StoredTensor) -> None:
    """Raise where a copied tensor isn't the base's, byte for byte."""
    if any(a != b for a, b in zip(_iter_blocks(base, tensor), _iter_blocks(target, place), strict=True)):
        raise ModelError(f"{place.name} was copied, and reads back as something else. Check the disk; merge again.")


def _read(reader: BufferedReader | BufferedRandom, tensor: StoredTensor) -> Tensor:
    weight = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    reader.seek(tensor.start)
    if reader.readinto(_view_bytes(weight)) < weight.nbytes:
        raise ModelError(f"{tensor.name} ends before its last byte: {tensor.file} was cut meanwhile. Merge again.")
    return weight


def _iter_blocks(reader: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    """Yield the bytes of a tensor."""
    reader.seek(tensor.start)
    for start in range(tensor.start, tensor.end, _CHUNK):
        yield reader.read(min(_CHUNK, tensor.end - start))


def _view_bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
