"""Phases train what they declare and nothing else, and a stop anywhere changes no bit.

The traps: momentum and weight decay move zeroed tensors, a late phase that gets no gradient, optimisers built while
something is frozen, groups found by a part of a name.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter
from smolora.adapters.tensor_places import locate_tensors
from smolora.config import DynamicLoRAConfig, EvaluationConfig, LoRAConfig, PhaseConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.errors import BrokenRunError, ConfigError, ModelError, StoppedBySignal
from smolora.models.loading import load_model
from smolora.records.gradient_log import GradientNormLog
from smolora.records.run_dir import RunDir
from smolora.training.callback import Callback
from smolora.training.checkpoint import RunIdentity
from smolora.training.gradients import GradientNormCallback
from smolora.training.optim import trainable_parameters
from smolora.training.phase_plan import build_phase_plan
from smolora.training.phases import DynamicLoRACallback, create_layerwise_lora_config, create_phased_lora_config
from smolora.training.plan import StepPlan
from smolora.training.trainer import Trainer
from tests.tiny import VOCAB_SIZE, save_tiny_model, sweep
from tests.unit.training.recorder import KillInEvaluation

STRATEGIES = ("both,mlp,attn", "attn,mlp,both", "both,mlp,both", "early,late")
SOME = sweep("both,mlp,attn", "early,late", slow=("attn,mlp,both", "both,mlp,both"))
KEPT_OR_RECOMPUTED = [pytest.param(False, id="kept"), pytest.param(True, id="recomputed", marks=pytest.mark.slow)]
STEPS = 9


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    return {family: save_tiny_model(family, folder / family) for family in ("llama", "gpt2")}


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    lengths = random.integers(4, 16, size=12)
    return TokenDataset(
        [build_example(random.integers(1, VOCAB_SIZE, size=int(n)).tolist(), [(int(n) // 2, int(n))]) for n in lengths]
    )


@pytest.fixture
def make(bases, rows):
    """Return a function that builds a Trainer with phases on a fresh, equally seeded adapter."""

    def make(
        phases, *more, family="llama", run=None, target="all", dropout=0.1, before=(), eval_dataset=None, **settings
    ):
        adapter = LoRAConfig(r=2, lora_dropout=dropout, target_modules=target)
        bundle = attach_adapter(load_model(str(bases[family])), adapter, seed=0)
        defaults = {
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
            "save_total_limit": 9,
            "logging_steps": 1,
            "weight_decay": 0.1,
        }
        report = run.phase_report if run else None
        return Trainer(
            bundle,
            rows,
            TrainingConfig(**{**defaults, **settings}),
            collate=collate_packed,
            eval_dataset=eval_dataset,
            run_dir=run,
            identity=RunIdentity(base="b", tokenizer="t", data="d"),
            callbacks=[*before, DynamicLoRACallback(phases, report_path=report), *more],
        )

    return make


def new_run(folder):
    run = RunDir(folder)
    run.path.mkdir()
    return run


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run")


def strategy(name, **more):
    ends = {"phase1_end": 3} if name == "early,late" else {"phase1_end": 3, "phase2_end": 6}
    return DynamicLoRAConfig(strategy=name, **{**ends, **more})


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


class Watch(Callback):
    """Keeps the weights before each update, and after the last one."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_step_begin(self, trainer):
        self.weights.append(weights(trainer))

    def on_step_end(self, trainer, record):
        self.rates.append(record.learning_rate)

    def on_finish(self, trainer):
        self.weights.append(weights(trainer))

    def moved_in(self, first, last):
        """The tensors that updates first to last changed."""
        return changed(self.weights[first - 1], self.weights[last])


