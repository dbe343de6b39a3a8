"""Settings: where they come from, which one wins, and errors that say in one line what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchclamp_server import __version__
from patchclamp_server.config import ConfigError, ServerConfig, read_config


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerConfig.model_fields:
        monkeypatch.delenv(f"PATCHCLAMP_{name.upper()}", raising=False)


def config_file(folder: Path, text: str) -> str:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def complaint(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config_file(tmp_path, 'model = "file"\nmax_runs = 1\nmax_reads = 1\nmax_tokens = 1\n')
    monkeypatch.setenv("PATCHCLAMP_MAX_RUNS", "2")
    monkeypatch.setenv("PATCHCLAMP_MAX_READS", "2")
    monkeypatch.setenv("PATCHCLAMP_CONFIG", file)
    config = read_config(["--max-runs", "3"])
    assert (config.max_runs, config.max_reads, config.max_tokens, config.max_waiting) == (3, 2, 1, 1024)
    assert config.model == "file"


def test_the_file_may_be_named_by_a_flag(tmp_path: Path) -> None:
    config = read_config(["--demo", "--config", config_file(tmp_path, 'metrics_port = "off"\noffline = true')])
    assert config.metrics_address is None
    assert config.offline


def test_defaults_are_those_of_one_machine() -> None:
    config = read_config(["--demo"])
    assert config.address == "127.0.0.1:50051"
    assert config.metrics_address == ("127.0.0.1", 9464)
    assert (config.serves_reflection, config.device, config.dtype) == (True, "auto", "auto")
    assert (config.max_runs, config.max_tokens) == (256, 65_536)
    assert (config.max_reads, config.max_interventions) == (256, 256)
    assert (config.max_result_bytes, config.max_message_bytes) == (4 << 30, 16 << 20)
    assert (config.max_prompt_characters, config.max_waiting_bytes) == (4 << 20, 8 << 30)
    assert (config.max_samples, config.max_new_tokens) == (64, 4096)
    assert (config.max_decoding, config.chunk_tokens, config.kv_bytes) == (64, 512, 4 << 30)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServerConfig(demo=True).port = 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "nothing to serve: give --model"),
        (["--demo", "--model", "x"], "--demo and --model exclude each other"),
        (["--demo", "--prot", "1"], "unrecognized arguments: --prot"),
        (["--demo", "--port", "70000"], "--port: input should be less than or equal to 65535, not '70000'"),
        (["--demo", "--dtype", "int8"], "--dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (["--demo", "--max-runs", "0", "--grace", "-1"], "--grace: input should be greater than or equal to 0"),
        (["--demo", "--metrics-port", "none"], "--metrics-port: "),
        (["--demo", "--config", "/no/such.toml"], "the config file /no/such.toml cannot be read: No such file"),
        (["--demo", "--host", "192.0.2.1"], "--allow-insecure"),
        (["--demo", "--host", "example.org"], "host example.org is open to other machines"),
        (["--demo", "--host", "::"], "--allow-insecure"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_would_be_right(arguments: list[str], text: str) -> None:
    assert text in complaint(*arguments)


def test_every_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_MAX_READS", "many")
    file = config_file(tmp_path, 'max_run = 3\nmax_tokens = "few"\n')
    text = complaint("--demo", "--config", file, "--port", "x")
    assert "max_run in the config file is not a setting" in text
    assert "max_tokens in the config file: input should be a valid integer" in text
    assert "PATCHCLAMP_MAX_READS: input should be a valid integer" in text
    assert "--port: input should be a valid integer" in text


def test_a_file_that_is_not_toml_is_told(tmp_path: Path) -> None:
    assert "is not TOML" in complaint("--demo", "--config", config_file(tmp_path, "model: x"))


def test_a_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_MAX_RUN", "3")
    assert "PATCHCLAMP_MAX_RUN is not a setting; did you mean PATCHCLAMP_MAX_RUNS?" in complaint("--demo")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PATCHCLAMP_TARGET", "localhost:1"),
        ("PATCHCLAMP_TOKEN", "t"),
        ("PATCHCLAMP_TIMEOUT", "3"),
        ("PATCHCLAMP_SERVICE_HOST", "10.0.0.1"),
        ("PATCHCLAMP_SERVICE_PORT", "50051"),
        ("PATCHCLAMP_PORT", "tcp://10.0.0.1:50051"),
        ("PATCHCLAMP_PORT_50051_TCP_PORT", "50051"),
        ("PATCHCLAMP_MAX_RUNS", ""),
    ],
)
def test_variables_of_the_sdk_and_of_kubernetes_are_not_ours(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert read_config(["--demo"]) == ServerConfig(demo=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "unix:/tmp/socket"])
def test_loopback_needs_no_leave(host: str) -> None:
    assert read_config(["--demo", "--host", host]).loopback


def test_other_hosts_need_leave_and_have_no_reflection_unless_asked() -> None:
    config = read_config(["--demo", "--host", "192.0.2.1", "--allow-insecure"])
    assert (config.loopback, config.serves_reflection) == (False, False)
    assert read_config(["--demo", "--host", "192.0.2.1", "--allow-insecure", "--reflection", "on"]).serves_reflection


def test_addresses_are_written_as_grpc_reads_them() -> None:
    assert read_config(["--demo", "--host", "::1", "--port", "7"]).address == "[::1]:7"
    assert read_config(["--demo", "--host", "unix:/run/socket"]).address == "unix:/run/socket"
    assert read_config(["--demo", "--host", "unix:/run/socket"]).bound_address(1) == "unix:/run/socket"


def test_a_free_port_comes_with_a_free_metrics_port() -> None:
    assert read_config(["--demo", "--port", "0"]).metrics_address == ("127.0.0.1", 0)
    assert read_config(["--demo", "--port", "0", "--metrics-port", "9464"]).metrics_address == ("127.0.0.1", 9464)


def test_a_model_is_called_after_its_place_unless_named(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert read_config(["--model", str(folder)]).served_name == "tiny"
    assert read_config(["--model", f"{folder}/"]).served_name == "tiny"
    assert read_config(["--model", "maker/model"]).served_name == "maker/model"
    assert read_config(["--model", "maker/model", "--name", "m"]).served_name == "m"
    assert read_config(["--demo"]).served_name == "demo"


def test_help_lists_every_setting_and_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read_config(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in ServerConfig.model_fields)
    with pytest.raises(SystemExit, match="0"):
        read_config(["--version"])
    assert capsys.readouterr().out == f"patchclamp-server {__version__}\n"
