"""The config and sweep files that come with the package, by name: `tiny`, `wt103:paper-1k-512-0.5`."""

import pathlib
import re

from tlinformer_jax.errors import UserError, did_you_mean

PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel holds them inside the package; a checkout, where they are written, beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
SWEEP = "sweep_"


def config_file(given: str, flag: str = "--config") -> str:
    """The file that `--config` or `--sweep` means, FILE.py or FILE.py:VARIANT, for the name of one of ours too.

    What is a file, or cannot be a name, stays as it is given.

    Raises:
      UserError: for a name that is none of ours.
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
    """All of them by name."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.py"))}
