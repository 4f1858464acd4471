"""Writes the report on many runs: `python -m tlinformer_jax report --results=DIR --out=docs/results.md`.

DIR has a record of each run, NAME.json: written by `tlinformer_jax sweep --results=DIR`, or a copy of the result.json
of `tlinformer_jax.main --then=...`. Figures are written into the folder `figures` beside the document.
"""

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError

RESULTS = flags.DEFINE_string("results", "", "Directory of the records.")
OUT = flags.DEFINE_string("out", "", "Markdown file to write.")


def main() -> None:
    """Reads all records, and writes the document and its figures."""
    folder, out = cli.given_path(RESULTS, "a directory of records"), cli.given_path(OUT, "a Markdown file")
    try:
        from tlinformer_jax.experiments.report import write_report

        write_report(folder, out)
    except ImportError as error:
        raise UserError(
            f"the report needs pandas and matplotlib ({error}): pip install 'tlinformer-jax[report]'"
        ) from None
    print(f"{out}, figures in {out.parent / 'figures'}")
