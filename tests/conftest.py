"""What every test starts from."""

from __future__ import annotations

import io
import signal

import pytest
from PIL import Image

import smolora.analysis.report
from smolora.analysis.canvas import render_png


def pytest_configure():
    """Heed Ctrl-C even where the shell ignores it, as it does for a script's background job: runs would do so too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def sketched_reports():
    """Leave the pictures of a run's report white: painting them takes longer than the run, of hundreds in these tests.

    They are laid out as ever. What looks at them asks for `painted_reports`.
    """
    white = io.BytesIO()
    Image.new("L", (1, 1), 255).save(white, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smolora.analysis.report, "render_png", lambda figure: white.getvalue())
        yield


@pytest.fixture
def painted_reports(monkeypatch):
    """Paint the pictures of reports."""
    monkeypatch.setattr(smolora.analysis.report, "render_png", render_png)
