"""The processes of one run: what they tell each other, and how all of them end when one fails. The door to accelerate.

Before anything is sent, every process says whether it is well. One that failed says so there, wherever the others
are, so that they end with its exit code instead of waiting for it. The main process alone reads and writes the run's
folder.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from threading import Lock
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from smolora.errors import ConfigError, FailedElsewhere, SmoloraError, StorageError
from smolora.runtime.available_memory import is_out_of_memory
from smolora.runtime.launch import asks_to_shard, find_meeting_place, is_switched_on, launched_processes

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

_PATIENCE = timedelta(days=1)
"""How long a process waits for the others, as for the main one's verdict. (A lost process is seen at once.)"""

_FIRST_PATIENCE = timedelta(minutes=10)
"""How long it waits until all of them are there, which they come to before they read anything."""

_ARRIVED = "smolora: there is process "
"""What each of them writes down where they meet, before its number."""

_MOST_NUMBERS = 3
"""Numbers that a process can send with its word that it is well."""

_BUCKET_ELEMENTS = 2**24
"""Gradients sent at once: 64 MiB in float32."""

_GLOO = re.compile(r"^\[\S*gloo\S*\] ")
"""What an error of gloo begins with: its source file."""

_UNHEEDED = {
    "ACCELERATE_USE_DEEPSPEED": "use DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "use Megatron-LM",
}
"""What accelerate's configuration can ask for and this loop doesn't do."""


_run = Lock()
"""Held by the run of this process: all threads draw from one random generator of torch's, which each step seeds."""


@contextmanager
def _alone() -> Iterator[None]:
    if not _run.acquire(blocking=False):
        raise ConfigError(
            "another run trains in this process, and both would draw from torch's one random generator. Wait for it, "
            "or start a process for each."
        )
    try:
        yield
    finally:
        _run.release()


@dataclass(frozen=True)
class _Failure:
    kind: str
    message: str
    exit_code: int


