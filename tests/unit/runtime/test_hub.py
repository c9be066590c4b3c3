"""What the hub says of a name, asked once."""

from __future__ import annotations

import huggingface_hub
import pytest

from smolora.runtime.hub import find_hub_problem


@pytest.mark.parametrize(
    ("status", "problem"),
    [(404, "it has no such model"), (500, "it can't be reached"), (200, "it can't be")],
)
def test_an_answer_that_is_no_model_is_a_problem_after_one_request(hub, status, problem):
    hub.status = status  # With 200 comes an empty page, as of a hotel's network.
    assert find_hub_problem("someone/model", "model").startswith(problem)
    assert hub.requests == ["/api/models/someone/model"]


def test_a_hub_that_nobody_answers_for_is_a_problem(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_hub_problem("someone/model", "model").startswith("it can't be reached (")


def test_a_name_that_no_hub_has_is_not_asked_for(hub):
    assert find_hub_problem("my data", "dataset") == "no name there looks like this"
    assert hub.requests == []
