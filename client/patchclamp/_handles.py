"""Handles: tensors that the server keeps, valid wherever a later call takes a vector or the source of a patch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from patchclamp import _hookpoints, _tensors
from patchclamp.v1 import handle_pb2

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_NAME = re.compile(r"replicas/[^/]+/handles/[^/]+")


@dataclass(frozen=True)
class Handle:
    """A tensor kept on the server. Made by `keep=`; found in `run.handles`.

    `name` is its resource name, which only its owner can use. `hook_point` is where it was read, `shape` and `dtype`
    are as stored, `size_bytes` what it takes. It is gone after `expire_time` (UTC), or earlier when the server needs
    the room.
    """

    name: str
    hook_point: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    model: str = ""
    model_revision: str = ""
    owner: str = ""
    create_time: datetime | None = None
    expire_time: datetime | None = None

    @classmethod
    def from_message(cls, message: handle_pb2.Handle) -> Handle:
        """What the server told of it."""
        return cls(
            name=message.name,
            hook_point=_hookpoints.name_of(message.hook_point),
            shape=tuple(message.shape),
            dtype=_tensors.dtype_name(message.dtype),
            size_bytes=message.size_bytes,
            model=message.model,
            model_revision=message.model_revision,
            owner=message.owner,
            create_time=_time(message.create_time) if message.HasField("create_time") else None,
            expire_time=_time(message.expire_time) if message.HasField("expire_time") else None,
        )

    def __repr__(self) -> str:
        return f"Handle({self.name!r}, {self.hook_point}, {self.dtype} {list(self.shape)})"


def is_handle_name(text: str) -> bool:
    """Whether this is the resource name of a handle."""
    return _NAME.fullmatch(text) is not None


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
