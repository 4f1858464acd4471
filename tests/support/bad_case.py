"""A bad input: a command, and what its one line must name; `bad_inputs` says what `{d}` is."""

import dataclasses

# What every command gets that is not said to go without.
USUAL = {
    "train": ("--config={d}/small.py", "--workdir={d}/new"),
    "prepare": ("--config={d}/small.py",),
    "evaluate": ("--workdir={d}/run",),
    "generate": ("--workdir={d}/run", "--prompt=a"),
    "convert": ("--config={d}/small.py", "--workdir={d}/new"),
    "sweep": ("--sweep={d}/sweep.py", "--out={d}/new"),
    "report": ("--results={d}", "--out={d}/new.md"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
      what: is wrong.
      command: of `python -m tlinformer_jax`.
      arguments: beside the usual ones; one of the same flag stands in the place of the usual one.
      says: what the line must hold.
      usual: whether the usual arguments are given.
      cache: the environment's TLINFORMER_CACHE.
    """

    what: str
    command: str
    arguments: tuple[str, ...]
    says: str
    usual: bool = True
    cache: str = "{d}/cache"

    def argv(self, folder: str) -> list[str]:
        """All arguments, for files in `folder`."""
        given = {argument.split("=")[0] for argument in self.arguments}
        usual = USUAL.get(self.command, ()) if self.usual else ()
        kept = [argument for argument in usual if argument.split("=")[0] not in given]
        return [argument.replace("{d}", folder) for argument in (*kept, *self.arguments)]


def fields(*rows: tuple[str, str]) -> list[Case]:
    """Cases of one wrong field each: 'section.field=value', and what the line must say beside the field's name."""
    return [
        Case(f"{setting.split('=')[0]}: {says}", "train", (f"--config.{setting}",), setting.split("=")[0])
        for setting, says in rows
    ]
