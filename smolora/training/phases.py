"""Phases: what trains when. All tensors are the optimiser's from the start; a phase only switches `requires_grad`.

A frozen tensor's gradient is None, so that AdamW moves it neither by momentum nor by weight decay. The phase of a step
is a function of the step and of where the phases start. Each phase ends with a certificate.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from smolora.adapters.tensor_places import TensorPlace, locate_tensors
from smolora.config.phases import DynamicLoRAConfig, PhaseConfig, PhaseGroup, PhaseStart
from smolora.errors import ConfigError, ModelError
from smolora.records.staging import write_json
from smolora.training.callback import Callback
from smolora.training.phase_certificate import PhaseCertificate, require_held
from smolora.training.phase_plan import PhasePlan, build_phase_plan, describe_phase
from smolora.training.plateau import PlateauDetector
from smolora.training.schedules import ScheduleWindow

if TYPE_CHECKING:
    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer

logger = logging.getLogger(__name__)

Steps = tuple[int, int | None]
"""First update's number less one, and last update; None is the end of the run."""


class DynamicLoRACallback(Callback):
    """Switches phases at step boundaries and certifies each.

    Args:
        config: With phases.
        verbose: Whether each phase is announced in the log.
        report_path: Where the certificates are written; without it they are only in `reports`.

    Raises:
        ConfigError: The configuration has no phases.

    Example:
        ```python
        from smolora.data.collate import collate_packed

        phases = create_phased_lora_config(phase1_steps=(0, 2), phase2_steps=(2, 4), phase3_steps=(4, None))
        callbacks = [DynamicLoRACallback(phases)]
        Trainer(bundle, rows, TrainingConfig(max_steps=6), collate=collate_packed, callbacks=callbacks).train()
        ```
    """

    def __init__(self, config: DynamicLoRAConfig, verbose: bool = True, *, report_path: Path | None = None) -> None:
        if not config.is_on:
            raise ConfigError("there are no phases: give phases.strategy or phases.table.")
        self.config = config
        self.verbose = verbose
        self.report_path = report_path
        self._places: dict[str, TensorPlace] = {}
        self.reset()

    def reset(self) -> None:
        self.reports: list[dict[str, object]] = []
        self._plan: PhasePlan | None = None
        self._recorded: Sequence[int | None] = ()
        self._recorded_total: int | None = None
        self._index: int | None = None
        self._certificate: PhaseCertificate | None = None
        self._plateau = PlateauDetector()

    @property
    def plan(self) -> PhasePlan:
        """The phases of the run at hand."""
        assert self._plan is not None, "the run has begun"
        return self._plan

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.state.step and self._plan is None and not self._recorded:
            raise ModelError("the checkpoint was written without phases: it can't be resumed with them. Start anew.")
        self._places = locate_tensors(trainer.parameters, trainer.bundle.anatomy)
        plan = build_phase_plan(
            self.config,
            self._places,
            num_layers=trainer.bundle.anatomy.num_layers,
            steps=trainer.plan,
            is_evaluated=trainer.eval_dataset is not None,
            has_drawn_head=trainer.bundle.has_drawn_head,
            recorded=self._recorded,
        )
        trainer.state.kept_steps |= {start for start in plan.starts if start}
        self._index = None
        self.begin(plan)
        if trainer.state.step:  # What ends here, before another step, ends with the tensors of the last one.
            self._freeze_others(trainer, plan.index_at(trainer.state.step - 1))
        if self._recorded and self._recorded_total not in (None, plan.total_steps):
            logger.info(
                "phases: the run had %d steps and has %d now; its phases keep their starts, after %s updates",
                self._recorded_total,
                plan.total_steps,
                ", ".join(str(start) for start in plan.starts if start is not None),
            )

    def recall(self, step: int) -> None:
        """Take back from `report_path` what an earlier process certified of a run's first `step` updates."""
        if self.report_path and self.report_path.is_file():
            reports = json.loads(self.report_path.read_text(encoding="utf-8"))["phases"]
            self.reports = [report for report in reports if report["end"] <= step]

    def begin(self, plan: PhasePlan) -> None:
        """Take the phases of a run and write that they begin; any loop can drive this and `close`."""
        self._plan = plan
        self._write()
        if plan.left_out:
            count, first = len(plan.left_out), plan.left_out[0]
            logger.warning("phases: %d tensors stay as they are, since no phase trains them; first %s", count, first)

    def on_step_begin(self, trainer: Trainer) -> None:
        step = trainer.state.step
        index = self.plan.index_at(step)
        if index != self._index:
            self._enter(trainer, index)
        if self.plan.starts[index] == step:
            self._certificate = PhaseCertificate.begin(index, step, self.plan.tensors[index], trainer.parameters)
            self._plateau = PlateauDetector()
            if (self.plan.phases[index].moments or self.config.moments) == "reset":
                trainer.reset_moments(self.plan.tensors[index])

    def _enter(self, trainer: Trainer, index: int) -> None:
        self._freeze_others(trainer, index)
        self._index = index
        trainer.state.phase = index + 1
        trainer.schedule = self._choose_schedule(trainer, index)
        if self.verbose:
            size = sum(trainer.parameters[name].numel() for name in self.plan.tensors[index])
            logger.info(
                "phase %d of %d from step %d: %s, %s parameters",
                index + 1,
                len(self.plan.phases),
                trainer.state.step + 1,
                describe_phase(self.plan.phases[index]),
                f"{size:,}",
            )

    def _freeze_others(self, trainer: Trainer, index: int) -> None:
        declared = set(self.plan.tensors[index])
        for name, parameter in trainer.parameters.items():
            parameter.requires_grad_(name in declared)

    def _choose_schedule(self, trainer: Trainer, index: int) -> ScheduleWindow:
        if (self.plan.phases[index].learning_rate or self.config.learning_rate) == "continue":
            return ScheduleWindow.over(0, self.plan.total_steps, warmup_steps=trainer.config.warmup_steps)
        start = self.plan.starts[index]
        assert start is not None, "a phase that is entered has started"
        return ScheduleWindow.over(start, self.plan.end_of(index), warmup_steps=self.config.warmup_steps)

    def on_gradients(self, trainer: Trainer) -> None:
        assert self._certificate is not None, "a step has begun"
        self._certificate.check_gradients(trainer.parameters, trainer.state.step + 1)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._look_for_plateau(trainer, "loss", record.loss)
        if self._index is not None and self.plan.next_start(self._index) == record.step:
            self._close(trainer)

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self._look_for_plateau(trainer, "eval_loss", eval_loss)

    def _look_for_plateau(self, trainer: Trainer, metric: str, value: float) -> None:
        """Start the next phase here where it waits for a plateau of `metric`, and this value makes one."""
        step = trainer.state.step
        if self._certificate is None or step >= self.plan.total_steps:
            return
        following = self._certificate.index + 1  # In a resumed run that makes a cut evaluation, no step has begun.
        if following == len(self.plan.phases):
            return
        start = self.plan.phases[following].start
        if start is None or start.plateau is None or start.plateau.metric != metric:
            return
        if self._plateau.is_reached(value, start.plateau):
            self._plan = self.plan.with_start(following, step)
            trainer.state.kept_steps.add(step)
            if metric == "eval_loss":  # The other one is looked for in on_step_end, which closes the phase itself.
                self._close(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        if self._certificate is not None:
            self._close(trainer)
        if missing := self.plan.numbers_not_reached(trainer.state.step):
            logger.warning("phases %s were never reached: the run ended after %d steps", missing, trainer.state.step)

    def on_train_end(self, trainer: Trainer) -> None:
        for parameter in trainer.parameters.values():
            parameter.requires_grad_(True)

    def _close(self, trainer: Trainer) -> None:
        assert self._certificate is not None, "a phase is open"
        certificate, self._certificate = self._certificate, None
        self.close(certificate, trainer.parameters, self._places, trainer.state.step)

    def close(
        self,
        certificate: PhaseCertificate,
        parameters: Mapping[str, nn.Parameter],
        places: Mapping[str, TensorPlace],
        step: int,
    ) -> None:
        """Write the certificate of a phase that ends after update `step`.

        Raises:
            BrokenRunError: It doesn't hold.
        """
        report = certificate.close(parameters, places, step)
        self.reports.append({**report, "selects": describe_phase(self.plan.phases[certificate.index])})
        self._write()
        require_held(report)
        if not report["with_gradient"]:
            logger.warning(
                "phase %d changed nothing: all its gradients were zero, as those of A are while B is zero, and the "
                "other way round. Train the other matrix first, or both.",
                certificate.index + 1,
            )

    def _write(self) -> None:
        if self.report_path:
            self.report_path.parent.mkdir(parents=True, exist_ok=True)
            selects = [describe_phase(phase) for phase in self.plan.phases]
            write_json(self.report_path, {"starts": list(self.plan.starts), "selects": selects, "phases": self.reports})

    def state_dict(self) -> Mapping[str, object]:
        return {
            "starts": list(self.plan.starts),
            "total_steps": self.plan.total_steps,
            "reports": self.reports,
            "plateau": self._plateau.to_state(),
            "certificate": self._certificate.to_state() if self._certificate else None,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self._recorded = cast("list[int | None]", state["starts"])
        self._recorded_total = cast("int | None", state.get("total_steps"))
        self.reports = cast("list[dict[str, object]]", state["reports"])
        self._plateau = PlateauDetector.from_state(cast("Mapping[str, float | int | None]", state["plateau"]))
        certificate = cast("Mapping[str, object] | None", state["certificate"])
        self._certificate = PhaseCertificate.from_state(certificate) if certificate else None

    def state_tensors(self) -> Mapping[str, Tensor]:
        return self._certificate.values if self._certificate else {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        assert self._certificate is not None, "tensors belong to an open certificate"
        self._certificate.values = dict(tensors)


def create_phased_lora_config(  # noqa: PLR0917 - a promised signature
    phase1_steps: Steps = (0, 100),
    phase2_steps: Steps = (100, 200),
    phase3_steps: Steps | None = (200, None),
    phase1_modules: Sequence[PhaseGroup] = ("attention",),
    phase2_modules: Sequence[PhaseGroup] = ("mlp",),
    phase3_modules: Sequence[PhaseGroup] = ("attention", "mlp"),
) -> DynamicLoRAConfig:
    """Return phases by groups of modules.

    Args:
        phase1_steps: (start, end): updates start + 1 to end. Each starts where the one before ends.
        phase2_steps: The same; an end of None is the end of the run.
        phase3_steps: The same; None for two phases.
        phase1_modules: Groups that phase 1 trains.
        phase2_modules: Groups that phase 2 trains.
        phase3_modules: Groups that phase 3 trains.

    Raises:
        ConfigError: The steps leave a gap or overlap.
    """
    ranges = [phase1_steps, phase2_steps, *([phase3_steps] if phase3_steps else [])]
    modules = [phase1_modules, phase2_modules, phase3_modules]
    phases = [PhaseConfig(groups=tuple(groups)) for groups in modules[: len(ranges)]]
    return _build_config(phases, ranges)


def create_layerwise_lora_config(
    num_layers: int,
    phase1_steps: Steps = (0, 200),
    phase2_steps: Steps = (200, None),
    modules: Sequence[PhaseGroup] = ("attention", "mlp"),
) -> DynamicLoRAConfig:
    """Return two phases: the early half of the layers, then the late half.

    Args:
        num_layers: Blocks of the model.
        phase1_steps: (start, end) of the early half.
        phase2_steps: (start, end) of the late half; an end of None is the end of the run.
        modules: Groups that both train.

    Raises:
        ConfigError: The steps leave a gap or overlap, or there are fewer than two layers.
    """
    if num_layers < 2:
        raise ConfigError(f"num_layers: two halves need at least 2 layers, found {num_layers}.")
    middle = num_layers // 2
    halves = [(0, middle - 1), (middle, num_layers - 1)]
    phases = [PhaseConfig(groups=tuple(modules), layers=half) for half in halves]
    return _build_config(phases, [phase1_steps, phase2_steps])


def _build_config(phases: Sequence[PhaseConfig], ranges: Sequence[Steps]) -> DynamicLoRAConfig:
    """Give phases their starts, having checked that the ranges cover every step once."""
    expected: int | None = 0
    for number, (start, end) in enumerate(ranges, start=1):
        if start != expected:
            kind = "a gap" if expected is not None and start > expected else "an overlap"
            raise ConfigError(
                f"phase{number}_steps: {(start, end)} leaves {kind}; the phase before ends at {expected}, so this one "
                f"starts at {expected}. Ranges are (updates done before, last update)."
            )
        if end is not None and end <= start:
            raise ConfigError(f"phase{number}_steps: {(start, end)} holds no update.")
        expected = end
    table = tuple(
        phase if start == 0 else phase.replace(start=PhaseStart(step=start))
        for phase, (start, _) in zip(phases, ranges, strict=True)
    )
    return DynamicLoRAConfig(table=table, end=ranges[-1][1])
