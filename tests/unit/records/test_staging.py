"""Folders and files appear whole or not at all, and a manifest notices every changed byte."""

from __future__ import annotations

import stat

import pytest

from smolora.errors import ConfigError, StorageError
from smolora.records.staging import find_damage, staged_folder, write_json, write_manifest


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"), staged_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"), staged_folder(tmp_path / "file" / "out"):
        pass


def test_files_are_readable_by_others(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a.txt").touch(mode=0o600)
    assert stat.S_IMODE((tmp_path / "out" / "a.txt").stat().st_mode) == 0o644


@pytest.fixture
def manifested(tmp_path):
    (tmp_path / "weights").write_bytes(b"0123456789")
    write_manifest(tmp_path, {"step": 1})
    return tmp_path


def test_an_untouched_folder_has_no_damage(manifested):
    assert find_damage(manifested) is None


def test_a_flipped_bit_is_named(manifested):
    (manifested / "weights").write_bytes(b"0123456788")
    assert find_damage(manifested) == "weights has changed (its SHA-256 differs)"


def test_a_missing_file_is_named(manifested):
    (manifested / "weights").unlink()
    assert find_damage(manifested) == "weights is missing"


def test_a_short_file_is_named(manifested):
    (manifested / "weights").write_bytes(b"0")
    assert find_damage(manifested) == "weights has 1 bytes, not 10"


def test_a_missing_manifest_is_damage(manifested):
    (manifested / "MANIFEST.json").unlink()
    assert "MANIFEST.json is missing" in (find_damage(manifested) or "")


def test_json_with_a_number_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()
