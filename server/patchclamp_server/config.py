"""The server's settings: the only place that reads the environment.

Every setting is a flag (`--max-runs`), a variable (`PATCHCLAMP_MAX_RUNS`) and a key of the TOML file that `--config`
names (`max_runs`); the flag wins over the variable, the variable over the file, the file over the default.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from patchclamp_server import __version__
from patchclamp_server.errors import Error

PREFIX = "PATCHCLAMP_"

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigError(Error):
    """The settings are wrong; the message is one line that says which and how."""


class ServerConfig(BaseModel):
    """Everything that can be set, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, description="directory or hub id of the model to serve")
    demo: bool = Field(default=False, description="serve the bundled model")
    name: str | None = Field(default=None, description="name that requests may use; made from --model when left out")
    revision: str | None = Field(default=None, description="revision of a model on the hub: a branch, tag or commit")
    offline: bool = Field(default=False, description="never look for the model on the network")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="element type of the weights; auto: the checkpoint's own"
    )
    device_map: str | None = Field(default=None, description="spread the model over devices, for instance auto")
    huge_pages: bool = Field(
        default=True, description="back large tensors on the CPU by huge pages where the system offers them (Linux)"
    )

    host: str = Field(default="127.0.0.1", description="address to listen on, or unix:PATH")
    port: Port = Field(default=50051, description="port to listen on; 0 picks a free one and prints it")
    allow_insecure: bool = Field(
        default=False,
        description="listen beyond loopback although nobody is authenticated and nothing encrypted",
    )
    reflection: Literal["auto", "on", "off"] = Field(
        default="auto", description="gRPC reflection; auto: on for loopback and unix sockets only"
    )
    metrics_port: Port | Literal["off"] = Field(
        default=9464, description="port of the Prometheus metrics; off: none; a free one by default when --port is 0"
    )
    config: Path | None = Field(default=None, description="TOML file with settings")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="lowest level to log")

    max_runs: Positive = Field(default=256, description="runs of one request")
    max_tokens: Positive = Field(default=65_536, description="prompt tokens of one request")
    max_reads: Positive = Field(default=256, description="reads of one run")
    max_interventions: Positive = Field(default=256, description="interventions of one run")
    max_result_bytes: Positive = Field(default=4 << 30, description="bytes of one request's reads and logits")
    max_message_bytes: Positive = Field(default=16 << 20, description="bytes of one request message")
    max_prompt_characters: Positive = Field(default=4_194_304, description="characters of one prompt given as text")
    max_waiting_bytes: Positive = Field(
        default=8 << 30,
        description="bytes of results of all calls in flight together; calls beyond them are told to retry",
    )
    max_waiting: Positive = Field(default=1024, description="requests that wait for the engine; more are told to retry")

    max_samples: Positive = Field(default=64, description="samples of one generation")
    max_new_tokens: Positive = Field(default=4096, description="tokens that one sample of a generation may have")
    max_decoding: Positive = Field(default=64, description="samples that decode together; more wait for their turn")
    chunk_tokens: Positive = Field(default=512, description="tokens of a prompt that go ahead between others' tokens")
    kv_bytes: Positive = Field(default=4 << 30, description="bytes of keys and values of all samples that decode")

    drain_delay: Seconds = Field(
        default=0.0, description="seconds between reporting NOT_SERVING and refusing calls, so that balancers notice"
    )
    grace: Seconds = Field(default=30.0, description="seconds that calls in flight may take when the server stops")

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.demo and self.model is not None:
            raise ValueError("--demo and --model exclude each other")
        if not self.demo and self.model is None:
            raise ValueError("nothing to serve: give --model PATH_OR_HUB_ID, or --demo for the bundled model")
        if not self.loopback and not self.allow_insecure:
            raise ValueError(
                f"host {self.host} is open to other machines, and this version checks no credentials: "
                "listen on 127.0.0.1 or unix:PATH, or accept that with --allow-insecure"
            )
        return self

    @property
    def address(self) -> str:
        """What the gRPC server binds."""
        return self.host if self._unix else _authority(self.host, self.port)

    def bound_address(self, port: int) -> str:
        """The address in use, once the port is known."""
        return self.host if self._unix else _authority(self.host, port)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self._unix or self.host == "localhost" or _is_loopback(self.host)

    @property
    def serves_reflection(self) -> bool:
        return self.reflection == "on" or (self.reflection == "auto" and self.loopback)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Where metrics are served; None: nowhere."""
        if self.metrics_port == "off":
            return None
        free = self.port == 0 and "metrics_port" not in self.model_fields_set
        return ("127.0.0.1" if self._unix else self.host), (0 if free else self.metrics_port)

    @property
    def served_name(self) -> str:
        """The model's name: the one given, else `demo`, the directory's name, or the hub id."""
        if self.name or self.model is None:
            return self.name or "demo"
        path = Path(self.model).expanduser()
        return path.resolve().name if path.exists() else self.model

    @property
    def _unix(self) -> bool:
        return self.host.startswith("unix:")


def read_config(arguments: Sequence[str] | None = None) -> ServerConfig:
    """The settings of this process. Raises ConfigError; `--help` and `--version` print and leave."""
    flags = vars(_parser().parse_args(arguments))
    environment = _from_environment(os.environ)
    path = flags.get("config") or environment.get("config")
    file = {} if path is None else _from_file(Path(path).expanduser())
    try:
        return ServerConfig.model_validate(file | environment | flags)
    except ValidationError as fault:
        raise ConfigError(_one_line(fault, file, environment, flags)) from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that variables give; empty ones count as not given."""
    known = {PREFIX + name.upper(): name for name in ServerConfig.model_fields}
    _refuse_misspelt(environment, list(known))
    given = {name: environment.get(variable, "") for variable, name in known.items()}
    # A Kubernetes Service called `patchclamp` puts PATCHCLAMP_PORT=tcp://10.0.0.1:50051 into every pod beside it.
    return {name: value for name, value in given.items() if value and not value.startswith("tcp://")}


