"""What every verb does before it imports anything heavy."""

from __future__ import annotations

from rich.console import Console

from smolora.runtime.console import show_log, silence_bars, stderr_console


def open_terminal(*, quiet: bool = False) -> Console:
    """Switch the libraries' bars off, show the package's log on stderr, and return the console that shares it."""
    silence_bars()
    console = stderr_console(quiet)
    show_log(console)
    return console
