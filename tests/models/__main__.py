"""`python -m tests.models make DIR [--only NAME]`: write the test models into a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tests.models import MODELS, WRONG_MODELS, make_bench_model

MAKERS = {**MODELS, **{name: wrong.make for name, wrong in WRONG_MODELS.items()}, "bench": make_bench_model}

app = typer.Typer(add_completion=False)


@app.callback()
def main() -> None:
    """Make the tiny models of the tests."""


@app.command()
def make(
    directory: Annotated[Path, typer.Argument(help="Where to write them.")],
    only: Annotated[
        list[str] | None, typer.Option(help="One model by name, wrong ones and `bench` too.")
    ] = None,
) -> None:
    """Make every model that loads, or the one named by --only (which may be repeated)."""
    names = list(MODELS) if only is None else only
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        message = f"no model {unknown[0]!r}; there are {', '.join(MAKERS)}"
        raise typer.BadParameter(message, param_hint="--only")
    for name in names:
        for path in MAKERS[name](directory / f"{name}.gguf"):
            typer.echo(path)


if __name__ == "__main__":
    app(prog_name="python -m tests.models")
