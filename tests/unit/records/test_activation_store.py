"""What was stored comes back, or nothing does: after a kill, damage, another identity, or at the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolora.errors import StorageError
from smolora.records.activation_store import ActivationStore
from tests.full_disk import files_of_at_most

IDENTITY = {"layer": 2}


def filled(folder, limit=100):
    store = ActivationStore(folder, IDENTITY, limit=limit)
    store.append("a", b"first")
    store.append("b", b"second")
    return store


def test_what_was_stored_is_read_now_and_by_the_next_process(tmp_path):
    for store in (filled(tmp_path / "s"), ActivationStore(tmp_path / "s", IDENTITY, limit=100)):
        assert [bytes(store.read(key)) for key in "ab"] == [b"first", b"second"]
        assert store.read("c") is None


def test_a_record_torn_by_a_kill_is_not_there_and_the_next_one_is_whole(tmp_path):
    filled(tmp_path / "s")
    with (tmp_path / "s" / "data.bin").open("ab") as file:
        file.write(b"thi")
    with (tmp_path / "s" / "index.jsonl").open("a") as file:
        file.write('["c", 11')
    store = ActivationStore(tmp_path / "s", IDENTITY, limit=100)
    assert "c" not in store
    store.append("d", b"fourth")
    assert bytes(ActivationStore(tmp_path / "s", IDENTITY, limit=100).read("d")) == b"fourth"


def test_a_flipped_bit_is_noticed(tmp_path):
    store = filled(tmp_path / "s")
    content = bytearray((tmp_path / "s" / "data.bin").read_bytes())
    content[1] ^= 1
    (tmp_path / "s" / "data.bin").write_bytes(content)
    assert store.read("a") is None
    assert bytes(store.read("b")) == b"second"


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{")], ids=["gone", "damaged"])
@pytest.mark.parametrize("name", ["data.bin", "index.jsonl", "identity.json"])
def test_what_a_file_is_missing_of_is_stored_anew(tmp_path, name, damage):
    filled(tmp_path / "s")
    damage(tmp_path / "s" / name)
    store = ActivationStore(tmp_path / "s", IDENTITY, limit=100)
    assert store.read("a") is None
    store.append("a", b"again")
    assert bytes(store.read("a")) == b"again"


def test_data_that_goes_away_is_as_if_it_had_not_been_stored(tmp_path):
    store = filled(tmp_path / "s")
    (tmp_path / "s" / "data.bin").unlink()
    assert store.read("a") is None


def test_another_identity_empties_it(tmp_path):
    filled(tmp_path / "s")
    store = ActivationStore(tmp_path / "s", {"layer": 3}, limit=100)
    assert "a" not in store
    assert store.num_bytes == 0


def test_what_does_not_fit_is_not_kept(tmp_path):
    store = filled(tmp_path / "s", limit=8)
    assert "a" in store
    assert "b" not in store
    assert store.num_bytes == 5


def test_a_full_disk_is_said_and_gets_its_room_back(tmp_path):
    store = filled(tmp_path / "s", limit=10_000)
    with files_of_at_most(5_000), pytest.raises(StorageError, match=r"can't write .*s: File too large"):
        store.append("c", b"c" * 9_000)
    assert [(tmp_path / "s" / name).stat().st_size for name in ("data.bin", "index.jsonl")] == [0, 0]
    assert "a" not in store
    assert not store.append("d", b"fourth")
    again = filled(tmp_path / "s")
    assert [bytes(again.read(key)) for key in "ab"] == [b"first", b"second"]
