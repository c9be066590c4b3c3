"""What of a run's position survives a resume, and what a step leaves in the metrics."""

from __future__ import annotations

import json

from smolora.training.state import StepRecord, TrainerState

STATE = TrainerState(
    total_steps=9,
    step=4,
    base_eval_loss=2.5,
    best_eval_loss=0.1 + 0.2,
    best_step=3,
    should_stop=True,
    stop_reason="enough",
    checksums={"w": 7},
)


def test_a_state_comes_back_from_json_as_it_was():
    restored = TrainerState()
    restored.restore(json.loads(json.dumps(STATE.to_dict())))
    assert restored.to_dict() == STATE.to_dict()


def test_a_resumed_run_keeps_its_own_length_and_is_not_stopped():
    restored = TrainerState(total_steps=20)
    restored.restore(STATE.to_dict())
    assert (restored.total_steps, restored.should_stop, restored.stop_reason) == (20, False, None)


def test_a_state_holds_what_a_checkpoint_needs_and_nothing_else():
    assert set(STATE.to_dict()) == {
        "step",
        "base_eval_loss",
        "best_eval_loss",
        "best_step",
        "checksums",
        "waiting",
        "unevaluated",
    }


def test_a_state_of_an_older_version_lacks_what_came_later():
    kept = STATE.to_dict()
    del kept["unevaluated"]
    restored = TrainerState()
    restored.restore(kept)
    assert restored.to_dict() == STATE.to_dict()


def test_what_a_state_does_not_know_is_left_out():
    restored = TrainerState()
    restored.restore({**STATE.to_dict(), "of_the_future": 1})
    assert "of_the_future" not in vars(restored)


RECORD = StepRecord(
    step=2, loss=1.5, grad_norm=0.5, learning_rate=1e-3, tokens=10, input_tokens=40, seconds=0.5
)  # fmt: skip


def test_the_speed_is_input_tokens_over_the_time_of_the_step():
    assert RECORD.tokens_per_second == 80.0


def test_a_step_becomes_the_columns_of_the_metrics():
    assert RECORD.to_dict() == {
        "step": 2,
        "loss": 1.5,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens": 10,
        "input_tokens": 40,
        "tokens_per_second": 80.0,
        "phase": 0,
    }
