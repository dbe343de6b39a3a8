"""Errors: every status as one of the tree, with what its details say, whatever state they are in."""

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as rpc
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

import patchclamp as pc
from client.stand_in import Failure, StandIn, failing_run, result, summary
from patchclamp._status import error_of, error_of_run, parse_details
from patchclamp.v1 import error_pb2, failure_pb2, run_pb2


def packed(*details: Message) -> bytes:
    """A serialized status with these details."""
    status = status_pb2.Status(code=3, message="no")
    for detail in details:
        anything = any_pb2.Any()
        anything.Pack(detail)
        status.details.append(anything)
    return status.SerializeToString()


def info(reason: str, **metadata: str) -> rpc.ErrorInfo:
    return rpc.ErrorInfo(reason=reason, domain="patchclamp", metadata=metadata)


def error(code: grpc.StatusCode, *details: Message, message: str = "no") -> Any:
    return error_of(code, message, [("grpc-status-details-bin", packed(*details))])


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", pc.InvalidArgument),
        (grpc.StatusCode.OUT_OF_RANGE, "", pc.InvalidArgument),
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", pc.NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, "NAME_TAKEN", pc.AlreadyExists),
        (grpc.StatusCode.FAILED_PRECONDITION, "HANDLE_EXPIRED", pc.FailedPrecondition),
        (grpc.StatusCode.FAILED_PRECONDITION, "INTERVENTION_NEVER_FIRED", pc.InterventionNeverFired),
        (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", pc.Aborted),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", pc.TooLarge),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_OUT_OF_MEMORY", pc.TooLarge),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", pc.Overloaded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", pc.QuotaExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", pc.Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", pc.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "CANCELLED", pc.Cancelled),
        (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING", pc.Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", pc.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", pc.PermissionDenied),
        (grpc.StatusCode.UNIMPLEMENTED, "NOT_SERVED", pc.Unimplemented),
        (grpc.StatusCode.INTERNAL, "INTERNAL", pc.Internal),
        (grpc.StatusCode.UNKNOWN, "", pc.Internal),
        (grpc.StatusCode.DATA_LOSS, "", pc.Internal),
        # The code decides where the two contradict each other.
        (grpc.StatusCode.INTERNAL, "REQUEST_TOO_LARGE", pc.Internal),
    ],
)
def test_status_to_error(code: grpc.StatusCode, reason: str, kind: type[pc.Error]) -> None:
    found = error(code, info(reason, a="b")) if reason else error_of(code, "no", [])
    assert type(found) is kind
    assert (found.code, found.reason) == (code, reason)
    assert found.metadata == ({"a": "b"} if reason else {})


def test_every_code_and_every_reason_has_an_error() -> None:
    for code in set(grpc.StatusCode) - {grpc.StatusCode.OK}:
        assert type(error_of(code, "", [])) is not pc.Error
        for reason in error_pb2.ErrorReason.DESCRIPTOR.values_by_name:
            assert isinstance(error(code, info(reason.removeprefix("ERROR_REASON_"))), pc.Error)


def test_field_violations() -> None:
    violations = [("runs[0].reads[0].heads", "7 is not a head"), ("runs[1].prompt", "empty")]
    detail = rpc.BadRequest(
        field_violations=[rpc.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
    )
    found = error(grpc.StatusCode.INVALID_ARGUMENT, info("INVALID_FIELD"), detail)
    assert [(violation.field, violation.description) for violation in found.field_violations] == violations
    assert str(found) == "no:\n  runs[0].reads[0].heads: 7 is not a head\n  runs[1].prompt: empty"


def test_a_message_that_repeats_its_violations_is_said_once() -> None:
    detail = rpc.BadRequest(field_violations=[rpc.BadRequest.FieldViolation(field="a", description="is bad")])
    found = error(grpc.StatusCode.INVALID_ARGUMENT, info("INVALID_FIELD"), detail, message="a: is bad")
    assert str(found) == "a: is bad"
    detail.field_violations.add(field="b", description="is worse")
    found = error(grpc.StatusCode.INVALID_ARGUMENT, info("INVALID_FIELD"), detail, message="a: is bad; b: is worse")
    assert str(found) == "2 faults:\n  a: is bad\n  b: is worse"


def test_retry_quota_and_resource() -> None:
    wait = rpc.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000))
    assert error(grpc.StatusCode.RESOURCE_EXHAUSTED, info("OVERLOADED"), wait).retry_after == 2.5
    assert error(grpc.StatusCode.RESOURCE_EXHAUSTED, info("OVERLOADED")).retry_after is None
    quota = rpc.QuotaFailure(violations=[rpc.QuotaFailure.Violation(subject="tenant:a", description="tokens")])
    found = error(grpc.StatusCode.RESOURCE_EXHAUSTED, info("QUOTA_EXCEEDED"), quota, wait)
    assert found.quotas == (pc.QuotaViolation("tenant:a", "tokens"),)
    assert found.retry_after == 2.5
    resource = rpc.ResourceInfo(resource_type="model", resource_name="models/x")
    assert error(grpc.StatusCode.NOT_FOUND, info("MODEL_NOT_FOUND"), resource).resource == "models/x"


