"""Typed settings from environment variables.

An empty variable counts as unset. Problems are collected while reading, so that one run reports all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from darwin_runtime.errors import ConfigError

TRUE = ("true", "1", "yes")
FALSE = ("false", "0", "no")


@dataclass
class Reader:
    """Reads settings from `environ`; every name read is kept in `seen`, every problem in `problems`.

    A getter that meets a problem returns the default (or an empty value), so that reading goes on; call `finish()`
    before using what was read.
    """

    environ: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    seen: dict[str, object] = field(default_factory=dict)

    def raw(self, name: str) -> str:
        return self.environ.get(name, "").strip()

    def problem(self, name: str, why: str, *, example: str) -> None:
        value = self.raw(name)
        shown = f"{name}={value!r}" if value else name
        self.problems.append(f"{shown}: {why}, for example {name}={example}")

    def text(self, name: str, default: str = "") -> str:
        value = self.raw(name) or default
        self.seen[name] = value
        return value

    def required(self, name: str, *, example: str) -> str:
        if not self.raw(name):
            self.problem(name, "is not set and has no default", example=example)
        return self.text(name)

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        value = (self.raw(name) or default).lower()
        if value not in choices:
            self.problem(name, f"must be one of {', '.join(choices)}", example=default or choices[0])
            value = default
        self.seen[name] = value
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name).lower()
        result = default
        if value in TRUE or value in FALSE:
            result = value in TRUE
        elif value:
            self.problem(name, f"must be one of {', '.join(TRUE + FALSE)}", example="true")
        self.seen[name] = result
        return result

    def integer(self, name: str, default: int, *, minimum: int, maximum: int | None = None) -> int:
        value = self.number(name, default, minimum=minimum, maximum=maximum)
        if value != int(value):
            self.problem(name, "must be a whole number", example=str(default))
            value = default
        self.seen[name] = int(value)
        return int(value)

    def number(self, name: str, default: float, *, minimum: float, maximum: float | None = None) -> float:
        """A finite decimal number within `minimum` and `maximum`, both allowed."""
        text = self.raw(name)
        value: float = default
        if text:
            bounds = f"of at least {minimum:g}" if maximum is None else f"from {minimum:g} to {maximum:g}"
            try:
                value = float(text)
            except ValueError:
                value = float("nan")
            if not (minimum <= value <= (float("inf") if maximum is None else maximum)) or value == float("inf"):
                self.problem(name, f"must be a number {bounds}", example=f"{default:g}")
                value = default
        self.seen[name] = value
        return value

    def finish(self) -> None:
        """Raise `ConfigError` naming every problem met so far, if any."""
        if self.problems:
            raise ConfigError(self.problems)
