"""Files of benchmarks: found, or downloaded once and held to their SHA-256."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import threading

import pytest

from smolora.data.benchmark_files import RECORD, cache_folder, fetch_file, warn_if_changed
from smolora.errors import DataError
from tests.unit.data.conftest import require_shared


@pytest.fixture
def site(tmp_path):
    """Files on a server of this machine; returns their folder and address."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing on stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_download_comes_once_and_is_recorded(site, tmp_path):
    folder, address = site
    (folder / "rows.csv").write_text("a\n1\n")
    file = fetch_file("e2e_nlg", [f"{address}/rows.csv"], tmp_path / "cache")
    (folder / "rows.csv").unlink()
    assert fetch_file("e2e_nlg", [f"{address}/rows.csv"], tmp_path / "cache") == file
    assert file.read_text() == "a\n1\n"
    assert list(json.loads((tmp_path / "cache" / RECORD).read_text())) == ["rows.csv"]


def test_a_recorded_file_that_changed_is_refused(site, tmp_path):
    folder, address = site
    (folder / "rows.csv").write_text("a\n1\n")
    file = fetch_file("e2e_nlg", [f"{address}/rows.csv"], tmp_path)
    file.write_text("a\n2\n")
    with pytest.raises(DataError, match=r"has SHA-256 .*, not .*Delete it"):
        fetch_file("e2e_nlg", [f"{address}/rows.csv"], tmp_path)


def test_a_download_under_a_pinned_name_must_be_the_official_file(site, tmp_path):
    folder, address = site
    (folder / "devset.csv").write_text("mr,ref\n")
    with pytest.raises(DataError, match="not fc26b78c"):
        fetch_file("e2e_nlg", [f"{address}/devset.csv"], tmp_path / "cache")


@pytest.fixture
def torn():
    """A server that promises more bytes than it sends, or no answer that is one."""

    class Torn(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/rows.csv":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
            self.wfile.write(b"a\n1\n")

        def log_message(self, *_):
            """Say nothing on stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Torn) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("name", "reason"), [("rows.csv", "it ends after 4 of 1,000 bytes"), ("none.csv", "")])
def test_a_download_that_breaks_off_is_not_kept(torn, tmp_path, name, reason):
    with pytest.raises(DataError, match=f"can't be downloaded: {reason}"):
        fetch_file("e2e_nlg", [f"{torn}/{name}"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network_the_folder_is_asked_for(site, tmp_path):
    _, address = site
    with pytest.raises(DataError, match=r"can't be downloaded: HTTP Error 404.*--data-dir"):
        fetch_file("e2e_nlg", [f"{address}/none.csv"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(DataError, match="samsum can't be downloaded file by file"):
        fetch_file("samsum", [], tmp_path)


def test_the_cache_is_where_the_system_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("squad") == tmp_path / "smolora" / "benchmarks" / "squad"


def test_a_file_that_isnt_the_official_one_is_used_with_a_warning(tmp_path, caplog):
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\n")
    with caplog.at_level(logging.WARNING, logger="smolora"):
        warn_if_changed(require_shared("data/e2e/testset_w_refs.csv"))
        assert caplog.text == ""
        warn_if_changed(tmp_path / "testset_w_refs.csv")
    assert "can't be held against published ones" in caplog.text
