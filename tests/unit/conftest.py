"""A hub on this machine, which has nothing and counts who asks."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest


class EmptyHub(HTTPServer):
    """Answers every request with `status`."""

    status = 404

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.requests = []


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/api/agent-harnesses":  # Which huggingface_hub asks once a process, of its own accord.
            self.server.requests.append(self.path)
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", "RepoNotFound" if self.server.status == 404 else "")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        """Say nothing on stderr."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub that huggingface_hub asks in this test, with an empty cache."""
    with EmptyHub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
