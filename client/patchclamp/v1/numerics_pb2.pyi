from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class Numerics(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NUMERICS_UNSPECIFIED: _ClassVar[Numerics]
    NUMERICS_DEFAULT: _ClassVar[Numerics]
    NUMERICS_DETERMINISTIC: _ClassVar[Numerics]
    NUMERICS_SOLO: _ClassVar[Numerics]
NUMERICS_UNSPECIFIED: Numerics
NUMERICS_DEFAULT: Numerics
NUMERICS_DETERMINISTIC: Numerics
NUMERICS_SOLO: Numerics
