"""What every verb does before it imports anything heavy."""

from __future__ import annotations

import logging
import os
import sys
from io import TextIOWrapper

from rich.console import Console

from smolora.errors import ConfigError
from smolora.runtime.console import show_log, silence_libraries, stderr_console
from smolora.runtime.launch import is_main_launched, launched_processes

_SPINS = 10_000
"""How often a thread of GNU's OpenMP looks before it sleeps, in place of 300,000 times. Beside another busy program an
operation waits for a thread that isn't running, and spinning keeps it from running: 1.7 to 3 times as fast, and on a
quiet machine the same (1,000 would cost it a third)."""


def open_terminal(*, quiet: bool = False, is_shared: bool = False) -> Console:
    """Silence the libraries, show the package's log on stderr, and return the console that shares it.

    Args:
        quiet: Whether only warnings are shown.
        is_shared: Whether the verb may be run by several processes; all but the main one then show nothing.

    Raises:
        ConfigError: A launcher started several processes for a verb of one.
    """
    if launched_processes() > 1 and not is_shared:
        raise ConfigError(
            f"this verb takes one process, and WORLD_SIZE asks for {launched_processes()}. Only train and pretrain run "
            "under torchrun and accelerate launch."
        )
    silence_libraries()
    if isinstance(sys.stdout, TextIOWrapper):  # An answer that a terminal has no letters for is still worth printing.
        sys.stdout.reconfigure(errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))  # Read when torch is loaded.
    console = stderr_console(quiet or not is_main_launched())
    show_log(console)
    if not is_main_launched():
        logging.getLogger("smolora").setLevel(logging.ERROR)
    return console
