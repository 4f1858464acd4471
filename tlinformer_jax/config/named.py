"""The config and sweep files that come with the package, by name: `tiny`, `wt103:paper-1k-512-0.5`."""

import pathlib
import re

from tlinformer_jax.errors import UserError, did_you_mean

PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel holds them inside the package; a checkout, where they are written, beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
SWEEP = "sweep_"


def config_file(given: str, flag: str = "--config") -> str:
    """The file, or FILE.py:VARIANT, that the value of --config or --sweep means.

    The name of a file that comes with the package becomes its path; a path stays as it is.

    Raises:
      UserError: for a name that the package does not have.
    """
    name, colon, variant = given.partition(":")
    if not re.fullmatch(r"[\w-]+", name) or pathlib.Path(name).is_file():
        return given
    files = _files()
    names = [known.removeprefix(SWEEP) for known in files if known.startswith(SWEEP) == (flag == "--sweep")]
    if name not in names:
        allowed = f"must be a Python file, or one of {', '.join(names)}"
        raise UserError(f"{flag}={given}: {allowed}{did_you_mean(name, names)}")
    return f"{files[name if flag == '--config' else SWEEP + name]}{colon}{variant}"


def _files() -> dict[str, pathlib.Path]:
    """The paths of the package's config and sweep files, by their names without `.py`."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.py"))}
