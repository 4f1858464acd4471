"""Config and sweep files: Python files of the user, or of the package by name: `tiny`, `wt103:paper-1k-512-0.5`."""

import pathlib
import re
import runpy
import traceback
from typing import Any

from tlinformer_jax.errors import UserError, did_you_mean, first_line
from tlinformer_jax.files import local_path

PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel holds them inside the package; a checkout, where they are written, beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
SWEEP = "sweep_"


def config_file(given: str, flag: str = "--config") -> str:
    """The file, or FILE.py:VARIANT, that --config or --sweep means: a path, or the name of one of the package's."""
    name, colon, variant = given.partition(":")
    if not re.fullmatch(r"[\w-]+", name) or pathlib.Path(name).is_file():
        return given
    files = _files()
    names = [known.removeprefix(SWEEP) for known in files if known.startswith(SWEEP) == (flag == "--sweep")]
    if name not in names:
        allowed = f"must be a Python file, or one of {', '.join(names)}"
        raise UserError(f"{flag}={given}: {allowed}{did_you_mean(name, names)}")
    return f"{files[name if flag == '--config' else SWEEP + name]}{colon}{variant}"


def load_python(given: str, flag: str, function: str) -> Any:
    """What a function of such a file returns, given its variant if one is named; UserError for whatever goes wrong."""
    what = f"{flag}={given}"
    if not given:
        raise UserError(f"{flag}: must name a {flag.strip('-')} file, or one of the package's; it is empty")
    path, _, variant = config_file(given, flag).partition(":")
    try:
        file = local_path(path, flag)
        file.read_bytes()  # for its OSError: runpy would not say that a folder is one
        made = runpy.run_path(str(file), run_name=f"{flag.strip('-')}_{file.stem}").get(function)
        if not callable(made):
            raise UserError(f"{what}: must be a Python file with a function {function}; it has none")
        return made(*filter(None, [variant]))
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, OSError) and error.filename == str(file):
            told = f"cannot be read ({error.strerror}); must be a Python file with a function {function}"
        elif variant and f"{function}() takes 0 positional" in str(error):
            told = f"must be {given.partition(':')[0]}; it has no variants, such as {variant!r}"
        else:
            told = f"{type(error).__name__} in {last.filename}, line {last.lineno}: {first_line(error)}"
        raise UserError(f"{what}: {told}") from None


def _files() -> dict[str, pathlib.Path]:
    """The paths of the package's config and sweep files, by their names without `.py`."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.py"))}
