"""The schema of what a report reads of the actions' results, so that a damaged record is named with its field.

A schema is a type; [schema], for a list; or {name: schema}, for an object, which may have other entries too. A name
that ends in '?' may be missing; ... stands for all names.
"""

from typing import Any

NUMBER = int | float | None  # what is not finite is null
NUMBERS = [NUMBER]
COUNTS = {"right": [int], "answers": [int]}
EVALUATION: dict[Any, Any] = {
    "length": int,
    "tokens": int,
    "split?": str,
    "figures": {...: NUMBER},
    "by_position?": {"edges": [int], "loss": NUMBERS},
    "by_window_position?": {"edges": [int], "later?": NUMBERS},
    "accuracy_by_position?": {"edges": [int]} | COUNTS,
    "answers?": {...: COUNTS},
}
HISTORY: dict[Any, Any] = {
    "length": int,
    "starts": [int],
    "losses": {"all": NUMBERS},
    "cuts": [{"distance": int, "affected_tokens": int, "change": NUMBER, "affected_change": NUMBER}],
    "swapped?": dict | None,
    "same_tokens": {"distances": NUMBERS, "losses": NUMBERS},
    "mass": {"edges": [int], "x": [NUMBERS], "z": [NUMBERS]},
    "share": [int | float],
}
# Action -> schema of its result.
ACTIONS: dict[str, Any] = {
    "evaluate": EVALUATION | {"test?": EVALUATION},
    "history": HISTORY,
    "samples": {"samples": [{"prompt": str, "text": str}]},
}


def misfit(value: Any, schema: Any, name: str) -> str:
    """Returns what is wrong with `value`, called `name`, or with the first wrong part of it; '' if it fits."""
    kind = type(schema) if isinstance(schema, dict | list) else schema
    if not isinstance(value, kind):
        return f"{name!r} must be {getattr(kind, '__name__', kind)}"
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(schema, list):
        parts = [(part, schema[0], f"{name}[{index}]") for index, part in enumerate(value)]
    elif isinstance(schema, dict):
        fields = dict.fromkeys(value, schema[...]) if ... in schema else schema
        for field, inner in fields.items():
            plain = field.removesuffix("?")
            if plain in value:
                parts.append((value[plain], inner, f"{name}.{plain}"))
            elif plain == field:
                return f"'{name}.{field}' is missing"
    return next(filter(None, (misfit(*part) for part in parts)), "")
