"""Where the server is and how to talk to it. The one place that reads the environment."""

from __future__ import annotations

import math
import numbers
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from patchclamp.errors import invalid_field

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT = 120.0

TLS: TypeAlias = "bool | str | Path | grpc.ChannelCredentials | None"

_SCHEME = re.compile(r"(dns|unix|unix-abstract|ipv4|ipv6|vsock|passthrough|xds):")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):\d{1,5}")
_LOOPBACK = re.compile(r"(dns:/*)?(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+|unix(-abstract)?:.*")


@dataclass(frozen=True)
class Config:
    """How to reach one server.

    `timeout` is in seconds and holds for one verb in all; infinity means none. `tls` is False for plain text, True for
    the system's certificate authorities, a file of certificate authorities, or finished credentials.
    """

    target: str = DEFAULT_TARGET
    token: str | None = field(default=None, repr=False)
    tls: bool | str | Path | grpc.ChannelCredentials = field(default=False, repr=False)
    timeout: float = DEFAULT_TIMEOUT

    @property
    def loopback(self) -> bool:
        """Whether the server is on this machine."""
        return bool(_LOOPBACK.fullmatch(self.target))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials; None for plain text."""
        if isinstance(self.tls, grpc.ChannelCredentials):
            return self.tls
        if isinstance(self.tls, bool):
            return grpc.ssl_channel_credentials() if self.tls else None
        try:
            authorities = Path(self.tls).read_bytes()
        except OSError as fault:
            raise invalid_field("tls", f"cannot read {str(self.tls)!r}: {fault.strerror or fault}") from fault
        return grpc.ssl_channel_credentials(root_certificates=authorities)


def resolve(target: str | None, token: str | None, tls: TLS, timeout: float | None) -> Config:
    """The configuration of a client: what is given, else PATCHCLAMP_TARGET, _TOKEN, _TIMEOUT, else the default."""
    seconds = timeout if timeout is not None else _number("PATCHCLAMP_TIMEOUT", DEFAULT_TIMEOUT)
    return Config(
        target=check_target(target or os.environ.get("PATCHCLAMP_TARGET") or DEFAULT_TARGET),
        token=_check_token(token if token is not None else os.environ.get("PATCHCLAMP_TOKEN")),
        tls=False if tls is None else tls,
        timeout=check_timeout(seconds),
    )


def colour_wanted() -> bool:
    """Whether the user lets programs print in colour (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def environment_of_a_server() -> dict[str, str]:
    """The environment without patchclamp's own settings: what the user set for another server stays out."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PATCHCLAMP_")}


def check_target(target: str) -> str:
    """The target, when gRPC will understand it as it was meant."""
    if _SCHEME.match(target) or _HOST_AND_PORT.fullmatch(target):
        return target
    if "://" in target:
        raise invalid_field("target", f"{target!r} is a URL; write {target.split('://', 1)[1].rstrip('/')!r}")
    # gRPC would take port 443 and wait there.
    raise invalid_field("target", f"{target!r} names no port; write 'host:50051', 'unix:/path' or 'dns:///name:50051'")


def check_timeout(timeout: Any) -> float:
    """The timeout, when it is one."""
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout is a number of seconds, not {type(timeout).__name__}")
    seconds = float(timeout)
    if math.isnan(seconds) or seconds <= 0:
        raise invalid_field("timeout", f"{timeout} is not a time; give seconds above zero, or math.inf for none")
    return seconds


def _check_token(token: str | None) -> str | None:
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        # The text itself stays out of the message: it is a secret.
        raise invalid_field("token", "a token is printable ASCII without spaces or line ends")
    return token or None


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise invalid_field(variable, f"{text!r} is not a number of seconds") from None
