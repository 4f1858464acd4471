"""Checks the shapes and dtypes in the package's signatures while the tests run (jaxtyping's import hook)."""

from collections.abc import Callable
from typing import Any, get_args

import beartype
import jaxtyping


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations of arrays checked at every call; mypy checks all the others.

    Fields of dataclasses are left alone: JAX also builds pytrees of shapes, of None and of placeholders.
    """
    if function.__name__ in ("__init__", "check_single_arg"):  # jaxtyping's, of a dataclass
        return function
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in hints.items() if _has_array(hint)}
    return beartype.beartype(function)


def _has_array(hint: Any) -> bool:
    array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return array or any(map(_has_array, get_args(hint)))
