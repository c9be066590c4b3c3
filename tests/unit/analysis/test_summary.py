"""The summary says what the files hold, in plain words, and says so where they hold too little."""

from __future__ import annotations

import json

import pytest

from smolora.analysis.summary import generate_summary_report
from smolora.errors import DataError
from tests.run_folders import SETTINGS, write_run


def test_it_says_what_was_trained(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run"))
    assert "base with lora: r 8, alpha 16, targets all." in text
    assert "Data: rows.csv." in text
    assert "Trained to step 20 at a peak learning rate of 0.0002" in text


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "full", "path": None}, "full"),
        ({"method": "layernorm", "layers": [0, 1]}, "layernorm: layers 0, 1"),
        ({"method": "vera", "r": 256, "target_modules": "all", "layers": None}, "vera: r 256, targets all"),
        ({"method": "adalora", "init_r": 12, "target_r": 8}, "adalora: r at the start 12, at the end 8"),
        ({"method": "p_tuning", "num_virtual_tokens": 20}, "p_tuning: virtual tokens 20"),
    ],
)
def test_of_a_method_only_what_it_has_is_said(tmp_path, adapter, said):
    text = generate_summary_report(write_run(tmp_path / "run", settings={**SETTINGS, "adapter": adapter}))
    assert f"base with {said}.\n" in text


def test_passes_by_tokens_are_not_told_in_rows(tmp_path):
    settings = {**SETTINGS, "speed": {"max_tokens_per_batch": 512}}
    text = generate_summary_report(write_run(tmp_path / "run", settings=settings))
    assert "up to 512 tokens a pass" in text
    assert "rows a pass" not in text


def test_a_run_that_was_stopped_shows_what_it_was_asked(tmp_path):
    settings = {**SETTINGS, "training": {"max_steps": 1000}}
    assert "Trained to step 20 of 1,000 at" in generate_summary_report(write_run(tmp_path / "run", settings=settings))


@pytest.mark.parametrize(("layers", "said"), [(4, "4 layers"), (1, "1 layer")])
def test_a_pretraining_run_is_told_by_its_shape(tmp_path, layers, said):
    settings = {"gpt": {"num_layers": layers, "width": 64, "context": 128}, "training": {"max_steps": 20}}
    text = generate_summary_report(write_run(tmp_path / "run", settings=settings, has_gradients=False))
    assert f"A GPT from nothing: {said}, width 64, context 128." in text
    assert "this run kept no gradient log" in text


def test_a_lost_configuration_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "resolved_config.yaml").unlink()
    assert "resolved_config.yaml is lost" in generate_summary_report(run)


