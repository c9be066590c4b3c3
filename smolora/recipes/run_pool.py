"""Independent runs side by side: over processes of this machine, or over the machines of a Ray cluster.

Results come in the order in which runs end. The first error ends all: runs under way stop at a step boundary.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch

from smolora.errors import ConfigError, SmoloraError, StoppedBySignal, StorageError
from smolora.runtime.signals import deferred_signals

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_GLANCE = 0.2
"""Seconds between two looks for a signal."""


def run_on_processes(function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, workers: int) -> Iterator[_Result]:
    """Yield `function(job)` of every job, computed by at most so many fresh processes that share the cores.

    The function and the jobs must be picklable. A script that calls this needs `if __name__ == "__main__":`.

    Raises:
        StoppedBySignal: A signal arrived; the workers were told to stop, and have.
        StorageError: A worker died.
    """
    size = min(workers, len(jobs))
    crew = [_hire(function, size) for _ in range(size)]
    waiting = iter(jobs)
    busy: set[Connection] = set()
    with deferred_signals() as stop:
        try:
            for (_, pipe), job in zip(crew, waiting, strict=False):
                pipe.send(job)
                busy.add(pipe)
            while busy:
                for pipe in cast("list[Connection]", connection.wait(busy, timeout=_GLANCE)):
                    busy.remove(pipe)
                    result = _receive(pipe)
                    for job in itertools.islice(waiting, 1):
                        pipe.send(job)
                        busy.add(pipe)
                    yield result
                if stop.signal_name:
                    raise StoppedBySignal(f"stopped by {stop.signal_name}. The same command goes on from here.")
        finally:
            for process, pipe in crew:
                if pipe in busy:
                    process.terminate()  # Which a run takes as a wish to stop: it ends its step and saves.
                pipe.close()  # Without a pipe to read from, a worker ends.
            for process, _ in crew:
                process.join()


def _hire(function: Callable[[_Job], _Result], workers: int) -> tuple[BaseProcess, Connection]:
    """Start a worker with a pipe of its own: nothing is shared, so one that is killed can't hold up the others."""
    context = multiprocessing.get_context("spawn")  # A fork would copy locks that torch's threads hold.
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs, workers))
    process.start()
    theirs.close()  # So that the pipe ends when the worker does.
    return process, pipe


def _receive(pipe: Connection) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise StorageError(
            "a worker died; unless it said why, it was killed, most likely for want of memory. "
            "Take fewer --workers; the same command goes on from here."
        ) from None
    if error is not None:
        raise error
    return result


def _work(function: Callable[[_Job], _Result], pipe: Connection, workers: int) -> None:
    """Do what comes through the pipe, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The terminal sends it to all; the parent passes it on once.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # A second signal, as a scheduler sends one to all of a group, interrupts a step: the run is at its last checkpoint.
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            job = pipe.recv()
            try:
                pipe.send((function(job), None))
            except SmoloraError as error:
                pipe.send((None, error))


def run_on_ray(function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, address: str) -> Iterator[_Result]:
    """Yield `function(job)` of every job, computed by the Ray cluster at `address`, a core each.

    Its machines must see the same files under the same paths.

    Raises:
        ConfigError: Ray isn't installed.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("--ray: Ray isn't installed. Install it (pip install ray), or use --workers.") from None
    ray.init(address=address)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(function)
        pending = [remote.remote(job) for job in jobs]
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            yield ray.get(done[0])
    finally:
        ray.shutdown()


def _die_with_parent() -> None:
    """Wait for the parent's end and go at once: an orphan would hold the locks of runs that are to be continued."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)
