"""The contract, as the committed stubs hold it. What a linter can see of the protos, `buf lint` checks."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "client" / "patchclamp" / "v1"
PROTOS = sorted(path.stem for path in (ROOT / "protos" / "patchclamp" / "v1").glob("*.proto"))


def load(proto: str) -> FileDescriptor:
    """The descriptor of one proto, from its stub."""
    descriptor = importlib.import_module(f"patchclamp.v1.{proto}_pb2").DESCRIPTOR
    assert isinstance(descriptor, FileDescriptor)
    return descriptor


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    """Every message of a proto, nested ones too; the entries that stand for maps are none."""
    pending = list(file.message_types_by_name.values())
    while pending:
        message = pending.pop()
        if not message.GetOptions().map_entry:
            yield message
        pending += message.nested_types


def enums(file: FileDescriptor) -> Iterator[EnumDescriptor]:
    """Every enum of a proto, nested ones too."""
    yield from file.enum_types_by_name.values()
    for message in messages(file):
        yield from message.enum_types


@pytest.mark.parametrize("path", sorted(STUBS.glob("*_pb2*.py")), ids=lambda path: path.stem)
def test_stub_imports_on_the_installed_protobuf(path: Path) -> None:
    importlib.import_module(f"patchclamp.v1.{path.stem}")


def test_every_proto_has_its_stubs_and_every_stub_its_proto() -> None:
    assert {path.stem.removesuffix("_pb2") for path in STUBS.glob("*_pb2.py")} == set(PROTOS)
    assert {path.stem.removesuffix("_pb2") for path in STUBS.glob("*_pb2.pyi")} == set(PROTOS)
    with_services = {proto for proto in PROTOS if load(proto).services_by_name}
    assert {path.stem.removesuffix("_pb2_grpc") for path in STUBS.glob("*_pb2_grpc.py")} == with_services


@pytest.mark.parametrize("proto", PROTOS)
def test_proto_is_in_the_versioned_package(proto: str) -> None:
    file = load(proto)
    assert file.package == "patchclamp.v1"
    # The descriptor pool of a process is one: a bare file name would clash with other packages'.
    assert file.name == f"patchclamp/v1/{proto}.proto"


@pytest.mark.parametrize("proto", PROTOS)
def test_sdk_needs_no_other_protos_than_its_own_and_the_well_known(proto: str) -> None:
    foreign = [file.name for file in load(proto).dependencies if not file.name.startswith("patchclamp/v1/")]
    assert all(name.startswith("google/protobuf/") for name in foreign), foreign


@pytest.mark.parametrize("proto", PROTOS)
def test_every_enum_starts_unspecified(proto: str) -> None:
    for enum in enums(load(proto)):
        first = enum.values[0]
        assert first.number == 0, enum.full_name
        assert first.name.endswith("_UNSPECIFIED"), enum.full_name
        prefix = first.name.removesuffix("UNSPECIFIED")
        assert all(value.name.startswith(prefix) for value in enum.values), enum.full_name


@pytest.mark.parametrize("proto", PROTOS)
def test_services_have_messages_of_their_own(proto: str) -> None:
    for service in load(proto).services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request", method.full_name
            assert method.output_type.name == f"{method.name}Response", method.full_name


@pytest.mark.parametrize("proto", PROTOS)
def test_every_message_travels(proto: str) -> None:
    for descriptor in messages(load(proto)):
        message = message_factory.GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if field.containing_oneof is None and field.type == FieldDescriptor.TYPE_STRING and not is_list(field):
                setattr(message, field.name, "κλίμα")
        assert type(message).FromString(message.SerializeToString()) == message, descriptor.full_name


def is_list(field: FieldDescriptor) -> bool:
    """Whether a field holds several values; how protobuf says so changed between its versions."""
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(getattr(field, "label", None) == FieldDescriptor.LABEL_REPEATED)
