"""Which modules an adapter goes on: names of a person's choice become full module paths of the model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from smolora.config.adapter import ATTENTION_ONLY, BOTH, MLP_ONLY
from smolora.errors import ConfigError, did_you_mean
from smolora.models.anatomy import Anatomy

_Number = TypeVar("_Number", int, float)

# The lists that LoRAConfig users pass are Llama's names; on any other family they mean the same parts.
_LLAMA_LISTS = {frozenset(ATTENTION_ONLY): "attention_only", frozenset(MLP_ONLY): "mlp_only", frozenset(BOTH): "both"}


def resolve_target_modules(
    anatomy: Anatomy, target_modules: str | Sequence[str], *, layers: Sequence[int] | None = None
) -> list[str]:
    """Return the full paths of the linear layers to adapt, in the order of the model.

    Args:
        anatomy: Of the plain model.
        target_modules: `attention_only` (query and value, or the fused module), `mlp_only`, `both`, `all` (every
            linear layer but the head, and what no adapter can go on), or names: the last part of a path (`q_proj`),
            its last parts (`mlp.c_proj`), or all of it. For IA3 also `default` (key, value and the MLP's last module).
        layers: Layers to take modules of; None takes all, and those outside of the layers.

    Raises:
        ConfigError: A name matches no linear layer, or a named group or the layers have none in this model.
    """
    return _in_layers(anatomy, _resolve_names(anatomy, target_modules), layers)


def resolve_norms(anatomy: Anatomy, *, layers: Sequence[int] | None = None) -> list[str]:
    """Return the full paths of the norms, in the order of the model.

    Raises:
        ConfigError: The model, or these layers, have none.
    """
    norms = [part.name for part in anatomy.parts if part.group == "norm"]
    if not norms:
        raise ConfigError(f"adapter.method: '{anatomy.family}' has no norm with weights to train.")
    return _in_layers(anatomy, norms, layers)


def _in_layers(anatomy: Anatomy, paths: list[str], layers: Sequence[int] | None) -> list[str]:
    if layers is None:
        return paths
    if unknown := [layer for layer in layers if layer >= anatomy.num_layers]:
        raise ConfigError(
            f"adapter.layers: there is no layer {unknown[0]}; '{anatomy.family}' has 0 to {anatomy.num_layers - 1}."
        )
    chosen = [path for path in paths if anatomy.part_of(f"{path}.weight").layer in layers]
    if not chosen:
        raise ConfigError("adapter.layers: none of the target modules is in them. Name other layers, or other modules.")
    return chosen


def _resolve_names(anatomy: Anatomy, target_modules: str | Sequence[str]) -> list[str]:
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    named = names[0] if len(names) == 1 else _LLAMA_LISTS.get(frozenset(names))
    group = _modules_of_group(anatomy, named) if named else None
    if group is None:
        chosen = {path for name in names for path in _match(anatomy, name, field="target_modules")}
        return [path for path in anatomy.linear_modules() if path in chosen]
    if not group:
        raise ConfigError(
            f"adapter.target_modules: '{named}' is nothing in '{anatomy.family}'. {_list_modules(anatomy)}"
        )
    return group


def _modules_of_group(anatomy: Anatomy, named: str) -> list[str] | None:
    if named == "all":
        return anatomy.linear_modules()
    if named == "default":
        return anatomy.modules_with_role("key", "value", "query_key_value", "down")
    if named == "attention_only":
        return anatomy.modules_with_role("query", "value", "query_key_value")
    if named == "mlp_only":
        return anatomy.modules_with_role("gate", "up", "gate_up", "down")
    if named == "both":
        return anatomy.modules_with_role("query", "value", "query_key_value", "gate", "up", "gate_up", "down")
    return None


def resolve_pattern(
    anatomy: Anatomy, targets: Sequence[str], pattern: Mapping[str, _Number], *, field: str
) -> dict[str, _Number]:
    """Return what `pattern` gives each of `targets`, by full path; where several names fit one, the longest decides.

    Args:
        anatomy: Of the plain model.
        targets: Full paths of the modules that are adapted.
        pattern: Numbers by name, spelt as in `resolve_target_modules`.
        field: The setting, for messages.

    Raises:
        ConfigError: A name matches no linear layer, or none that is adapted.
    """
    resolved: dict[str, _Number] = {}
    for name in sorted(pattern, key=len):
        matched = [path for path in _match(anatomy, name, field=field) if path in targets]
        if not matched:
            raise ConfigError(
                f"adapter.{field}: '{name}' isn't adapted. Add it to adapter.target_modules, or leave it out here."
            )
        resolved |= dict.fromkeys(matched, pattern[name])
    return resolved


def _match(anatomy: Anatomy, name: str, *, field: str) -> list[str]:
    matched = [path for path in anatomy.linear_modules() if path == name or path.endswith(f".{name}")]
    if not matched:
        _refuse_known(anatomy, name, field=field)
        hint = did_you_mean(name, _short_names(anatomy))
        raise ConfigError(
            f"adapter.{field}: no module named '{name}' in '{anatomy.family}'.{hint} {_list_modules(anatomy)}"
        )
    return matched


def _refuse_known(anatomy: Anatomy, name: str, *, field: str) -> None:
    """Raise where `name` is in the model, and no adapter goes on it."""
    heads = [*anatomy.heads, *(part.name for part in anatomy.parts if part.group == "head" and anatomy.heads)]
    if any(path == name or path.endswith(f".{name}") for path in heads):
        raise ConfigError(
            f"adapter.{field}: '{name}' is in the head, which is trained whole for its task and kept with the adapter: "
            "a low-rank update on top of it would train nothing more. Leave it out."
        )
    known = {part.name: part for part in anatomy.parts if part.name == name or part.name.endswith(f".{name}")}
    if not known:
        return
    if any(part.is_linear and part.group != "head" for part in known.values()):
        reason = f"can't be adapted in '{anatomy.family}', whose own code reads its weight past an adapter."
    else:
        reason = f"is in '{anatomy.family}', but is no linear layer of its blocks, so no adapter goes on it."
    raise ConfigError(f"adapter.{field}: '{name}' {reason} {_list_modules(anatomy)}")


def _short_names(anatomy: Anatomy) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in anatomy.linear_modules()))


def _list_modules(anatomy: Anatomy) -> str:
    return f"Linear modules: {', '.join(_short_names(anatomy))}."
