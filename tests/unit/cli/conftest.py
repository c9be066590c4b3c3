"""Command lines run in this process, which is given back as it was."""

from __future__ import annotations

import pytest

from smolora.cli.app import run
from tests.tiny import save_tiny_model


@pytest.fixture
def smolora(capsys, monkeypatch):
    """Return a function that runs one command line and returns (exit code, stdout, stderr)."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "KINETO_LOG_LEVEL": "6"}
    for name, value in quiet.items():
        monkeypatch.setenv(name, value)

    def command(*arguments):
        exit_code = run([str(argument) for argument in arguments])
        return exit_code, *capsys.readouterr()

    return command


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny base model on disk."""
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Sixty rows of prompt and completion."""
    file = tmp_path_factory.mktemp("cli-data") / "rows.csv"
    lines = [f"name {number},the cat sat {number}" for number in range(60)]
    file.write_text("\n".join(["mr,ref", *lines]) + "\n")
    return file