def test_limits() -> None:
    found = error(grpc.StatusCode.RESOURCE_EXHAUSTED, info("REQUEST_TOO_LARGE", limit="10", demand="12"))
    assert (found.limit, found.demand) == (10, 12)
    garbled = error(grpc.StatusCode.RESOURCE_EXHAUSTED, info("REQUEST_TOO_LARGE", limit="ten", demand="²"))
    assert (garbled.limit, garbled.demand) == (None, None)


def test_grpcs_own_refusal_of_a_long_message() -> None:
    message = "CLIENT: Received message larger than max (5000000 vs. 4194304)"
    found = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [])
    assert isinstance(found, pc.TooLarge)
    assert (found.demand, found.limit) == (5000000, 4194304)


def test_request_id_from_details_or_trailer() -> None:
    assert error(grpc.StatusCode.INTERNAL, info("INTERNAL", request_id="r1")).request_id == "r1"
    found = error_of(grpc.StatusCode.INTERNAL, "a fault", [("x-request-id", "r2")])
    assert found.request_id == "r2"
    assert str(found) == "a fault (request r2)"


def test_details_of_another_domain_are_not_ours() -> None:
    foreign = rpc.ErrorInfo(reason="REQUEST_TOO_LARGE", domain="example.com", metadata={"limit": "1"})
    found = error(grpc.StatusCode.RESOURCE_EXHAUSTED, foreign)
    assert type(found) is pc.Overloaded
    assert (found.reason, found.metadata) == ("", {})


def test_last_value_wins_as_in_protobuf() -> None:
    # reason = "a", then reason = "b"; an unknown field of each wire type between them.
    value = b"\x0a\x01a" + b"\x78\x05" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x0a\x01b" + b"\x12\x0apatchclamp"
    url = b"type.googleapis.com/google.rpc.ErrorInfo"
    anything = b"\x0a" + bytes([len(url)]) + url + b"\x12" + bytes([len(value)]) + value
    assert parse_details(b"\x1a" + bytes([len(anything)]) + anything).reason == "b"


@given(st.binary(max_size=200))
def test_garbage_never_raises(data: bytes) -> None:
    parse_details(data)


