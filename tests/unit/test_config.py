"""Flags, over environment, over the TOML file, over defaults; what is wrong is named."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from paddock_server.app import manager_config, memory_budget
from paddock_server.config import CHANGES_IN_PLACE, DEMO_DIR, ConfigError, ServerConfig
from paddock_server.memory import RAM, DeviceMemory, Machine

if TYPE_CHECKING:
    from pathlib import Path


def test_flags_beat_environment_beats_file_beats_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "paddock.toml"
    file.write_text("parallel = 2\nctx_size = 2048\nbatch_size = 64\n")
    monkeypatch.setenv("PADDOCK_CTX_SIZE", "4096")
    monkeypatch.setenv("PADDOCK_BATCH_SIZE", "128")

    config = ServerConfig.load({"batch_size": 256}, file)

    assert (config.parallel, config.ctx_size, config.batch_size, config.models_max) == (2, 4096, 256, 4)


def test_everything_listens_on_loopback_by_default() -> None:
    assert ServerConfig.load({}).grpc_host == "127.0.0.1"


def test_models_directories_are_separated_like_path_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv("PADDOCK_MODELS_DIR", f"{first}{os.pathsep}{second}")

    assert (first.resolve(), second.resolve()) == ServerConfig.load({}).models_dir


def test_without_a_directory_the_demo_model_and_the_default_directory_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ServerConfig.load({}).model_directories == (DEMO_DIR,)

    default = tmp_path / "paddock" / "models"
    default.mkdir(parents=True)
    assert ServerConfig.load({}).model_directories == (DEMO_DIR, default.resolve())

    assert ServerConfig.load({"models_dir": [tmp_path]}).model_directories == (tmp_path.resolve(),)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"parallel": 0}, "--parallel (PADDOCK_PARALLEL)"),
        ({"grpc_port": 70_000}, "--grpc-port"),
        ({"log_level": "loud"}, "--log-level"),
        ({"models_dir": ["no-such-directory"]}, "'no-such-directory' does not exist"),
        ({"nonsense": 1}, "no setting named 'nonsense'"),
    ],
)
def test_a_wrong_setting_is_named(flags: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig.load(flags)

    assert expected in str(caught.value)


def test_what_is_wrong_in_the_file_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "paddock.toml"
    file.write_text("models_max = 3\nparallel = 0\nnonsense = 1\n[models.a]\nnonsense = 2\n")
    with pytest.raises(ConfigError) as caught:
        ServerConfig.load({}, file)
    monkeypatch.setenv("PADDOCK_PARALLEL", "0")
    with pytest.raises(ConfigError) as of_environment:
        ServerConfig.load({}, file)

    assert f"{file}:2: --parallel" in str(caught.value)
    assert f"{file}:3: There is no setting named 'nonsense'" in str(caught.value)
    assert f"{file}:2" not in str(of_environment.value)


def test_tables_of_models_are_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "paddock.toml"
    file.write_text("default_model = 'a'\nparallel = 2\n[defaults]\n[models.a]\n[groups.g]\n")
    config = ServerConfig.load({}, file)

    assert (config.parallel, config.config_file) == (2, file)


@pytest.mark.parametrize("text", ["parallel = ", "nonsense = 1\n"])
def test_a_wrong_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "paddock.toml"
    file.write_text(text)

    with pytest.raises(ConfigError):
        ServerConfig.load({}, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        ServerConfig.load({}, tmp_path / "none.toml")


def test_an_empty_state_directory_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDOCK_STATE_DIR", "")

    assert ServerConfig.load({}).state_dir is None


def test_settings_that_change_in_place_are_settings_and_reach_the_manager() -> None:
    assert ServerConfig.model_fields.keys() >= CHANGES_IN_PLACE
    machine = Machine((DeviceMemory(RAM, RAM, 1 << 30, 1 << 30),))
    before = ServerConfig.load({})
    others: dict[str, Any] = {"models_autoload": False, "autoload_downloads": True}
    others |= {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    others |= {"memory_budget": {RAM: 1}, "memory_margin": 0.5}
    for name in sorted(CHANGES_IN_PLACE):
        value = others[name] if name in others else getattr(before, name) + 1
        after = before.model_copy(update={name: value})
        reached = [(manager_config(one), memory_budget(machine, one)) for one in (before, after)]
        assert reached[0] != reached[1], name


def test_a_configuration_is_read_again_under_the_same_flags(tmp_path: Path) -> None:
    file = tmp_path / "paddock.toml"
    file.write_text("models_max = 2\nparallel = 2\n")
    config = ServerConfig.load({"parallel": 7}, file)
    file.write_text("models_max = 3\nparallel = 3\n")

    assert (config.reread().models_max, config.reread().parallel) == (3, 7)
