"""A mistaken name of a model is said at once; a right one costs nothing more."""

from __future__ import annotations

import pytest

from smolora.errors import ModelError
from smolora.models.folders import require_model


@pytest.mark.parametrize(("status", "reason"), [(404, "it has no such model"), (503, "it can't be reached")])
def test_a_model_that_neither_folder_nor_cache_nor_hub_has_is_named(hub, status, reason):
    hub.status = status
    with pytest.raises(ModelError, match=f"no folder 'someone/model' here, and the hub didn't give it: {reason}"):
        require_model("someone/model")
    assert hub.requests == ["/api/models/someone/model"]


@pytest.mark.parametrize("name", ["./modles/tiny", "models/tniy"])
def test_of_a_mistaken_name_the_nearest_folder_is_said(hub, tmp_path, monkeypatch, name):
    hub.status = 404
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="Did you mean 'models/tiny'?"):
        require_model(name)


def test_of_a_model_in_the_cache_the_hub_is_not_asked(hub, tmp_path):
    model = tmp_path / "hub-cache" / "models--someone--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (model / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    require_model("someone/model")
    assert hub.requests == []


def test_of_a_folder_the_hub_is_not_asked(hub, tmp_path):
    require_model(tmp_path)
    assert hub.requests == []
