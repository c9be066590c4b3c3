"""Independent runs side by side: over processes of this machine, or over the machines of a Ray cluster.

Results come in the order in which runs end. The first error ends all: runs under way stop at a step boundary.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import multiprocessing
import multiprocessing.context
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from smolora.errors import ConfigError, SmoloraError, StoppedBySignal, StorageError
from smolora.runtime.signals import StopRequest, deferred_signals

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_GLANCE = 0.2
"""Seconds between two looks for a signal."""

_STOPPING = "the runs under way finish their step and save"
"""What a signal makes stderr say."""

_PATIENCE = 10.0
"""Seconds that a cluster has to answer."""


def run_on_processes(
    function: Callable[[_Item], _Result], items: Sequence[_Item], *, workers: int
) -> Iterator[_Result]:
    """Yield `function(item)` of every item, computed by at most so many fresh processes that share the cores.

    The function and the items must be picklable. A script that calls this needs `if __name__ == "__main__":`.

    Raises:
        StoppedBySignal: A signal arrived; the workers were told to stop, and have.
        StorageError: A worker died.
    """
    size = min(workers, len(items))
    threads = max(1, torch.get_num_threads() // max(1, size))
    crew = [_hire(function, threads) for _ in range(size)]
    waiting = iter(items)
    busy: set[Connection] = set()
    with deferred_signals(_STOPPING) as stop:
        try:
            for (_, pipe), item in zip(crew, waiting, strict=False):
                pipe.send(item)
                busy.add(pipe)
            while busy:
                for pipe in cast("list[Connection]", connection.wait(busy, timeout=_GLANCE)):
                    busy.remove(pipe)
                    result = _receive(pipe)
                    for item in itertools.islice(waiting, 1):
                        pipe.send(item)
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


def _hire(function: Callable[[_Item], _Result], threads: int) -> tuple[BaseProcess, Connection]:
    """Start a worker with a pipe of its own: nothing is shared, so one that is killed can't hold up the others."""
    context = _choose_context(function.__module__)
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs, threads))
    with _held_back_interrupt():
        process.start()
    theirs.close()  # So that the pipe ends when the worker does.
    return process, pipe


def _choose_context(module: str) -> multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext:
    """Return how workers are started: never as forks of this process, which would copy locks that torch's threads hold.

    On Linux they are forks of a process that has imported `module` and computed nothing, so that the seconds and the
    memory of imports are spent once. macOS's libraries don't bear a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


@contextmanager
def _held_back_interrupt() -> Iterator[None]:
    """Start processes that Ctrl-C, which a terminal sends to all of a group, doesn't reach: the parent passes it on."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def _work(function: Callable[[_Item], _Result], pipe: Connection, threads: int) -> None:
    """Do what comes through the pipe, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The terminal sends it to all; the parent passes it on once.
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # A later signal, as a scheduler sends one to all of a group, interrupts a step: the run is at its last checkpoint.
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            item = pipe.recv()
            pipe.send(_attempt(function, item))


def run_on_ray(function: Callable[[_Item], _Result], items: Sequence[_Item], *, address: str) -> Iterator[_Result]:
    """Yield `function(item)` of every item, computed by the Ray cluster at `address`, a core each.

    Its machines must have this package and see the same files under the same paths.

    Raises:
        ConfigError: Ray isn't installed, or no cluster is there.
        StoppedBySignal: A signal arrived; the runs were told to stop, and have.
        StorageError: A worker died.
    """
    with deferred_signals(_STOPPING) as early:  # Which also puts back the handler that Ray replaces.
        ray = _join_cluster(address)
        try:
            yield from _spread(ray, function, items, early)
        finally:
            ray.shutdown()


def _spread(
    ray: Any, function: Callable[[_Item], _Result], items: Sequence[_Item], early: StopRequest
) -> Iterator[_Result]:
    """Hand the items to Ray and yield their results; `early` is what arrived while the cluster was joined."""
    attempt = ray.remote(num_cpus=1, max_retries=0)(_attempt_in)
    here = Path.cwd()
    with deferred_signals(_STOPPING) as stop:  # Anew, since Ray takes SIGTERM for itself when it starts.
        pending = [attempt.remote(here, function, item) for item in items]
        try:
            while pending:
                done, pending = ray.wait(pending, num_returns=1, timeout=_GLANCE)
                for answer in done:
                    yield _fetch(ray, answer)
                if name := early.signal_name or stop.signal_name:
                    raise StoppedBySignal(f"stopped by {name}. The same command goes on from here.")
        finally:
            for answer in pending:
                ray.cancel(answer)  # Reaches a run as SIGINT does: it ends its step and saves.
            if pending:
                ray.wait(pending, num_returns=len(pending))


def _join_cluster(address: str) -> Any:
    """Return Ray, connected to the cluster at `address`; "local" starts one for as long as it is needed."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "--ray: Ray isn't installed. Install it (pip install 'smolora[ray]'), or use --workers."
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # A cluster that is started here reports to nobody.
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself needs minutes to find out that nobody is there.
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--ray: no cluster at '{address}': {error}. Give host:port of one that runs, auto for the one of this "
            "machine, or local to start one."
        ) from None
    return ray


def _attempt_in(
    folder: Path, function: Callable[[_Item], _Result], item: _Item
) -> tuple[_Result | None, SmoloraError | None]:
    """Do an item where the command was given, as its paths may be relative to that; a worker of Ray is elsewhere."""
    os.chdir(folder)
    return _attempt(function, item)


def _attempt(function: Callable[[_Item], _Result], item: _Item) -> tuple[_Result | None, SmoloraError | None]:
    """Return the result of an item, or the error that a person can act on."""
    try:
        return function(item), None
    except SmoloraError as error:
        return None, error


def _fetch(ray: Any, answer: Any) -> Any:
    try:
        result, error = ray.get(answer)
    except ray.exceptions.RayError as lost:
        raise StorageError(f"a worker died: {lost}\nThe same command goes on from here.") from None
    if error is not None:
        raise error
    return result


def _die_with_parent() -> None:
    """Wait for the parent's end and go at once: an orphan would hold the locks of runs that are to be continued."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)
