"""Every error is also the builtin a caller would catch, and has the exit code of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolora import errors


@pytest.mark.parametrize(
    ("error", "builtin", "code"),
    [
        (errors.ConfigError, ValueError, 2),
        (errors.DataError, ValueError, 3),
        (errors.ModelError, ValueError, 4),
        (errors.StorageError, OSError, 5),
        (errors.BrokenRunError, RuntimeError, 6),
        (errors.FolderInUseError, RuntimeError, 7),
        (errors.StoppedBySignal, RuntimeError, 75),
    ],
)
def test_an_error_is_the_builtin_and_has_its_exit_code(error, builtin, code):
    assert issubclass(error, errors.SmoloraError)
    assert issubclass(error, builtin)
    assert error.exit_code == code


def test_an_error_of_another_process_has_that_ones_exit_code():
    assert errors.FailedElsewhere("process 1: no room", 5).exit_code == 5


def test_no_hint_is_given_where_nothing_is_near():
    assert errors.did_you_mean("xyz", ["learning_rate"]) == ""


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("models/tniy", " Did you mean 'models/tiny'?"),
        ("./modles/tiny", " Did you mean 'models/tiny'?"),
        ("modles/tniy/config.json", " Did you mean 'models/tiny/config.json'?"),
        ("models/other", ""),
        ("models/tiny", ""),
        ("models/tiny/config.json/file", ""),
    ],
)
def test_of_a_path_that_is_not_there_the_nearest_one_is_named_part_by_part(tmp_path, monkeypatch, missing, hint):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert errors.suggest_path(Path(missing)) == hint
