"""The proof that a phase trained what it declared and nothing else: gradients, movement, and what stood still."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from smolora.adapters.factors import find_waiting
from smolora.adapters.tensor_places import TensorPlace
from smolora.errors import BrokenRunError
from smolora.training.gradients import measure_norms, to_floats
from smolora.training.optim import tensor_checksums


class PhaseCertificate:
    """What is known of one phase from its first update on. It travels in checkpoints, so a stop doesn't shorten it.

    Attributes:
        values: The declared tensors as the phase found them.
    """

    def __init__(self, index: int, start: int, declared: Iterable[str], checksums: Mapping[str, int]) -> None:
        self.index, self.start = index, start
        self.declared = tuple(declared)
        self.checksums = dict(checksums)
        self.values: dict[str, Tensor] = {}
        self._pulled: set[str] = set()
        self._excused: set[str] = set()

    @classmethod
    def begin(
        cls, index: int, start: int, declared: Iterable[str], parameters: Mapping[str, nn.Parameter]
    ) -> PhaseCertificate:
        """Return the certificate of a phase that is about to start."""
        certificate = cls(index, start, declared, tensor_checksums(parameters))
        certificate.values = {name: parameters[name].detach().clone() for name in certificate.declared}
        return certificate

    def check_gradients(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Look at the gradients of update `step`.

        Raises:
            BrokenRunError: Other tensors than the declared ones have a gradient.
        """
        found = {name for name, parameter in parameters.items() if parameter.grad is not None}
        if differing := sorted(found.symmetric_difference(self.declared)):
            kind = "has a gradient and was not declared" if differing[0] in found else "has no gradient"
            raise BrokenRunError(
                f"step {step}: {len(differing)} tensors differ from what phase {self.index + 1} declared; "
                f"first, {differing[0]} {kind}. The update was not applied. Nothing else may switch requires_grad."
            )
        waiting = [name for name in self.declared if name not in self._pulled]
        gradients = {name: gradient for name in waiting if (gradient := parameters[name].grad) is not None}
        norms = to_floats(measure_norms(gradients))
        self._pulled |= {name for name, norm in norms.items() if norm}
        zero = [name for name, norm in norms.items() if not norm]
        self._excused = set(zero) & find_waiting(parameters) if zero else set()  # It reads every tensor.

    def close(
        self, parameters: Mapping[str, nn.Parameter], places: Mapping[str, TensorPlace], end: int
    ) -> dict[str, object]:
        """Return the report of the phase, which held if its `problems` are empty."""
        after = tensor_checksums(parameters)
        changed = {name for name in parameters if after[name] != self.checksums[name]}
        without_gradient = [name for name in self.declared if name not in self._pulled]
        unexplained = [name for name in without_gradient if name not in self._excused]
        unmoved = [name for name in self.declared if name not in changed and name not in self._excused]
        leaked = sorted(changed.difference(self.declared))
        said = {
            "had a zero gradient in every update": unexplained,
            "did not move": unmoved,
            "moved though frozen": leaked,
        }
        return {
            "phase": self.index + 1,
            "start": self.start,
            "end": end,
            "declared": list(self.declared),
            "parameters": sum(parameters[name].numel() for name in self.declared),
            "with_gradient": len(self._pulled),
            "zero_gradient": without_gradient,
            "groups": self._describe_groups(parameters, places, after),
            "frozen": {"tensors": len(parameters) - len(self.declared), "moved": leaked},
            "problems": [f"{len(names)} tensors {what}, first {names[0]}" for what, names in said.items() if names],
        }

    def _describe_groups(
        self, parameters: Mapping[str, nn.Parameter], places: Mapping[str, TensorPlace], after: Mapping[str, int]
    ) -> dict[str, object]:
        groups: dict[str, list[str]] = {}
        for name in parameters:
            groups.setdefault(places[name].group, []).append(name)
        return {group: self._describe_group(names, parameters, after) for group, names in groups.items()}

    @torch.no_grad()
    def _describe_group(
        self, names: list[str], parameters: Mapping[str, nn.Parameter], after: Mapping[str, int]
    ) -> dict[str, object]:
        trained = [name for name in names if name in self.values]
        start = {name: self.values[name].to(parameters[name].device) for name in trained}
        distance = _length({name: parameters[name] - start[name] for name in trained})
        size = _length(start)
        return {
            "tensors": len(names),
            "trained": len(trained),
            "moved": sum(after[name] != self.checksums[name] for name in names),
            "distance": distance,
            "relative_distance": distance / size if size else None,
            "crc_before": _combine(self.checksums[name] for name in names),
            "crc_after": _combine(after[name] for name in names),
        }

    def to_state(self) -> dict[str, object]:
        """Return what a checkpoint keeps, beside `values`."""
        return {
            "index": self.index,
            "start": self.start,
            "declared": list(self.declared),
            "checksums": self.checksums,
            "pulled": sorted(self._pulled),
            "excused": sorted(self._excused),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> PhaseCertificate:
        """Return the certificate that `to_state` described, without its `values`."""
        certificate = cls(
            cast("int", state["index"]),
            cast("int", state["start"]),
            cast("list[str]", state["declared"]),
            cast("dict[str, int]", state["checksums"]),
        )
        certificate._pulled = set(cast("list[str]", state["pulled"]))
        certificate._excused = set(cast("list[str]", state["excused"]))
        return certificate


def require_held(report: Mapping[str, object]) -> None:
    """Raise where the report of a phase has problems.

    Raises:
        BrokenRunError: The phase didn't train what it declared.
    """
    if problems := cast("list[str]", report["problems"]):
        raise BrokenRunError(
            f"phase {report['phase']}, of steps {cast('int', report['start']) + 1} to {report['end']}, did not "
            f"train what it declared: {'; '.join(problems)}. Check the learning rate, the selector, and that "
            "nothing else writes to the adapter."
        )


def _length(tensors: Mapping[str, Tensor]) -> float:
    return math.hypot(*to_floats(measure_norms(tensors)).values())


def _combine(checksums: Iterable[int]) -> int:
    """Return one CRC-32 for many, in their order."""
    return zlib.crc32(b"".join(checksum.to_bytes(4, "little") for checksum in checksums))
