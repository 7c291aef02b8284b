"""Commands that serve until they are told to stop: up, serve, gateway.

What they run is imported when they run: the client alone has neither the server nor the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from paddock.cli import output
from paddock.cli.announcing import Person, told_how_it_stops, told_of_the_server
from paddock.cli.failures import ExitCode
from paddock.cli.output import note
from paddock.cli.session import DEFAULT_SERVER, JsonOption, ServerOption
from paddock.daemons import is_exposed, loop_factory, settle_heap, told_to_stop

if TYPE_CHECKING:
    from paddock.api import ModelManagerApi
    from paddock_gateway.serve import Gateway
    from paddock_server.config import ServerConfig

HostOption = Annotated[
    str, typer.Option("--host", envvar="PADDOCK_HOST", help="Address the HTTP server listens on.")
]
PortOption = Annotated[
    int,
    typer.Option(
        "--port", envvar="PADDOCK_PORT", min=0, max=65535, help="Port of the HTTP server; 0: a free one."
    ),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin", metavar="ORIGIN", help="Origin of web pages that may read answers. Can be repeated."
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="PADDOCK_CONFIG", metavar="FILE", help="Settings as TOML.")
]

SERVER_FLAGS: Final[Mapping[str, Any]] = {
    "models_dir": Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Directory of GGUF files; can be repeated. Without: the demo model and a default one.",
        ),
    ],
    "models_preset": Annotated[
        Path | None, typer.Option(metavar="FILE", help="llama-server's INI file about models.")
    ],
    "hf_cache": Annotated[
        bool | None,
        typer.Option(help="Whether models of the Hugging Face Hub are served and downloaded. [default: yes]"),
    ],
    "models_max": Annotated[
        int | None,
        typer.Option(help="Most models loaded at once, each replica counted; 0: no limit. [default: 4]"),
    ],
    "models_autoload": Annotated[
        bool | None, typer.Option(help="Whether a request loads a model that is not loaded. [default: yes]")
    ],
    "autoload_downloads": Annotated[
        bool | None,
        typer.Option(help="Whether such a request also downloads a model that is not there. [default: no]"),
    ],
    "ctx_size": Annotated[
        int | None,
        typer.Option(
            "--ctx-size",
            "-c",
            help="Tokens the KV cache of a model holds; 0: as trained, or what fits. [default: 8192]",
        ),
    ],
    "parallel": Annotated[int | None, typer.Option(help="Sequences a model decodes at once. [default: 4]")],
    "n_gpu_layers": Annotated[
        int | None, typer.Option(help="Layers on the accelerator; -1: all. [default: -1]")
    ],
    "threads": Annotated[
        int | None,
        typer.Option("--threads", "-t", help="Threads of a worker; 0: one per physical core. [default: 0]"),
    ],
    "batch_size": Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Most tokens decoded in one step. [default: 512]")
    ],
    "cache_type_k": Annotated[
        str | None,
        typer.Option("--cache-type-k", "-ctk", help="Type of the keys in the KV cache. [default: f16]"),
    ],
    "cache_type_v": Annotated[
        str | None,
        typer.Option("--cache-type-v", "-ctv", help="Type of the values in the KV cache. [default: f16]"),
    ],
    "queue_limit": Annotated[
        int | None, typer.Option(help="Requests that may wait for one model. [default: 128]")
    ],
    "target_step_milliseconds": Annotated[
        int | None,
        typer.Option(help="Length of a step while a prompt is taken in beside streams. [default: 50]"),
    ],
    "idle_timeout_seconds": Annotated[
        float | None, typer.Option(help="Unload models after so long without use; 0: never. [default: 0]")
    ],
    "sleep_idle_seconds": Annotated[
        float | None,
        typer.Option(
            help="Have models give their memory back after so long without use; 0: never. [default: 0]"
        ),
    ],
    "total_queue_limit": Annotated[
        int | None,
        typer.Option(help="Requests that may wait for models to be loaded, over all models. [default: 4096]"),
    ],
    "memory_budget": Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE=SIZE,...",
            help="Memory models may take, such as RAM=24GiB; else what is free, less the margin.",
        ),
    ],
    "memory_margin": Annotated[
        float | None,
        typer.Option(help="Part of the free memory of each device to leave alone. [default: 0.1]"),
    ],
    "drain_seconds": Annotated[
        float | None, typer.Option(help="How long running requests may go on at the end. [default: 30]")
    ],
    "grpc_host": Annotated[
        str | None, typer.Option(help="Address the gRPC server listens on. [default: 127.0.0.1]")
    ],
    "grpc_port": Annotated[
        int | None, typer.Option(help="Port of the gRPC server; 0: a free one. [default: 50051]")
    ],
    "reflection": Annotated[
        bool | None, typer.Option(help="Whether gRPC reflection is on, for grpcurl. [default: yes]")
    ],
    "log_level": Annotated[str | None, typer.Option(help="debug, info, warning or error. [default: info]")],
    "log_format": Annotated[str | None, typer.Option(help="auto, json or console. [default: auto]")],
    "state_dir": Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="Where loads are remembered; '' turns it off.")
    ],
    "restore": Annotated[
        bool | None,
        typer.Option(help="Whether remembered loads and downloads are taken up at the start. [default: yes]"),
    ],
}
"""The fields of `ServerConfig` as flags. What was not typed is None and leaves the field to the environment,
to the configuration file and to the default; ranges are checked there, for all of them alike. The defaults
are told in the help, and not read from `ServerConfig`: the client alone has no server to read them from."""


HTTP_FLAGS: Final[Mapping[str, Any]] = {
    "host": Annotated[
        str | None, typer.Option(help="Address the HTTP server listens on. [default: 127.0.0.1]")
    ],
    "port": Annotated[
        int | None, typer.Option(help="Port of the HTTP server; 0: a free one. [default: 8080]")
    ],
    "cors_origins": CorsOption,
}
"""The fields of `ServerConfig` that are about `up` alone."""


def with_flags(
    shared_flags: Mapping[str, Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of a table. It gets those that were typed as `flags`."""
    return lambda command: _with_flags(command, shared_flags)


