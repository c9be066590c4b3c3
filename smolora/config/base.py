"""The base of every configuration section: frozen and strict; its errors name field, value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from smolora.errors import ConfigError, did_you_mean


class Section(BaseModel):
    """A group of settings. Immutable: `section.replace(...)` or pydantic's `model_copy` gives a changed one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )

    unread: ClassVar[Mapping[str, str]] = {}
    """What the verb of this configuration never reads of its sections, by path, and why not."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(type(self), error)) from None

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__}.{name} can't be assigned: a configuration is frozen. "
            f"Use config.model_copy(update={{{name!r}: ...}}) or config.replace({name}=...) to get a changed one."
        )

    @classmethod
    def describe_setting(cls) -> str:
        """Return what a field of this section is called in messages."""
        return "setting"

    def find_idle(self) -> Mapping[str, str]:
        """Return the settings that nothing reads without another one, which isn't set, and the name of that."""
        return {}

    @model_validator(mode="after")
    def _has_nothing_idle(self) -> Self:
        """Refuse what would change nothing; at its default it may stand, as in the configuration that a run writes."""
        for name, needed in self.find_idle().items():
            if (value := self.__dict__[name]) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} would change nothing without {needed}: set that too, or leave it out")
        return self

    def replace(self, **values: Any) -> Any:
        """Return a copy with `values` changed, validated again (`model_copy` of pydantic validates nothing)."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})


def _describe(section: type[Section], error: ValidationError) -> str:
    return "\n".join(_describe_one(section, dict(item)) for item in error.errors())


def _describe_one(section: type[Section], item: dict[str, Any]) -> str:
    location = _leave_out_tags(section, [str(part) for part in item["loc"] if not str(part).startswith("function-")])
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(section, location[:-1])
        hint = did_you_mean(location[-1], allowed)
        return f"{path}: no such {section.describe_setting()}.{hint} Known: {', '.join(sorted(allowed))}."
    inner = item.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # A nested section has already said what is wrong with its own field.
        return "\n".join(f"{path}.{line}" if path else line for line in str(inner).splitlines())
    message = str(inner) if inner is not None else item["msg"][:1].lower() + item["msg"][1:]
    if item["type"] == "tuple_type":
        message = "input should be a list, as [a, b]"
    is_whole = item["type"] == "missing" or isinstance(item["input"], dict)
    found = "" if is_whole else f" (found {item['input']!r})"
    return f"{path}: {message}{found}" if path else f"{message}"


def _leave_out_tags(section: type[BaseModel], location: list[str]) -> list[str]:
    """Leave out pydantic's name of the member of a union, which stands behind the name of a field."""
    field = section.model_fields.get(location[0]) if location else None
    is_union = field is not None and field.discriminator is not None
    return [location[0], *location[2:]] if is_union else location


def _fields_at(section: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        field = section.model_fields.get(part)
        nested = field.annotation if field else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return []
        section = nested
    return list(section.model_fields)
