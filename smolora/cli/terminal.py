"""What every verb does before it imports anything heavy."""

from __future__ import annotations

from rich.console import Console

from smolora.runtime.console import show_log, silence_libraries, stderr_console


def open_terminal(*, quiet: bool = False) -> Console:
    """Silence the libraries, show the package's log on stderr, and return the console that shares it."""
    silence_libraries()
    console = stderr_console(quiet)
    show_log(console)
    return console