def _refuse_misspelt(environment: Mapping[str, str], known: list[str]) -> None:
    """A variable that is almost a setting is a mistake. Others with the prefix belong to the SDK or to the platform."""
    for variable in environment.keys() - set(known):
        if variable.startswith(PREFIX):
            short = variable.removeprefix(PREFIX)
            meant = difflib.get_close_matches(short, [name.removeprefix(PREFIX) for name in known], n=1, cutoff=0.8)
            if meant:
                raise ConfigError(f"the variable {variable} is not a setting; did you mean {PREFIX}{meant[0]}?")


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise ConfigError(f"the config file {path} cannot be read: {fault.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"the config file {path} is not TOML: {fault}") from None


def _one_line(
    fault: ValidationError, file: Mapping[str, Any], environment: Mapping[str, str], flags: Mapping[str, Any]
) -> str:
    """Every fault with the place that it came from."""
    faults: dict[str, str] = {}
    for error in fault.errors(include_url=False, include_context=False):
        name = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            faults[name] = f"{name} in the config file is not a setting"
        elif not name:
            faults[name] = error["msg"].removeprefix("Value error, ")
        else:
            source = f"--{_dashed(name)}" if name in flags else PREFIX + name.upper()
            source = source if name in flags or name in environment else f"{name} in the config file"
            faults.setdefault(name, f"{source}: {_lower(error['msg'])}, not {error['input']!r}")
    return "; ".join(faults.values())


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="patchclamp-server",
        description="Serves one language model for interpretability over gRPC.",
        epilog=f"Every option is also a variable ({PREFIX}MAX_RUNS) and a key of the config file (max_runs).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"patchclamp-server {__version__}")
    for name, field in ServerConfig.model_fields.items():
        _add_flag(parser, name, field)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """One flag per setting. What is not given stays out, so that other sources may say it."""
    flag, about = f"--{_dashed(name)}", (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=about, dest=name
        )
        return
    default = "" if field.default is None else f" (default: {field.default})"
    closed = get_origin(field.annotation) is Literal
    metavar = "|".join(get_args(field.annotation)) if closed else name.rsplit("_", maxsplit=1)[-1].upper()
    parser.add_argument(flag, default=argparse.SUPPRESS, help=about + default, metavar=metavar, dest=name)
