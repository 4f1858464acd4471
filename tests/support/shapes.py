"""Checks the shapes and dtypes in the package's signatures while the tests run (jaxtyping's import hook)."""

import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin

import beartype
import jax
import jaxtyping
import numpy as np


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations of arrays checked at every call; mypy checks all the others.

    Fields of dataclasses are left alone: JAX also builds pytrees of shapes, of None and of placeholders.
    """
    if function.__name__ in ("__init__", "check_single_arg"):  # jaxtyping's, of a dataclass
        return function
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: _numpy_too(hint) for name, hint in hints.items() if _has_array(hint)}
    return beartype.beartype(function)


def _has_array(hint: Any) -> bool:
    array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return array or any(map(_has_array, get_args(hint)))


def _numpy_too(hint: Any) -> Any:
    """The annotation, with arrays of NumPy allowed where those of JAX are, as JAX itself does."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_numpy_too, get_args(hint)))
    if get_origin(hint) is Sequence:
        return Sequence[_numpy_too(get_args(hint)[0])]
    return hint
