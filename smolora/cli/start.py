"""The verbs of a first visit: doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smolora.cli.terminal import open_terminal


def doctor() -> None:
    """Show what this machine offers: device, number type, threads, memory, disk, versions and optional parts."""
    from smolora.runtime.doctor import examine_machine

    for fact in examine_machine():
        print(f"{fact.name:<24}{fact.value}")


def demo(*, out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("demo-run"), text: Path | None = None) -> None:
    """Walk the whole way in a few minutes: pretrain a small GPT, fine-tune, merge and ask it, before and after.

    Args:
        out: Folder to write; it must not exist yet.
        text: A file or folder of your own text to pretrain on.
    """
    console = open_terminal()
    from smolora.recipes.demo import run_demo

    run_demo(out, text, console=console)
