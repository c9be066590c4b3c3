"""`smolora probe`: gradients of some batches without an update, and the configuration that they propose."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.config import ExperimentConfig, LoRAConfig
from smolora.data.collate import get_data_collator
from smolora.data.sources import check_sources
from smolora.errors import ConfigError
from smolora.models.packing import choose_layout
from smolora.recipes.finetune import choose_steps, encode_data, load_base, read_rows
from smolora.recipes.probe_config import (
    RANK_SPAN,
    ProbePlan,
    describe_phases,
    describe_probe,
    plan_probe,
    read_lora,
    render_config,
)
from smolora.records.staging import describe_os_error, require_writable, write_bytes, write_json, write_text
from smolora.records.study_dir import ProbeDir
from smolora.training.gradient_mass import GradientMass, measure_gradient_mass

logger = logging.getLogger(__name__)

_FEWEST_DIRECTIONS = 32
"""Random directions that each gradient is projected on, at least: as many as the largest rank that can be proposed."""


def probe(config: ExperimentConfig, out: Path, *, num_batches: int = 32) -> ProbeDir:
    """Measure where `config` would learn, and write probe.yaml, probe.json and probe.png into `out`.

    Every linear module but the head is measured, whatever `adapter.target_modules` says. The batches are the first that
    the run would see, of one epoch at most: a row in both halves would agree with itself. The same seed gives the same
    answer.

    Raises:
        ConfigError: A probe is in `out`, an adapter to continue from, or too few batches.
        DataError: Rows are missing, rejected or too long.
        BrokenRunError: Numbers that aren't finite.
    """
    folder = ProbeDir(out)
    if folder.config.exists():
        raise ConfigError(f"{out} already holds a probe. Choose another output folder, or remove it first.")
    if config.adapter.path is not None:
        raise ConfigError("adapter.path: a probe looks for where to put a new adapter, so there is none to continue.")
    asked = read_lora(config)
    require_writable(out)
    check_sources(config.data)
    rows = read_rows(config)
    base, _ = load_base(config, rows.fmt.labels)
    data = encode_data(config, rows, base)
    layout = choose_layout(base)
    directions = max(_FEWEST_DIRECTIONS, RANK_SPAN * asked.r)
    adapter = LoRAConfig(r=directions, lora_alpha=directions, lora_dropout=0.0)
    bundle = attach_adapter(base, adapter, seed=config.training.seed)
    steps = choose_steps(data, config, layout)
    if num_batches > steps.steps_per_epoch:
        num_batches = steps.steps_per_epoch
        logger.info("batches of an epoch: %d; none is measured twice", num_batches)
    with fast_path(bundle, config.speed, is_packed=layout == "packed"):
        measured = measure_gradient_mass(
            bundle, data.train, steps, collate=get_data_collator(layout, base.task), num_batches=num_batches
        )
    plan = plan_probe(measured, r=asked.r, total_steps=steps.total_steps)
    for sentence in (*describe_probe(measured, plan, num_batches=num_batches), describe_phases(plan)):
        logger.info("%s", sentence)
    _write(folder, config, measured, plan, num_batches)
    return folder


def _write(
    folder: ProbeDir, config: ExperimentConfig, measured: GradientMass, plan: ProbePlan, num_batches: int
) -> None:
    from smolora.analysis.canvas import render_png  # Here, since matplotlib takes a second.
    from smolora.analysis.layer_map import plot_layer_map

    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise describe_os_error(error, folder.path) from error
    modules = [{"rank": plan.ranks.get(module.module), **dataclasses.asdict(module)} for module in plan.ranked]
    figures = {
        "batches": num_batches,
        "loss": measured.loss,
        "agreement": measured.agreement,
        "groups": plan.groups,
        "parameters": plan.spent,
        "uniform_parameters": plan.budget,
        "modules": modules,
    }
    densities = {module.module: (module.layer, module.density) for module in measured.modules}
    write_bytes(folder.plot, render_png(plot_layer_map(densities)))
    write_json(folder.figures, figures)
    write_text(folder.config, render_config(config, measured, plan, num_batches=num_batches))
