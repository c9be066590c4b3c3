"""What every test starts from."""

from __future__ import annotations

import signal


def pytest_configure():
    """Heed Ctrl-C even where the shell ignores it, as it does for a script's background job: runs would do so too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
