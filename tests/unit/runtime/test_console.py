"""What people read goes to stderr, as plain lines."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from smolora.runtime.console import show_log, silence_libraries, stderr_console


@pytest.fixture
def log():
    return logging.getLogger("smolora.some.module")


def test_information_is_a_plain_line_and_a_warning_says_so(log, capsys):
    show_log(stderr_console())
    log.info("device: cpu [bold]%s[/bold] :cat: %s", "x", "long " * 60)
    log.warning("careful")
    log.debug("never shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"device: cpu [bold]x[/bold] :cat: {'long ' * 60}\nwarning: careful\n"


def test_a_quiet_console_shows_warnings_only(log, capsys):
    console = stderr_console(quiet=True)
    show_log(console)
    console.print("progress")
    log.info("information")
    log.warning("careful")
    assert capsys.readouterr().err == "warning: careful\n"


def test_showing_the_log_twice_prints_each_line_once(log, capsys):
    show_log(stderr_console())
    show_log(stderr_console())
    log.info("once")
    assert capsys.readouterr().err == "once\n"


@pytest.mark.parametrize("open_stderr", [os.pipe, getattr(os, "openpty", os.pipe)])
def test_work_goes_on_when_nobody_reads_what_is_said_of_it(open_stderr):
    script = """
import sys
from smolora.runtime.console import stderr_console
sys.stdin.read()
for _ in range(3):
    stderr_console().print("progress")
print("done")
"""
    reader, stderr = open_stderr()
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as process:
        os.close(stderr)
        os.close(reader)
        process.stdin.close()
        assert process.stdout.read() == b"done\n"
    assert process.returncode == 0


def test_what_a_person_set_about_bars_stays(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    silence_libraries()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"


def test_no_bar_of_the_libraries_is_left():
    script = """
from smolora.runtime.console import silence_libraries
silence_libraries()
import datasets
datasets.Dataset.from_dict({"a": list(range(10))}).map(lambda row: row)
from transformers.utils import logging
list(logging.tqdm(range(3)))
"""
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_profiler_of_torch_says_nothing_of_itself():
    script = """
from smolora.runtime.console import silence_libraries
silence_libraries()
import torch
with torch.profiler.profile():
    torch.ones(2) + 1
"""
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
