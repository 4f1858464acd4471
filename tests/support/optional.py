"""What a test needs beyond the package's own requirements: without it the test is skipped, or, in CI, fails."""

import importlib.util
import os
from collections.abc import Iterable

import pytest

# Set to 1 by .ci/run, which installs all of it.
SKIP_NOTHING = "TLINFORMER_SKIP_NOTHING"


def need(missing: Iterable[str], remedy: str) -> None:
    """Skips the test if anything is missing, or fails it where nothing may be skipped; `remedy` says what to do."""
    names = ", ".join(missing)
    if not names:
        return
    message = f"not installed: {names}; {remedy}"
    if os.environ.get(SKIP_NOTHING, "0") not in ("", "0"):
        pytest.fail(f"{message} ({SKIP_NOTHING} is set)")
    pytest.skip(message, allow_module_level=True)  # `need_modules` may stand where pytest.importorskip does


def need_modules(*names: str, extra: str) -> None:
    """`need` for Python packages that an extra of this project brings; imports none, and may stand outside tests."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    need(missing, f"pip install -e '.[{extra}]'")
