"""How `--help` looks: plain, since the tables of rich cut the names of flags in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from typer._click import Context
    from typer._click.formatting import HelpFormatter


class PanelGroup(TyperGroup):
    """A group whose help lists the commands panel by panel, which typer does with rich alone."""

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write each panel with its commands and the first sentence of what each does."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if isinstance(command, TyperCommand) and not command.hidden:
                sentence = " ".join((command.help or "").split("\n\n")[0].split()).partition(". ")[0]
                panels.setdefault(command.rich_help_panel or "Commands", []).append(
                    (name, sentence.removesuffix("."))
                )
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)
