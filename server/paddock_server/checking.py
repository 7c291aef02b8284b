"""`paddock check-config`: everything that is wrong with the configuration, without starting a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paddock_server.catalog import Catalog, CatalogError, InvalidConfigError, file_problems
from paddock_server.config import ConfigError, ServerConfig, UnreadableFileError

if TYPE_CHECKING:
    from collections.abc import Mapping


def problems(flags: Mapping[str, object], file: Path | None) -> list[str]:
    """Return a sentence for each problem, with file and line where it has them; none when all is well.

    `flags` are those of the command line, by field of `ServerConfig`.
    """
    try:
        config = ServerConfig.load(flags, file)
    except ConfigError as error:
        preset = flags.get("models_preset")
        readable = None if isinstance(error, UnreadableFileError) else file
        files = file_problems(preset if isinstance(preset, Path) else None, readable)
        return [*str(error).split("\n"), *(str(problem) for problem in files)]
    try:
        catalog = Catalog(
            config.model_directories,
            preset=config.models_preset,
            config_file=config.config_file,
            hub_cache=config.hub_cache,
        )
        catalog.scan(reread=True)
    except InvalidConfigError as error:
        return [str(problem) for problem in error.problems]
    except CatalogError as error:
        return [str(error)]
    return [str(problem) for problem in catalog.problems]