class Processes:
    """The processes of a run, seen from one of them. Alone, nothing is sent.

    Args:
        index: The number of this one, from 0.
        count: How many there are.
        device: Where what they send lies.
        is_sharding: Whether they shard the frozen base, so that they run the model together.

    Example:
        ```python
        from smolora.data.collate import collate_packed
        from smolora.training.processes import join_processes

        processes = join_processes(bundle.device)
        with processes.together():
            Trainer(bundle, rows, TrainingConfig(max_steps=100), collate=collate_packed, processes=processes).train()
        ```
    """

    def __init__(
        self, index: int = 0, count: int = 1, device: torch.device | None = None, *, is_sharding: bool = False
    ) -> None:
        self.index, self.count, self.is_sharding = index, count, is_sharding
        self._device = device or torch.device("cpu")
        self._is_inside = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes the records."""
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all processes when one of them fails inside the block, the only one of its kind in this process.

        An error that the main process has too is its to tell: here it becomes a `FailedElsewhere` with the same code.

        Raises:
            ConfigError: Another thread is in such a block.
            FailedElsewhere: Another process failed.
        """
        try:
            with _alone():
                yield
        except FailedElsewhere:
            raise
        except Exception as error:
            if self.count > 1 and not self._is_inside and self._is_told_by_main(_describe(error)):
                raise FailedElsewhere(f"process 0: {error}", _describe(error).exit_code) from error
            raise

    @contextmanager
    def inside_model(self) -> Iterator[None]:
        """Run a sharded model inside the block, with as many passes as all others: they meet in every layer.

        One that fails there can't tell them: it ends by itself, and they see that it is gone.

        Raises:
            FailedElsewhere: Another process is gone.
        """
        self._is_inside = self.is_sharding
        try:
            yield
        except RuntimeError as error:
            if not self._is_inside or not _GLOO.match(str(error)):
                raise
            with _lost_processes():
                raise
        self._is_inside = False

    def count_passes(self, mine: int) -> int:
        """Return how many passes this process makes: its own, or with a sharded model as many as the one with most."""
        return int(max(self.gather(mine))[0]) if self.is_sharding else mine

    def open_group(self) -> distributed.ProcessGroup:
        """Return a connection of all processes beside their own; they wait there for half an hour at most."""
        self._meet()
        with _lost_processes():
            return cast("distributed.ProcessGroup", distributed.new_group())

    def gather(self, *numbers: float) -> list[list[float]]:
        """Return the numbers of every process, in order; at most three each.

        Raises:
            FailedElsewhere: Another process failed.
        """
        return [list(numbers)] if self.count == 1 else self._meet(numbers)

    def sum(self, *numbers: float) -> list[float]:
        """Return each number's sum over the processes, correctly rounded, so the same everywhere."""
        return [math.fsum(column) for column in zip(*self.gather(*numbers), strict=True)]

    def gather_values(self, value: _Value) -> list[_Value]:
        """Return what every process has, in order."""
        if self.count == 1:
            return [value]
        self._meet()
        return self._gather_values(value)

    def from_main(self, make: Callable[[], _Value]) -> _Value:
        """Run `make` in the main process alone, and return its value in all."""
        box: list[object] = [make() if self.is_main else None]
        if self.count > 1:
            self._meet()
            with _lost_processes():
                distributed.broadcast_object_list(box, src=0, device=self._device)
        return cast("_Value", box[0])

    @torch.no_grad()
    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's values of these tensors, in place."""
        if self.count == 1:
            return
        self._meet()
        with _lost_processes():
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; one that no process has stays None.

        Not DistributedDataParallel: that fixes at its start what has a gradient, and phases change it.
        """
        if self.count == 1:
            return
        self._meet()
        with _lost_processes():
            present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
            present = present.to(self._device)
            distributed.all_reduce(present)
            found = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
            for parameter in found:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for bucket in _fill_buckets([cast("Tensor", parameter.grad) for parameter in found]):
                _sum_bucket(bucket)

    def _meet(self, numbers: Sequence[float] = (), failure: _Failure | None = None) -> list[list[float]]:
        """Say that this process is well, or why not; return the numbers of all that are."""
        mine = torch.zeros(1 + _MOST_NUMBERS, dtype=torch.float64)
        mine[: 1 + len(numbers)] = torch.tensor([float(failure is not None), *numbers])
        with _lost_processes():
            mine = mine.to(self._device)
            gathered = [torch.empty_like(mine) for _ in range(self.count)]
            distributed.all_gather(gathered, mine)
        said = torch.stack(gathered).tolist()
        if any(has_failed for has_failed, *_ in said):
            self._end(self._gather_values(failure))
        return [rest[: len(numbers)] for _, *rest in said]

    def _end(self, failures: Sequence[_Failure | None]) -> None:
        index, first = next((index, failure) for index, failure in enumerate(failures) if failure)
        raise FailedElsewhere(f"process {index}: {first.message}", first.exit_code)

    def _is_told_by_main(self, failure: _Failure) -> bool:
        """Tell the others of a failure; return whether the main process, another one, has one of its kind."""
        try:
            self._meet(failure=failure)
        except FailedElsewhere as told:
            return not self.is_main and told.exit_code == failure.exit_code and str(told).startswith("process 0: ")
        raise AssertionError("a failure ends every process")

    def _gather_values(self, value: _Value) -> list[_Value]:
        found: list[object] = [None] * self.count
        with _lost_processes():
            distributed.all_gather_object(found, value)
        return cast("list[_Value]", found)


def join_processes(device: torch.device) -> Processes:
    """Return the processes that a launcher started for this run, connected; without a launcher, this one alone.

    Raises:
        ConfigError: Not as many as asked for, more than there are GPUs, or accelerate's configuration asks for what
            this loop doesn't do; or they don't find each other.
    """
    asked, is_sharding = launched_processes(), asks_to_shard()
    _refuse_unheeded()
    if asked == 1:
        if is_sharding:
            logger.warning("FSDP was asked of one process, which has nobody to share the model with: it stays whole")
        return Processes()
    if device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        raise ConfigError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on {torch.cuda.device_count()} GPUs: start one for each."
        )
    from accelerate import PartialState  # Here, since a run of one process needs none of its second of imports.

    is_new = not distributed.is_initialized()
    met = _meet_others(asked) if is_new else {}
    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE, **met)
    if state.num_processes != asked:
        raise ConfigError(f"WORLD_SIZE asks for {asked} processes, but accelerate connected {state.num_processes}.")
    if is_new:
        atexit.register(distributed.destroy_process_group)  # Not sooner: a script may tune more than once.
    return Processes(state.process_index, state.num_processes, state.device, is_sharding=is_sharding)


def run_in_main(make: Callable[[], _Value], device: torch.device) -> _Value:
    """Run `make` in the main process of those that a launcher started, and return its value in all of them.

    Raises:
        FailedElsewhere: It failed there.
    """
    processes = join_processes(device)
    with processes.together() if processes.count > 1 else nullcontext():
        return processes.from_main(make)


def _meet_others(count: int) -> dict[str, object]:
    """Wait until all processes are there; return by what they are connected, as `init_process_group` takes it."""
    place, minutes = find_meeting_place(), _FIRST_PATIENCE.total_seconds() / 60
    logger.info("waiting at %s for all %d processes of the run, for up to %g minutes", place, count, minutes)
    try:
        store, rank, _ = next(rendezvous("env://", timeout=_FIRST_PATIENCE))
        store.set(f"{_ARRIVED}{rank}", "")
        # torchrun's own store is there before any process is.
        store.wait([f"{_ARRIVED}{other}" for other in range(count)], _FIRST_PATIENCE)
    except distributed.DistError as error:
        reason = str(error).splitlines()[0].partition(", keys")[0].rstrip(".")
        raise ConfigError(
            f"the {count} processes that WORLD_SIZE asks for haven't met at {place} in {minutes:g} minutes: "
            f"{reason}. Start all of them at once, each with its own RANK from 0 to "
            f"{count - 1}, and see that MASTER_ADDR and MASTER_PORT name the machine of RANK 0 and a free port there "
            "that no firewall closes. For one process alone unset WORLD_SIZE."
        ) from error
    store.set_timeout(_PATIENCE)
    return {"store": store, "rank": rank, "world_size": count}


def _refuse_unheeded() -> None:
    for name, wish in _UNHEEDED.items():
        if is_switched_on(name):
            raise ConfigError(
                f"accelerate's configuration asks to {wish}, which smolora doesn't do: every process holds the whole "
                "model, or with FSDP2 a part of it. Take distributed_type: MULTI_GPU, or FSDP."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ConfigError(
            f"accelerate's configuration asks for mixed_precision: {precision}. Set it to 'no': model.dtype says what "
            "the base computes in, and an adapter is float32."
        )


def _describe(error: Exception) -> _Failure:
    if isinstance(error, SmoloraError):
        return _Failure(type(error).__name__, str(error), error.exit_code)
    is_storage = isinstance(error, OSError) or is_out_of_memory(error)
    kind = type(error).__name__
    return _Failure(kind, f"{kind}: {error}", StorageError.exit_code if is_storage else SmoloraError.exit_code)


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Say in words that another process went away without a word, as a killed one does."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FailedElsewhere) or is_out_of_memory(error):
            raise
        reason = _GLOO.sub("", str(error)).split(". ")[0].strip()
        raise FailedElsewhere(
            f"another process of the run is gone ({reason}). Its own words, if any, stand above. "
            "Start the run again with --resume: it goes on from its newest checkpoint."
        ) from error


def _fill_buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one type in groups of bounded size, in order."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        is_full = sum(other.numel() for other in bucket) + tensor.numel() > _BUCKET_ELEMENTS
        if bucket and (is_full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _sum_bucket(bucket: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    distributed.all_reduce(flat)
    for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
