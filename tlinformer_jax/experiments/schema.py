"""The schema of what a report reads of the actions' results, so that a damaged record is named with its field.

A schema is a type; [schema], for a list; [schema, ...], for a list that is not empty; (schema, schema), for what fits
one of them; or {name: schema}, for an object, which may have other entries too. A name that ends in '?' may be missing;
... stands for all names.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any


class Columns(dict[Any, Any]):
    """The schema of an object whose lists are columns of a table with at least one row; "edges" has one number more.

    A list of lists is a column for each of them; a table that has only such columns may lack all of them. The columns
    are the object's own lists, or those in `columns`, where "losses.all" is the list `all` of its part `losses`.
    """

    def __init__(self, fields: Mapping[Any, Any], columns: Sequence[str] = ()) -> None:
        super().__init__(fields)
        self.columns = tuple(columns) or tuple(self)


NUMBER = int | float | None  # what is not finite is null
NUMBERS = [NUMBER]
COUNTS = Columns({"right": [int], "answers": [int]})
CHANGE = {"change": NUMBER, "affected_change": NUMBER}
EVALUATION: dict[Any, Any] = {
    "length": int,
    "tokens": int,
    "split?": str,
    "figures": {...: NUMBER},
    "by_position?": Columns({"edges": [int], "loss": NUMBERS}),
    "by_window_position?": Columns({"edges": [int], "later?": NUMBERS}),
    "accuracy_by_position?": Columns({"edges": [int], **COUNTS}),
    "answers?": {...: COUNTS},
}
HISTORY = Columns(
    {
        "length": int,
        "starts": [int, ...],
        "losses": {"all": NUMBERS},
        "cuts": [{"distance": int, "affected_tokens": int, **CHANGE}, ...],
        "swapped?": (None, CHANGE),
        "same_tokens": Columns({"distances": NUMBERS, "losses": NUMBERS}),
        "mass": Columns({"edges": [int], "x": [NUMBERS], "z": [NUMBERS]}),
        "share": [int | float],
    },
    columns=("starts", "losses.all"),
)
# Action -> schema of its result.
ACTIONS: dict[str, Any] = {
    "evaluate": EVALUATION | {"test?": EVALUATION},
    "history": HISTORY,
    "samples": {"samples": [{"prompt": str, "text": str}]},
}


def misfit(value: Any, schema: Any, name: str) -> str:
    """Returns what is wrong with `value`, called `name`, or with the first wrong part of it; '' if it fits."""
    if isinstance(schema, tuple):
        wrong = [misfit(value, alternative, name) for alternative in schema]
        return wrong[-1] if all(wrong) else ""
    kind: Any = next((plain for plain in (dict, list) if isinstance(schema, plain)), schema or type(None))
    if not isinstance(value, kind):
        return f"{name!r} must be {getattr(kind, '__name__', kind)}"
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(schema, list):
        if ... in schema and not value:
            return f"{name!r} must not be empty"
        parts = [(part, schema[0], f"{name}[{index}]") for index, part in enumerate(value)]
    elif isinstance(schema, dict):
        fields = dict.fromkeys(value, schema[...]) if ... in schema else schema
        for field, inner in fields.items():
            plain = field.removesuffix("?")
            if plain in value:
                parts.append((value[plain], inner, f"{name}.{plain}"))
            elif plain == field:
                return f"'{name}.{field}' is missing"
    wrong_part = next(filter(None, (misfit(*part) for part in parts)), "")
    return wrong_part or (_misfit_columns(value, schema, name) if isinstance(schema, Columns) else "")


def _misfit_columns(value: Any, schema: Columns, name: str) -> str:
    """Returns what is wrong with the lengths of an object's lists."""
    rows: set[int] = set()
    names, missing = [], False
    for field in schema.columns:
        column = field.removesuffix("?")
        path, inner = column.split("."), schema.get(field)
        if path[0] not in value:
            continue
        names.append(column)
        found: Any = functools.reduce(operator.getitem, path, value)
        nested = isinstance(inner, list) and isinstance(inner[0], list)
        missing |= nested and not found
        rows |= {len(part) - (column == "edges") for part in (found if nested else [found])}
    if len(rows) == 1 and (min(rows) > 0 or (missing and rows == {0})):
        return ""
    lists = ", ".join(column for column in names if column != "edges")
    more = "edges with one number more" if "edges" in names else ""
    return f"{name!r} must have lists of equal length, not empty: {'; '.join(filter(None, (lists, more)))}"