@given(cut=st.integers(0, 300), flip=st.integers(0, 300), bits=st.integers(1, 255))
def test_damaged_details_never_raise(cut: int, flip: int, bits: int) -> None:
    whole = bytearray(
        packed(
            info("OVERLOADED", limit="10", request_id="abc"),
            rpc.BadRequest(field_violations=[rpc.BadRequest.FieldViolation(field="f", description="d")]),
            rpc.RetryInfo(retry_delay=duration_pb2.Duration(seconds=-1, nanos=5)),
            rpc.QuotaFailure(violations=[rpc.QuotaFailure.Violation(subject="s", description="d")]),
        )
    )
    whole[flip % len(whole)] ^= bits
    data = bytes(whole[: cut % (len(whole) + 1)])
    assert isinstance(error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", [("grpc-status-details-bin", data)]), pc.Error)


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_agrees_with_protobuf(reason: str, metadata: dict[str, str]) -> None:
    details = parse_details(packed(info(reason), rpc.ErrorInfo(domain="other")))
    assert details.reason == reason
    whole = rpc.ErrorInfo(reason=reason, domain="patchclamp", metadata=metadata)
    assert parse_details(packed(whole)).metadata == metadata


def test_a_failed_run() -> None:
    failure = failure_pb2.RunFailure(
        code=8, reason=error_pb2.ERROR_REASON_REQUEST_TOO_LARGE, message="too big", metadata={"limit": "3"}
    )
    found = error_of_run(failure)
    assert isinstance(found, pc.TooLarge)
    assert (found.reason, found.limit, str(found)) == ("REQUEST_TOO_LARGE", 3, "too big")


@pytest.mark.parametrize(("code", "reason"), [(0, 0), (99, 99), (-1, 4), (13, 0)])
def test_a_failed_run_of_a_newer_server(code: int, reason: int) -> None:
    failure = failure_pb2.RunFailure(code=code, reason=reason)  # type: ignore[arg-type]
    assert isinstance(error_of_run(failure), pc.Error)


@pytest.mark.parametrize("name", [name for name in pc.__all__ if isinstance(getattr(pc, name), type)])
def test_errors_survive_pickling(name: str) -> None:
    kind = getattr(pc, name)
    if not issubclass(kind, pc.Error):
        return
    copy = pickle.loads(pickle.dumps(kind("no", reason="R", metadata={"limit": "1"}, request_id="r")))  # noqa: S301
    assert type(copy) is kind
    assert (str(copy).startswith("no"), copy.reason, copy.metadata, copy.request_id) == (True, "R", {"limit": "1"}, "r")


def test_a_call_that_fails(server: StandIn, client: pc.Client) -> None:
    trailers = (("grpc-status-details-bin", packed(info("SITE_ABSENT", available="embed"))), ("x-request-id", "r7"))
    server.fail = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "no pos_embed here", trailers)]
    with pytest.raises(pc.InvalidArgument, match="no pos_embed here") as caught:
        client.describe()
    assert (caught.value.reason, caught.value.request_id) == ("SITE_ABSENT", "r7")
    assert isinstance(caught.value.__cause__, grpc.RpcError)


async def test_a_call_that_fails_asynchronously(server: StandIn, async_client: pc.AsyncClient) -> None:
    trailers = (("grpc-status-details-bin", packed(info("OVERLOADED"))), ("x-request-id", "r8"))
    server.fail = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", trailers)] * 2
    with pytest.raises(pc.Overloaded, match="busy") as caught:
        await async_client.run("Fact")
    assert (caught.value.reason, caught.value.request_id) == ("OVERLOADED", "r8")
    with pytest.raises(pc.Overloaded, match="busy"):
        await async_client.describe()


def test_cancelled_unasked_is_unavailable(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.CANCELLED, "stopping")] * 2
    with pytest.raises(pc.Unavailable, match="ended the call"):
        client.describe()
    with pytest.raises(pc.Unavailable, match="ended the call"):
        client.run("Fact")


async def test_cancelled_unasked_is_unavailable_asynchronously(server: StandIn, async_client: pc.AsyncClient) -> None:
    server.fail = [Failure(grpc.StatusCode.CANCELLED, "stopping")] * 2
    with pytest.raises(pc.Unavailable, match="ended the call"):
        await async_client.describe()
    with pytest.raises(pc.Unavailable, match="ended the call"):
        await async_client.run("Fact")


def test_a_failing_run_fails_alone(server: StandIn, client: pc.Client) -> None:
    def answer(request: run_pb2.RunRequest) -> list[run_pb2.RunResponse]:
        reason = int(error_pb2.ERROR_REASON_INTERVENTION_NEVER_FIRED)
        return [
            failing_run(1, 9, "nothing selected", reason, {}),
            run_pb2.RunResponse(result=result(0, request.runs[0])),
            summary(),
        ]

    server.on_run = answer
    specs = [pc.RunSpec("Fact"), pc.RunSpec("Fact")]
    first, second = client.run_many(specs, return_exceptions=True)
    assert isinstance(first, pc.Run)
    assert isinstance(second, pc.InterventionNeverFired)
    with pytest.raises(pc.InterventionNeverFired, match="nothing selected") as caught:
        client.run_many(specs)
    assert isinstance(caught.value.results[0], pc.Run)
    assert caught.value.results[1] is caught.value