def _with_flags(command: Callable[..., None], shared_flags: Mapping[str, Any]) -> Callable[..., None]:
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in shared_flags.items()
    ]

    @wraps(command)
    def typed(**values: Any) -> None:
        given = {name: values.pop(name) for name in shared_flags}
        command(**values, flags={name: value for name, value in given.items() if value is not None})

    typed.__annotations__ = {}
    vars(typed)["__signature__"] = inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
    )
    return typed


_CATALOG_FLAGS: Final = {name: SERVER_FLAGS[name] for name in ("models_dir", "models_preset")}


@with_flags(_CATALOG_FLAGS)
def check_config(
    flags: Mapping[str, object], config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Check the configuration without starting a server; exit code 1 when something is wrong."""
    with require_extras("check-config", "server"):
        from paddock_server.checking import problems
    found = problems(flags, config)
    if as_json:
        output.write_json({"ok": not found, "problems": found}, indent=2)
    else:
        for problem in found:
            output.write(f"{problem}\n")
    if found:
        raise typer.Exit(ExitCode.FAILED)
    if not as_json:
        note("The configuration is sound.")


@with_flags({**SERVER_FLAGS, **HTTP_FLAGS})
def up(flags: Mapping[str, object], config: ConfigOption = None) -> None:
    """Serve models over gRPC and HTTP, in one process. Stops with Ctrl-C or SIGTERM."""
    with require_extras("up", "server,gateway"):
        from paddock_gateway.app import GatewayOptions
        from paddock_gateway.serve import ListenError, serve
        from paddock_server.app import StartError, run

        _require_llama_cpp()
    settings = _server_config(flags, config)
    person = Person(settings.log_format)

    @contextlib.asynccontextmanager
    async def attach(api: ModelManagerApi, at_once: asyncio.Event) -> AsyncGenerator[Gateway]:
        options = GatewayOptions(cors_origins=settings.cors_origins)
        try:
            async with serve(
                api,
                settings.host,
                settings.port,
                drain_seconds=settings.drain_seconds,
                options=options,
                at_once=at_once,
            ) as gateway:
                _log_gateway(gateway)
                person.http_url = gateway.url
                yield gateway
        except ListenError as error:
            raise StartError(str(error)) from error

    with _start_errors():
        run(settings, attach=attach, onlooker=person)


@with_flags(SERVER_FLAGS)
def serve(flags: Mapping[str, object], config: ConfigOption = None) -> None:
    """Serve models over gRPC alone. Stops with Ctrl-C or SIGTERM."""
    with require_extras("serve", "server"):
        from paddock_server.app import run

        _require_llama_cpp()
    settings = _server_config(flags, config)
    with _start_errors():
        run(settings, onlooker=Person(settings.log_format))


def gateway(
    server: ServerOption = DEFAULT_SERVER,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8080,
    cors_origin: CorsOption = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long running requests may go on at the end.")
    ] = 30,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Least severe level logged.")
    ] = "info",
    log_format: Annotated[
        Literal["auto", "json", "console"], typer.Option(help="auto: json unless a terminal.")
    ] = "auto",
) -> None:
    """Serve HTTP in front of a server elsewhere. Stops with Ctrl-C or SIGTERM."""
    with require_extras("gateway", "gateway"):
        from paddock_gateway.app import GatewayOptions
        from paddock_gateway.serve import ListenError, serve
        from paddock_server.logs import configure_logging
    from paddock.multiplexed import MultiplexedApi
    from paddock.transport import connect

    configure_logging(log_level, log_format)
    person = Person(log_format, server=server)

    async def run() -> None:
        options = GatewayOptions(cors_origins=tuple(cors_origin or ()))
        async with (
            connect(server) as channel,
            MultiplexedApi(channel) as api,
            told_to_stop(ends_process=True) as stop,
            told_how_it_stops(person, stop, drain_seconds),
            serve(
                api, host, port, drain_seconds=drain_seconds, options=options, at_once=stop.at_once
            ) as running,
        ):
            _log_gateway(running)
            person.http_url = running.url
            settle_heap()
            async with told_of_the_server(channel, person, server):
                await stop.asked.wait()

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(run())
    except ListenError as error:
        output.error(str(error))
        raise typer.Exit(ExitCode.FAILED) from error


@contextlib.contextmanager
def _start_errors() -> Generator[None]:
    """Turn what keeps a server from starting into a sentence."""
    from paddock_server.app import StartError

    try:
        yield
    except StartError as error:
        output.error(str(error))
        raise typer.Exit(ExitCode.FAILED) from error


@contextlib.contextmanager
def require_extras(command: str, extras: str) -> Generator[None]:
    """Turn a missing dependency into a sentence that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "paddock").partition(".")[0]
        if package.startswith("paddock"):
            raise  # not a dependency: a bug
        install = f"pip install 'paddock[{extras}]'"
        output.error(f"`paddock {command}` needs {package}, which is not installed: {install}.")
        raise typer.Exit(ExitCode.FAILED) from error


def _require_llama_cpp() -> None:
    """Raise when the workers would not find llama.cpp; the server itself never imports it."""
    if importlib.util.find_spec("llama_cpp") is None:
        message = "No module named 'llama_cpp'"
        raise ModuleNotFoundError(message, name="llama_cpp")


def _server_config(flags: Mapping[str, object], file: Path | None) -> ServerConfig:
    from paddock_server.config import ConfigError, ServerConfig, default_models_dir

    try:
        config = ServerConfig.load(flags, file)
    except ConfigError as error:
        output.error(str(error))
        raise typer.Exit(ExitCode.USAGE) from error
    if not config.models_dir:
        note(f"Without --models-dir, this serves the demo model foal and what is in {default_models_dir()}.")
    return config


def _log_gateway(gateway: Gateway) -> None:
    import structlog

    log = structlog.get_logger()
    log.info("gateway_ready", http=gateway.url.removeprefix("http://"))
    if is_exposed(gateway.host):
        log.warning(
            "gateway_exposed",
            host=gateway.host,
            advice="Anyone who reaches this address can use the server.",
        )
