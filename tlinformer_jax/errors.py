"""Errors that a user can cause and correct: one line each, never a traceback.

Entry points (`tlinformer_jax.commands.cli`) print a `UserError` on stderr and exit with its status, 2. Library callers
get an ordinary exception, which is also a `ValueError`.
"""

import contextlib
import dataclasses
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class UserError(ValueError):
    """An error outside the program; the message says what is wrong, where, and what is allowed."""

    status = 2  # exit status of an entry point


class ConfigError(UserError):
    """An error for a configuration field, given by its dotted name, whose value is not allowed."""

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {value!r}: {allowed}")


class DataError(UserError):
    """An error for a file, corpus, tokenizer or token stream that cannot be used as it is."""


# ---- Rules for fields

LARGEST_INTEGER = 2**31 - 1  # tokens and positions are int32


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule for a field's values, and its text in an error message."""

    allowed: str
    holds: Callable[[Any], bool]


def integer(least: int, most: int | None = None, pattern: str | None = None, also: str = "") -> Rule:
    """Returns the rule for an integer, or for a text that matches `pattern`, which `also` describes."""

    def holds(value: Any) -> bool:
        if isinstance(value, str):
            return pattern is not None and re.fullmatch(pattern, value) is not None
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and least <= value and (most is None or value <= most)

    bounds = f">= {least}" if most is None else f"from {least} to {most}"
    return Rule(f"must be an integer {bounds}{also}", holds)


def number(allowed: str, holds: Callable[[float], bool]) -> Rule:
    """Returns the rule for a number that satisfies `holds`; `allowed` is its text."""
    return Rule(allowed, lambda value: isinstance(value, int | float) and not isinstance(value, bool) and holds(value))


def one_of(*choices: str) -> Rule:
    """Returns the rule for one of several words."""
    return Rule(f"must be one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


POSITIVE = integer(1, LARGEST_INTEGER)
TRUE_OR_FALSE = Rule("must be True or False", lambda value: isinstance(value, bool))


def check_fields(section: str, values: object, rules: Mapping[str, Rule]) -> None:
    """Checks the fields of `values` by their rules; raises a ConfigError for the first that breaks one."""
    for name, rule in rules.items():
        check_value(f"{section}.{name}", getattr(values, name), rule)


def check_value(field: str, value: Any, rule: Rule) -> None:
    """Raises a ConfigError if the value of a field, given by its dotted name, breaks the rule."""
    if not rule.holds(value):
        raise ConfigError(field, value, rule.allowed)


# ---- Messages


@contextlib.contextmanager
def file_errors_as(message: str, kind: type[UserError] = DataError) -> Iterator[None]:
    """Turns a failure to read or write in the body into a UserError: `message`, with the reason in brackets."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"{message} ({getattr(error, 'strerror', None) or error})") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns an ending for a message if `name` is close to a known one, else ''."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error message, cut to 200 characters; the error's type if it has no message."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    full = os.strerror(errno.ENOSPC)  # TensorStore puts this at the end of a long line
    return full if full in lines[0] else lines[0][:200]
