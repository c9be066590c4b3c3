"""What every test starts from."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import io
import logging
import os
import signal

import pytest
from packaging.version import Version

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
collect_ignore = [] if HAS_LIGER else ["triton_interpreter.py"]
if HAS_LIGER:
    import torch  # Not above: the process that only hands out tests to others begins seconds sooner without.

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported.


def pytest_configure():
    """Heed Ctrl-C even where the shell ignores it, as it does for a script's background job: runs would do so too.

    Until all tests are collected nothing looks for garbage: among the modules of torch that takes a fifth of the time.
    """
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Look for garbage again, but not among what was imported, and every 10,000 objects: 700 is 2 % of the time."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def sketched_reports():
    """Leave the pictures of a run's report white: painting them takes longer than the run, of hundreds in these tests.

    They are laid out as ever. What looks at them asks for `painted_reports`.
    """
    from PIL import Image

    white = io.BytesIO()
    Image.new("L", (1, 1), 255).save(white, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smolora.analysis.report.render_png", lambda figure: white.getvalue())
        yield


@pytest.fixture(autouse=True)
def fresh_log():
    """Start each test with a log that nobody shows: a verb shows it from then on."""
    logger = logging.getLogger("smolora")
    logger.setLevel(logging.NOTSET)
    logger.handlers = []


@pytest.fixture
def painted_reports(monkeypatch):
    """Paint the pictures of reports."""
    from smolora.analysis.canvas import render_png

    monkeypatch.setattr("smolora.analysis.report.render_png", render_png)


@pytest.fixture
def liger_device(monkeypatch):
    """The device that Liger's kernels run on here: a GPU, else the CPU under triton's interpreter."""
    if not HAS_LIGER:
        pytest.skip("liger-kernel isn't installed: pip install 'smolora[liger]'")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if Version(importlib.metadata.version("triton")) < Version("3.7"):
        pytest.skip("the interpreter of this triton can't loop up to a number it loaded")
    importlib.import_module("tests.triton_interpreter").complete(monkeypatch)
    return torch.device("cpu")