class Crash(Callback):
    """Ends the process before the update that comes after `step`, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, trainer):
        if trainer.state.step == self.step:
            raise ZeroDivisionError


def is_mlp(name):
    return ".mlp." in name


def is_late(name):
    return any(part in name for part in (".layers.1.", ".h.1."))


EXPECTED = {
    "both": lambda _: True,
    "mlp": is_mlp,
    "attn": lambda name: not is_mlp(name),
    "early": lambda name: not is_late(name),
    "late": is_late,
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("checkpointing", KEPT_OR_RECOMPUTED)
def test_each_phase_moves_exactly_its_tensors(make, run, family, name, checkpointing):
    watch = Watch()
    trainer = make(strategy(name), watch, family=family, run=run, gradient_checkpointing=checkpointing)
    trainer.train()
    for number, word in enumerate(name.split(",")):
        first, last = 3 * number + 1, 3 * number + 3
        last = STEPS if name == "early,late" and number else last
        assert watch.moved_in(first, last) == {tensor for tensor in trainer.parameters if EXPECTED[word](tensor)}
    reports = json.loads(run.phase_report.read_text())["phases"]
    assert [report["problems"] for report in reports] == [[]] * len(name.split(","))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SOME)
def test_recomputed_activations_change_no_bit(make, family, name):
    plain, recomputed = (
        make(strategy(name), family=family),
        make(strategy(name), family=family, gradient_checkpointing=True),
    )
    plain.train()
    recomputed.train()
    assert_close(weights(recomputed), weights(plain), rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", KEPT_OR_RECOMPUTED)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("step", [3, 4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 5, 6, 7, 8))])
def test_a_resume_inside_a_phase_and_on_its_boundary_is_bit_equal(make, run, tmp_path, name, step, checkpointing):
    phases = strategy(name, learning_rate="restart", moments="reset")
    whole = new_run(tmp_path / "whole")

    def train(run, *more, resume=False):
        norms = GradientNormCallback(GradientNormLog(run.path))
        trainer = make(phases, norms, *more, run=run, save_steps=1, gradient_checkpointing=checkpointing)
        trainer.train(resume=resume)
        return weights(trainer)

    expected = train(whole)
    with pytest.raises(ZeroDivisionError):
        train(run, Crash(step))
    assert_close(train(run, resume=True), expected, rtol=0, atol=0)
    for file in ("phase_report", "group_norms", "layer_norms", "gradient_summary"):
        assert vars(run)[file].read_text() == vars(whole)[file].read_text(), file


def test_the_certificate_of_an_interrupted_phase_covers_all_of_it(make, run, tmp_path):
    whole = new_run(tmp_path / "whole")
    make(strategy("both,mlp,attn"), run=whole).train()
    with pytest.raises(ZeroDivisionError):
        make(strategy("both,mlp,attn"), Crash(5), run=run).train()  # The newest checkpoint is step 4, inside phase 2.
    make(strategy("both,mlp,attn"), run=run).train(resume=True)
    assert run.phase_report.read_text() == whole.phase_report.read_text()


def test_the_last_state_of_each_phase_is_a_checkpoint_that_stays(make, run):
    watch = Watch()
    make(strategy("both,mlp,attn"), watch, run=run, save_steps=100, save_total_limit=1).train()
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3, 6, 9]
    stored = load_file(run.checkpoint_path(3) / "adapter_model.safetensors")
    found = {name.replace(".weight", ".default.weight"): tensor for name, tensor in stored.items()}
    assert_close(found, watch.weights[3], rtol=0, atol=0)


def test_a_run_that_ended_is_resumed_without_asking_more_of_it_than_before(make, run, caplog):
    attention = DynamicLoRAConfig(table=(PhaseConfig(groups=("attention",)), PhaseConfig(layers=(1, 1))))
    make(attention, run=run).train()
    assert "phases: 6 tensors stay as they are, since no phase trains them; first" in caplog.text
    before = run.phase_report.read_text()
    trainer = make(attention, run=run)
    assert trainer.train(resume=True).step == STEPS
    assert run.phase_report.read_text() == before
    assert all(parameter.requires_grad for parameter in trainer.parameters.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_phase_of_a_strategy_trains_a_head_that_was_drawn(bases, name):
    base = load_model(str(bases["llama"]), task="classification", labels=("no", "yes"))
    bundle = attach_adapter(base, LoRAConfig(r=2, target_modules="all"), seed=0)
    places = locate_tensors(trainable_parameters(bundle.model), bundle.anatomy)
    steps = StepPlan(STEPS, TrainingConfig(max_steps=STEPS))
    known = {"num_layers": 2, "steps": steps, "is_evaluated": False, "has_drawn_head": bundle.has_drawn_head}
    plan = build_phase_plan(strategy(name), places, **known)
    [head] = [place for place, found in places.items() if found.group == "head"]
    assert all(chosen.count(head) == 1 for chosen in plan.tensors)
    assert plan.left_out == ()
    table = build_phase_plan(DynamicLoRAConfig(table=strategy(name).phases), places, **known)
    assert table.left_out == (head,)


def test_a_run_that_ended_can_be_made_longer_and_is_certified_anew(make, run):
    make(strategy("both,mlp,attn"), run=run).train()
    make(strategy("both,mlp,attn"), run=run, max_steps=11).train(resume=True)
    reports = json.loads(run.phase_report.read_text())["phases"]
    assert [(report["start"], report["end"], report["problems"]) for report in reports] == [
        (0, 3, []),
        (3, 6, []),
        (6, 11, []),
    ]


def test_equal_shares_stay_where_they_were_when_a_run_is_made_longer_and_that_is_said(make, run, caplog):
    thirds = DynamicLoRAConfig(enabled=True)
    with pytest.raises(ZeroDivisionError):
        make(thirds, Crash(5), run=run).train()
    with caplog.at_level(logging.INFO, logger="smolora"):
        make(thirds, run=run, max_steps=30).train(resume=True)
    said = "phases: the run had 9 steps and has 30 now; its phases keep their starts, after 0, 3, 6 updates"
    assert said in caplog.messages
    assert json.loads(run.phase_report.read_text())["starts"] == [0, 3, 6]


def test_metrics_and_gradient_rows_name_the_phase_and_its_parameters(make, run):
    trainer = make(strategy("both,mlp,attn"), GradientNormCallback(GradientNormLog(run.path)), run=run)
    trainer.train()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rows = GradientNormLog(run.path).read_groups()
    expected = [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [line["phase"] for line in lines] == [row["phase"] for row in rows] == expected
    sizes = {name: parameter.numel() for name, parameter in trainer.parameters.items()}
    mlp = sum(size for name, size in sizes.items() if is_mlp(name))
    assert [rows[index]["active"] for index in (0, 3, 6)] == [sum(sizes.values()), mlp, sum(sizes.values()) - mlp]
    assert [rows[index]["mlp"] is None for index in (0, 3, 6)] == [False, False, True]
    assert [rows[index]["attention"] is None for index in (0, 3, 6)] == [False, True, False]


def test_everything_can_be_trained_again_after_the_run(make):
    trainer = make(strategy("early,late"))
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.parameters.values())


def test_the_optimiser_knows_every_tensor_from_the_start(make, run):
    make(strategy("both,mlp,attn"), run=run).train()
    state = load_file(run.checkpoint_path(9) / "optim.safetensors")
    steps = {name.removesuffix(".step"): int(step) for name, step in state.items() if name.endswith(".step")}
    assert {is_mlp(name): count for name, count in steps.items()} == {True: 6, False: 6}


def test_a_selector_of_everything_gives_the_bits_of_a_run_without_phases(make, rows):
    phased = make(DynamicLoRAConfig(table=[{}, {"start": 4}]))
    static = Trainer(make(strategy("early,late")).bundle, rows, phased.config, collate=collate_packed)
    phased.train()
    static.train()
    assert_close(weights(phased), weights(static), rtol=0, atol=0)


# What a phase selects


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"groups": "attention"}, lambda name: ".attn." in name),
        ({"groups": "mlp"}, is_mlp),
        ({"layers": [1, 1]}, is_late),
        ({"matrices": "B"}, lambda name: ".lora_B." in name),
        ({"pattern": "*.mlp.c_proj"}, lambda name: ".mlp.c_proj." in name),
        (
            {"groups": ["mlp"], "layers": "early", "matrices": "A"},
            lambda n: is_mlp(n) and not is_late(n) and "_A." in n,
        ),
    ],
)
def test_a_selector_takes_the_tensors_that_all_its_conditions_hold_for(make, selector, expected):
    # GPT-2 has a c_proj in attention and in the MLP, so a part of a name tells nothing.
    trainer = make(DynamicLoRAConfig(table=[{}, {**selector, "start": 4}]), family="gpt2")
    trainer.train()
    plan = trainer.callbacks[0].plan
    assert set(plan.tensors[1]) == {name for name in trainer.parameters if expected(name)}


@pytest.mark.parametrize(
    ("phases", "target", "message"),
    [
        (
            strategy("both,mlp,attn"),
            "attention_only",
            r"phase 2 \(mlp\) trains nothing: the adapter has 8 tensors in attention, in 2 of 2 layers\.",
        ),
        (
            strategy("early,late"),
            ("model.layers.1.self_attn.q_proj",),
            r"phase 1 \(early layers\) trains nothing: .*, in 1 of 2 layers\. Adapt the other layers too",
        ),
        (DynamicLoRAConfig(table=[{"layers": [2, 5]}]), "all", r"phase 1 \(layers 2 to 5\) trains nothing"),
        (DynamicLoRAConfig(table=[{"pattern": "q_proj"}]), "all", r"phase 1 \(q_proj\) trains nothing"),
        (strategy("both,mlp,attn", phase2_end=9), "all", "phase 3 starts after 9 updates and would have none"),
        (DynamicLoRAConfig(table=[{}, {"start": 5}, {"start": {"fraction": 0.2}}]), "all", "phase 2 starts after 5"),
        (DynamicLoRAConfig(strategy="both,mlp,attn", end=12), "all", "a run of 12 steps, and this one has 9"),
    ],
)
def test_a_phase_without_tensors_or_updates_is_refused(make, phases, target, message):
    with pytest.raises(ConfigError, match=message):
        make(phases, target=target).train()


@pytest.mark.parametrize(
    ("start", "expected"),
    [(4, 4), ({"step": 4}, 4), ({"fraction": 0.5}, 4), ({"epoch": 1}, 3), ({"epoch": 1.5}, 4)],
)
def test_a_phase_starts_at_a_step_a_fraction_or_an_epoch(make, start, expected):
    trainer = make(DynamicLoRAConfig(table=[{}, {"groups": "mlp", "start": start}]))
    trainer.train()
    assert trainer.callbacks[0].plan.starts == (0, expected)


# The learning rate and the moments


def test_continue_keeps_the_curve_of_the_whole_run(make):
    watch, plain = Watch(), Watch()
    make(strategy("both,mlp,attn"), watch, warmup_steps=2).train()
    make(DynamicLoRAConfig(table=[{}]), plain, warmup_steps=2).train()
    assert watch.rates == plain.rates


def test_restart_gives_each_phase_its_own_warm_up_and_decay(make):
    watch = Watch()
    make(strategy("both,mlp,attn", learning_rate="restart", warmup_steps=1), watch).train()
    one = [0.5e-2, 1e-2, 0.5e-2]
    assert watch.rates == pytest.approx(one * 3)


def test_a_phase_can_choose_for_itself(make):
    watch = Watch()
    table = [{}, {"groups": "mlp", "start": 3, "learning_rate": "restart"}, {"groups": "attention", "start": 6}]
    make(DynamicLoRAConfig(table=table, warmup_steps=0), watch, lr_scheduler_type="linear", warmup_steps=0).train()
    shares = [9 / 9, 8 / 9, 7 / 9, 3 / 3, 2 / 3, 1 / 3, 3 / 9, 2 / 9, 1 / 9]
    assert watch.rates == pytest.approx([share * 1e-2 for share in shares])


def test_reset_moments_make_the_first_update_of_a_phase_an_adamw_start(make):
    moves = {}
    for policy in ("keep", "reset"):
        watch = Watch()
        phases = strategy("both,mlp,both", moments=policy)
        trainer = make(phases, watch, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0)
        trainer.train()
        name = next(name for name in trainer.parameters if "lora_B" in name and not is_mlp(name))
        moves[policy] = (watch.weights[7][name] - watch.weights[6][name]).abs()
    # Without moments AdamW's first update is the learning rate in every element that has a gradient.
    assert_close(moves["reset"], torch.full_like(moves["reset"], 1e-2), rtol=1e-3, atol=0)
    assert not torch.allclose(moves["keep"], moves["reset"], rtol=1e-3)


# A plateau


def plateau(metric="loss", patience=1, threshold=100.0):
    start = {"plateau": {"metric": metric, "patience": patience, "threshold": threshold}}
    return DynamicLoRAConfig(table=[{"groups": "attention"}, {"groups": "mlp", "start": start}])


@pytest.mark.parametrize(("metric", "expected"), [("loss", 4), ("eval_loss", 6)])
def test_a_plateau_starts_the_next_phase_and_is_recorded(make, run, rows, metric, expected):
    # The first measurement is always an improvement; with this threshold none of the later ones is.
    patience = 3 if metric == "loss" else 2
    watch = Watch()
    evaluated = {"eval_dataset": rows, "eval_steps": 2} if metric == "eval_loss" else {}
    trainer = make(plateau(metric, patience), watch, run=run, save_steps=100, **evaluated)
    trainer.train()
    report = json.loads(run.phase_report.read_text())
    assert report["starts"] == [0, expected]
    assert [(phase["start"], phase["end"]) for phase in report["phases"]] == [(0, expected), (expected, 9)]
    assert run.checkpoint_path(expected).is_dir()
    assert watch.moved_in(1, expected) == {name for name in trainer.parameters if not is_mlp(name)}
    assert watch.moved_in(expected + 1, 9) == {name for name in trainer.parameters if is_mlp(name)}


def test_each_plateau_is_counted_from_the_start_of_the_phase_before(make):
    def start(patience):
        return {"plateau": {"metric": "loss", "patience": patience, "threshold": 100.0}}

    table = [{"groups": "attention"}, {"groups": "mlp", "start": start(3)}, {"start": start(2)}]
    trainer = make(DynamicLoRAConfig(table=table))
    trainer.train()
    assert trainer.callbacks[0].plan.starts == (0, 4, 7)


@pytest.mark.parametrize("step", [3, 4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 5))])
@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_a_resume_around_a_plateau_is_bit_equal(make, run, tmp_path, rows, metric, step):
    settings = {"eval_dataset": rows, "eval_steps": 1, "save_steps": 1}
    whole = new_run(tmp_path / "whole")
    expected = make(plateau(metric, 3), run=whole, **settings)
    expected.train()
    with pytest.raises(ZeroDivisionError):
        make(plateau(metric, 3), Crash(step), run=run, **settings).train()
    resumed = make(plateau(metric, 3), run=run, **settings)
    resumed.train(resume=True)
    assert_close(weights(resumed), weights(expected), rtol=0, atol=0)
    assert run.phase_report.read_text() == whole.phase_report.read_text()


def test_a_plateau_of_an_evaluation_that_a_signal_cut_short_is_found_on_resume(make, run, tmp_path, rows):
    start = plateau("eval_loss").table[1].start
    phases = DynamicLoRAConfig(table=[{"groups": "attention"}, {"groups": "mlp", "start": 2}, {"start": start}])
    settings = {"eval_dataset": rows, "eval_steps": 2, "save_steps": 100}
    whole = new_run(tmp_path / "whole")
    expected = make(phases, run=whole, **settings)
    expected.evaluation = EvaluationConfig(batch_size=2)
    expected.train()
    with pytest.raises(StoppedBySignal, match="after step 6"):
        make(phases, KillInEvaluation(6), run=run, **settings).train()
    resumed = make(phases, run=run, **settings)
    resumed.evaluation = EvaluationConfig(batch_size=2)
    resumed.train(resume=True)
    assert resumed.callbacks[0].plan.starts == (0, 2, 6)
    assert_close(weights(resumed), weights(expected), rtol=0, atol=0)
    assert run.phase_report.read_text() == whole.phase_report.read_text()


def test_a_plateau_that_is_never_reached_is_said(make, caplog):
    trainer = make(plateau(patience=50))
    trainer.train()
    assert "phases [2] were never reached: the run ended after 9 steps" in caplog.text
    assert [report["phase"] for report in trainer.callbacks[0].reports] == [1]


def test_a_plateau_of_the_evaluation_needs_held_out_rows(make):
    with pytest.raises(ConfigError, match="needs held-out rows"):
        make(plateau("eval_loss")).train()


# Certificates that don't hold


class Sabotage(Callback):
    """Does something wrong in every update of a phase."""

    def __init__(self, *, event, act, steps=range(100)):
        self.event, self.act, self.steps = event, act, steps

    def on_step_begin(self, trainer):
        self._act("on_step_begin", trainer)

    def on_gradients(self, trainer):
        self._act("on_gradients", trainer)

    def _act(self, event, trainer):
        if event == self.event and trainer.state.step in self.steps:
            with torch.no_grad():
                self.act(trainer.parameters)


def pick(parameters, word="lora_B", *, mlp):
    return next(parameter for name, parameter in parameters.items() if word in name and is_mlp(name) == mlp)


SABOTAGES = {
    "a frozen tensor is written to": (
        Sabotage(event="on_step_begin", act=lambda p: pick(p, mlp=False).add_(1e-3), steps=[4]),
        r"phase 2, of steps 4 to 6, did not train what it declared: 1 tensors moved though frozen, first .*lora_B",
    ),
    "a frozen tensor is thawed": (
        Sabotage(event="on_step_begin", act=lambda p: pick(p, mlp=False).requires_grad_(True), steps=[4]),
        r"step 5: 1 tensors differ from what phase 2 declared; first, .* has a gradient and was not declared",
    ),
    "a declared tensor is frozen": (
        Sabotage(event="on_step_begin", act=lambda p: pick(p, mlp=True).requires_grad_(False), steps=[4]),
        r"step 5: 1 tensors differ from what phase 2 declared; first, .* has no gradient",
    ),
    "a gradient is always zero, and weight decay alone moves its tensor": (
        Sabotage(event="on_gradients", act=lambda p: zero(pick(p, "lora_A", mlp=True)), steps=range(3, 6)),
        r"phase 2.*1 tensors had a zero gradient in every update, first .*lora_A",
    ),
}


def zero(parameter):
    if parameter.grad is not None:
        parameter.grad.zero_()


@pytest.mark.parametrize("what", list(SABOTAGES))
def test_a_phase_that_trained_something_else_is_a_broken_run(make, run, what):
    sabotage, message = SABOTAGES[what]
    phases = strategy("attn,mlp,both")
    is_first = what.startswith("a gradient")
    before, after = ([sabotage], []) if is_first else ([], [sabotage])
    with pytest.raises(BrokenRunError, match=message):
        make(phases, *after, before=before, run=run, dropout=0.0).train()
    assert [checkpoint.step for checkpoint in run.checkpoints()][-1] < 6, "its last state is no checkpoint"


def test_the_report_of_a_broken_phase_is_on_disk(make, run):
    sabotage, _ = SABOTAGES["a frozen tensor is written to"]
    with pytest.raises(BrokenRunError):
        make(strategy("attn,mlp,both"), sabotage, run=run).train()
    last = json.loads(run.phase_report.read_text())["phases"][-1]
    assert len(last["problems"]) == len(last["frozen"]["moved"]) == 1
    assert last["groups"]["attention"]["crc_before"] != last["groups"]["attention"]["crc_after"]


def test_a_learning_rate_too_small_to_move_anything_is_a_broken_run(make):
    with pytest.raises(BrokenRunError, match=r"phase 1.*did not move.*Check the learning rate"):
        make(strategy("both,mlp,attn"), learning_rate=1e-45, weight_decay=0.0).train()


def test_a_alone_may_stand_still_while_b_is_zero_and_that_is_said(make, run, caplog):
    phases = DynamicLoRAConfig(table=[{"matrices": "A"}, {"matrices": "B", "start": 2}, {"start": 4}])
    make(phases, run=run, weight_decay=0.0).train()
    first, second, third = json.loads(run.phase_report.read_text())["phases"]
    assert len(first["zero_gradient"]) == len(first["declared"])
    assert (first["with_gradient"], second["zero_gradient"], third["zero_gradient"]) == (0, [], [])
    assert [phase["problems"] for phase in (first, second, third)] == [[], [], []]
    assert [line for line in caplog.messages if "changed nothing" in line] == [caplog.messages[0]]
    assert caplog.messages[0].startswith("phase 1 changed nothing")


def test_a_phase_of_a_single_update_holds(make):
    trainer = make(DynamicLoRAConfig(table=[{}, {"groups": "mlp", "start": 1}]), weight_decay=0.0)
    trainer.train()
    assert [report["problems"] for report in trainer.callbacks[0].reports] == [[], []]


def test_a_run_that_a_callback_ends_in_an_early_phase_is_certified_so_far(make, run):
    class Stop(Callback):
        def on_step_end(self, trainer, record):
            trainer.state.should_stop = record.step == 2

    make(strategy("attn,mlp,both"), Stop(), run=run).train()
    [report] = json.loads(run.phase_report.read_text())["phases"]
    assert (report["end"], report["problems"]) == (2, [])


def test_a_checkpoint_without_phases_is_not_resumed_with_them(make, run):
    plain = make(strategy("early,late"), run=run)
    plain.callbacks.clear()
    plain.train()
    with pytest.raises(ModelError, match="written without phases"):
        make(strategy("early,late", phase1_end=10), run=run, max_steps=12).train(resume=True)


def test_phases_that_are_off_make_no_callback():
    with pytest.raises(ConfigError, match="there are no phases"):
        DynamicLoRACallback(DynamicLoRAConfig())


def test_each_phase_is_announced_unless_told_otherwise(make, caplog):
    caplog.set_level("INFO", logger="smolora")
    make(strategy("early,late")).train()
    assert "phase 2 of 2 from step 4: late layers" in caplog.text
    caplog.clear()
    DynamicLoRACallback(strategy("early,late"), verbose=False)
    trainer = make(strategy("early,late"))
    trainer.callbacks[0].verbose = False
    trainer.train()
    assert "phase 2 of 2" not in caplog.text


# Ranges from Python


def test_ranges_that_meet_become_starts():
    config = create_phased_lora_config((0, 10), (10, 20), (20, None))
    assert [phase.groups for phase in config.phases] == [("attention",), ("mlp",), ("attention", "mlp")]
    assert [phase.start.step if phase.start else None for phase in config.phases] == [None, 10, 20]
    assert config.end is None


def test_a_last_range_with_an_end_is_held_to_the_run(make):
    make(create_phased_lora_config((0, 3), (3, 6), (6, 9))).train()
    with pytest.raises(ConfigError, match="a run of 8 steps, and this one has 9"):
        make(create_phased_lora_config((0, 3), (3, 6), (6, 8))).train()


def test_layerwise_phases_are_halves_of_the_layers(make):
    config = create_layerwise_lora_config(5, (0, 4), (4, None))
    assert [phase.layers for phase in config.phases] == [(0, 1), (2, 4)]
    watch = Watch()
    trainer = make(create_layerwise_lora_config(2, (0, 4), (4, None)), watch)
    trainer.train()
    assert watch.moved_in(5, 9) == {name for name in trainer.parameters if is_late(name)}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (((0, 10), (12, 20), (20, None)), "phase2_steps: .* leaves a gap"),
        (((0, 10), (8, 20), (20, None)), "phase2_steps: .* leaves an overlap"),
        (((0, None), (10, 20), (20, None)), "phase2_steps: .* leaves an overlap"),
        (((1, 10), (10, 20), (20, None)), "phase1_steps: .* leaves a gap"),
        (((0, 10), (10, 10), (10, None)), "phase2_steps: .* holds no update"),
    ],
)
def test_ranges_that_do_not_meet_are_refused(ranges, message):
    with pytest.raises(ConfigError, match=message):
        create_phased_lora_config(*ranges)


def test_one_layer_has_no_halves():
    with pytest.raises(ConfigError, match="at least 2 layers"):
        create_layerwise_lora_config(1)