def test_the_best_step_and_what_came_after_are_said(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run", eval_losses={0: 4.0, 10: 2.0, 20: 2.5}))
    assert "Held-out loss 4.000 at step 0, lowest 2.000 at step 10, 2.500 at the end (step 20)." in text
    assert "After step 10 it rose by 25.0 %" in text


def test_a_run_that_has_not_learned_is_called_that(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run", eval_losses={0: 2.0, 20: 2.5}))
    assert "this run has not learned" in text


def test_a_run_without_held_out_rows_is_not_praised(tmp_path):
    assert "nothing here tells learning from memorising" in generate_summary_report(write_run(tmp_path / "run"))


def test_the_layers_that_carried_the_gradient_are_named_by_phase(tmp_path):
    run = write_run(tmp_path / "run", phases=(("early", 10), ("late", 20)), num_layers=4)
    text = generate_summary_report(run)
    assert "Phase 1 (logged steps 1-10), by group: 80 % in mlp, 20 % in attention." in text
    assert "Phase 1 (logged steps 1-10): 80 % in layer 1 (an even share is 50 %)." in text
    assert "Phase 2 (logged steps 11-20): from 36 % in layer 2 to 64 % in layer 3." in text
    assert "Phase 1 (logged steps 1-10): attention and mlp, layers 0 to 1, 400 trainable parameters; " in text
    assert "training loss 3.142 to 2.420" in text
    assert "(means of 5 logged steps)" in text


@pytest.mark.parametrize(
    ("squares", "said"),
    [
        ((30, 36, 45), "spread evenly, from 27 % in layer 0 to 41 % in layer 2"),
        ((30, 36, 46), "from 27 % in layer 0 to 41 % in layer 2"),
        ((30,), "all of it in layer 0"),
    ],
)
def test_layers_are_called_even_up_to_one_and_a_half_times_the_smallest_share(tmp_path, squares, said):
    run = write_run(tmp_path / "run")
    header = "step,phase," + ",".join(f"layer_{layer}_mlp" for layer in range(len(squares)))
    norms = ",".join(str(square**0.5) for square in squares)
    lines = [header, *(f"{step},0,{norms}" for step in range(1, 21))]
    (run / "gradient_analysis.layer_norms.csv").write_text("\n".join(lines) + "\n")
    assert f"- By layer: {said}.\n" in generate_summary_report(run)


def test_a_phase_that_trained_one_matrix_alone_is_described_with_it(tmp_path):
    table = [{"groups": ["attention", "mlp"], "matrices": None}, {"groups": ["mlp"], "matrices": "B"}]
    settings = {**SETTINGS, "phases": {"table": table}}
    text = generate_summary_report(write_run(tmp_path / "run", phases=(("both", 10), ("mlp", 20)), settings=settings))
    assert "Phase 1 (logged steps 1-10): attention and mlp, 600 trainable parameters" in text
    assert "Phase 2 (logged steps 11-20): mlp, B, 300 trainable parameters" in text


def test_how_far_a_phase_moved_is_said_where_it_was_measured(tmp_path):
    run = write_run(tmp_path / "run", phases=(("both", 10), ("mlp", 20)))
    first = {"attention": {"relative_distance": 0.125}, "mlp": {"relative_distance": 0.5}}
    second = {"attention": {"relative_distance": None}, "mlp": {"relative_distance": 0.25}}
    phases = [
        {"phase": 1, "groups": first, "problems": []},
        {"phase": 2, "groups": second, "problems": ["2 tensors moved though frozen, first a"]},
    ]
    (run / "phase_report.json").write_text(json.dumps({"starts": [0, 10], "phases": phases}))
    text = generate_summary_report(run)
    assert "; moved, of its length: attention by 12.5 %, mlp by 50.0 %.\n" in text
    assert "mlp by 25.0 %; the certificate failed: 2 tensors moved though frozen, first a.\n" in text


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"phases": 3}', '{"phases": [1, {"phase": 1, "groups": [2]}]}'])
def test_a_phase_report_that_cannot_be_read_is_passed_over(tmp_path, report):
    run = write_run(tmp_path / "run", phases=(("both", 10), ("mlp", 20)))
    (run / "phase_report.json").write_text(report)
    assert "moved" not in generate_summary_report(run).split("Phases")[1]


def test_a_run_without_phases_is_told_by_thirds(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run", phases=(("both", 9),)))
    assert "First third (logged steps 1-3): 64 % in layer 2 (an even share is 33 %)." in text
    assert "Last third (logged steps 7-9)" in text
    assert "\nPhases\n" not in text


def test_spikes_and_stalls_are_said_with_their_rule(tmp_path):
    losses = [4 - 0.05 * step for step in range(40)] + [2.0] * 40
    losses[60] = 6.0
    run = write_run(tmp_path / "run", phases=(("both", 80),), losses=losses, norms={50: 20.0})
    text = generate_summary_report(run)
    assert "The training loss stalled in steps 4" in text
    assert "1 spike of the loss: step 61; the highest 3.0 times what came before it." in text
    assert "1 spike of the gradient norm: step 50" in text
    assert "6 robust standard deviations" in text


def test_a_phase_is_named_as_the_run_itself_said(tmp_path):
    run = write_run(tmp_path / "run", phases=(("mlp", 10), ("attention", 20)))
    report = {"starts": [0, 10], "selects": ["*.down_proj", "B, *.v_proj"], "phases": []}
    (run / "phase_report.json").write_text(json.dumps(report))
    text = generate_summary_report(run)
    assert "Phase 1 (logged steps 1-10): *.down_proj, 300 trainable" in text
    assert "Phase 2 (logged steps 11-20): B, *.v_proj, 300 trainable" in text


def test_shares_over_the_whole_of_a_phased_run_are_not_said(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run", phases=(("early", 5), ("late", 20)), num_layers=4))
    assert "By layer:" not in text
    assert "the mean shares of each phase by itself" in text


def test_a_run_that_was_stopped_got_as_far_as_its_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", settings={**SETTINGS, "training": {"max_steps": 60}})
    (run / "step-000010").mkdir()
    (run / "step-000025").mkdir()
    assert "Trained to step 25 of 60 at" in generate_summary_report(run)


def test_a_phase_that_has_hardly_any_gradient_is_said(tmp_path):
    tiny = dict.fromkeys(range(11, 21), 1e-4)
    text = generate_summary_report(write_run(tmp_path / "run", phases=(("both", 10), ("mlp", 20)), norms=tiny))
    assert "In phase 2 the median gradient norm is 5e-05, after 2 in the phase before: there is hardly any" in text
    calm = generate_summary_report(write_run(tmp_path / "calm", phases=(("both", 10), ("mlp", 20))))
    assert "hardly any gradient" not in calm


def test_a_calm_run_has_neither(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run", losses=[4 - 0.1 * step for step in range(20)]))
    assert "did not stall" in text
    assert "No spike of the loss." in text
    assert "No spike of the gradient norm." in text


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_steps_are_called_too_few(tmp_path, count):
    text = generate_summary_report(write_run(tmp_path / "run", phases=(("both", count),)))
    assert f"{count} logged step{'s' * (count > 1)}: too few to say where it learned, stalled or spiked" in text
    assert "spike of" not in text
    assert "layer" not in text


def test_a_stall_needs_twenty_steps(tmp_path):
    text = generate_summary_report(write_run(tmp_path / "run", phases=(("both", 8),)))
    assert "8 logged steps are too few to see a stall (20 at least)." in text


def test_a_run_that_has_only_begun_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 4.1}\n')
    assert "No training step is logged as yet." in generate_summary_report(run)


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        generate_summary_report(tmp_path)
