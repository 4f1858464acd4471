"""Runs the Python blocks of pages, at tiny size: `python -m tests.docs.run_python PAGE...` in an empty directory.

The blocks of a page run in order in one namespace. A block with a title is saved under it, too. What a block prints
must be what the block `text title="prints"` after it shows. Prints a line for each block that fails, the exit status is
their number.
"""

import contextlib
import inspect
import io
import os
import pathlib
import re
import sys
import time
import traceback

from tests.docs.blocks import ROOT, Block, blocks, needs_of

RUN = {
    "model": {"d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "generation_window": 16},
    "train": {"steps": 2, "batch_size": 4, "log_every": 1},
    "data": {"sequence_length": 64},
}


def smaller(code: str) -> str:
    """The code with few steps and few tokens, and a small model where it leaves its size open."""
    few = '"d_model": 32, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, '
    code = code.replace('"model": {', '"model": {' + few).replace('{"train": {', '{"model": {' + few + '}, "train": {')
    code = re.sub(r'"steps": \d+', '"steps": 2', code)
    code = re.sub(r"\bsteps=\d+", "steps=2", code)
    code = re.sub(r'"(sequence_length|batch_size)": (\d+)', lambda found: f'"{found[1]}": {int(found[2]) // 2}', code)
    return re.sub(r"max_new_tokens=\d\d+", "max_new_tokens=12", code)


def run(block: Block, following: Block | None, names: dict) -> str | None:
    """Runs a block; returns what is wrong."""
    if block.title:
        pathlib.Path(block.title).write_text(block.text)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(smaller(block.text), "block", "exec"), names)
    except Exception:
        return traceback.format_exc(limit=-2)
    shown = following.text if following is not None and following.title == "prints" else None
    if shown is not None and printed.getvalue().rstrip() != shown.rstrip():
        return f"prints {printed.getvalue()!r}"
    return None


def main() -> int:
    """Runs the pages of the command line."""
    from pydoc_data import topics

    from tlinformer_jax import train_and_evaluate

    topics.topics = dict(list(topics.topics.items())[::12])  # the text of data.dataset = "pydoc"
    for name in ("configs", "README.md"):
        os.symlink(ROOT / name, name)
    train_and_evaluate(RUN, "runs/tiny")
    failed = 0
    for page in map(pathlib.Path, sys.argv[1:]):
        start = time.perf_counter()
        if missing := [name for name in needs_of(page) if name not in inspect.signature(train_and_evaluate).parameters]:
            failed += os.environ.get("TLINFORMER_SKIP_NOTHING") == "1"
            print(f"{page}: skipped, train_and_evaluate has no {missing}")
            continue
        found, names = blocks(page), {"__name__": "page"}
        for block, following in zip(found, [*found[1:], None]):
            if block.language == "python" and (wrong := run(block, following, names)):
                failed += 1
                print(f"{page}:{block.line}: {wrong}")
        print(f"{page.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
