"""Config and sweep files: a user's Python files, or the package's by name (`tiny`, `wt103:paper-1k-512-0.5`)."""

import os
import pathlib
import re
import runpy
import traceback
from typing import TYPE_CHECKING, Any

from tlinformer_jax.errors import UserError, did_you_mean, first_line
from tlinformer_jax.files import local_path

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel contains the files inside the package, a checkout beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
SWEEP = "sweep_"


def config_file(given: str, flag: str = "--config") -> str:
    """Resolves a value of --config or --sweep, a path or the name of a package file, to FILE or FILE:VARIANT."""
    name, colon, variant = given.partition(":")
    if not re.fullmatch(r"[\w-]+", name) or os.path.isfile(name):
        return given
    files = _files()
    names = [known.removeprefix(SWEEP) for known in files if known.startswith(SWEEP) == (flag == "--sweep")]
    if name not in names:
        allowed = f"must be a Python file, or one of {', '.join(names)}"
        raise UserError(f"{flag}={given}: {allowed}{did_you_mean(name, names)}")
    return f"{files[name if flag == '--config' else SWEEP + name]}{colon}{variant}"


def load_python(given: str, flag: str, function: str) -> Any:
    """Runs a config or sweep file and calls its `function` with the variant, if any; every failure is a UserError."""
    what = f"{flag}={given}"
    if not given:
        raise UserError(f"{flag}: must name a {flag.strip('-')} file, or one of the package's; it is empty")
    local_path(given, flag)  # refuses a bucket, whose name would look like a package's
    path, _, variant = config_file(given, flag).partition(":")
    try:
        file = local_path(path, flag)
        file.read_bytes()  # raises an OSError, also for a folder, for which runpy would not
        made = runpy.run_path(str(file), run_name=f"{flag.strip('-')}_{file.stem}").get(function)
        if not callable(made):
            raise UserError(f"{what}: must be a Python file with a function {function}; it has none")
        return made(*filter(None, [variant]))
    except UserError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}: " if error.filename else ""  # none for a null byte
        raise UserError(f"{what}: {where}{error.msg}") from None
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, OSError) and error.filename == str(file):
            message = f"cannot be read ({error.strerror}); must be a Python file with a function {function}"
        elif variant and f"{function}() takes 0 positional" in str(error):
            message = f"must be {given.partition(':')[0]}; it has no variants, such as {variant!r}"
        else:
            message = f"{type(error).__name__} in {last.filename}, line {last.lineno}: {first_line(error)}"
        raise UserError(f"{what}: {message}") from None


def add_defaults(config: "ConfigDict") -> None:
    """Adds the defaults of fields that a config file leaves out, so that flags can override them.

    A field whose value is not of its default's type then accepts any type; `run_config` checks it later.
    """
    from ml_collections import FieldReference

    from tlinformer_jax.config.run import SMALL_MODEL, default_config_dict

    whole = default_config_dict()
    if not config.get("model"):
        whole.model.update(SMALL_MODEL)
    with config.unlocked():
        for name, defaults in whole.items():
            section = config.get(name)
            if section is None:
                config[name] = defaults
            elif hasattr(section, "items"):
                for field, default in defaults.items(preserve_field_references=True):
                    if field not in section:
                        section[field] = default
                    elif section.get_type(field) != defaults.get_type(field):
                        value = section[field]
                        del section[field]
                        section[field] = FieldReference(value, field_type=object)


def _files() -> dict[str, pathlib.Path]:
    """Returns the paths of the package's config and sweep files, by name without `.py`."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.py"))}
