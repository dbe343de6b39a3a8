"""The command itself: a real process, a real model, real gRPC."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from families import build, family_named
from patchclamp.v1 import logits_pb2, model_pb2, model_pb2_grpc, run_pb2, run_pb2_grpc
from service.build import ids, read

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"patchclamp-server ready on (127\.0\.0\.1:\d+) \(model tiny\)\n")
PROMPT = (5, 17, 3, 40, 11)

GPT2 = family_named("gpt2")

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build(GPT2).save_pretrained(folder)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PATCHCLAMP_")}
        environment["PYTHONPATH"] = f"{ROOT / 'client'}:{ROOT / 'server'}"
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "patchclamp_server", *arguments],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ready_address(process: subprocess.Popen[str]) -> str:
    """Where a server listens, from its one line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = READY.fullmatch(line)
    assert found, line
    return found[1]


def ended(process: subprocess.Popen[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, what is left on stdout, and stderr."""
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, (folder / "stderr").read_text(encoding="utf-8")


def test_a_model_is_served_until_sigterm(start: Start, model_folder: Path, tmp_path: Path) -> None:
    server = start("--model", str(model_folder), "--port", "0", "--offline")
    address = ready_address(server)
    with grpc.insecure_channel(address) as channel:
        told = model_pb2_grpc.ModelServiceStub(channel).Describe(model_pb2.DescribeRequest())
        assert (told.model.name, told.model.architecture) == ("tiny", "GPT2LMHeadModel")
        spec = run_pb2.RunSpec(prompt=ids(*PROMPT), logits=logits_pb2.LogitsRequest(values=True))
        responses = list(run_pb2_grpc.RunServiceStub(channel).Run(run_pb2.RunRequest(runs=[spec])))
    with torch.no_grad():
        expected = build(GPT2)(torch.tensor([PROMPT])).logits[0, -1]
    served = np.frombuffer(responses[0].result.logits.values.inline, np.float32)
    np.testing.assert_allclose(served, expected.numpy(), atol=1e-5)
    server.send_signal(signal.SIGTERM)
    code, out, err = ended(server, tmp_path)
    assert (code, out) == (0, "")
    assert "loading: loading weights" in err
    assert re.search(r"[0-9a-f]{32} patchclamp.v1.RunService/Run OK", err)
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_run_in_flight_finish(
    start: Start, model_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    server = start("--model", str(model_folder), "--port", "0", "--metrics-port", "off", "--grace", "100")
    spec = run_pb2.RunSpec(prompt=ids(*[7] * 64), reads=[read("RESID_POST")])
    request = run_pb2.RunRequest(runs=[spec] * 48, numerics="NUMERICS_SOLO")
    with grpc.insecure_channel(ready_address(server)) as channel:
        call = run_pb2_grpc.RunServiceStub(channel).Run(request, timeout=60)
        responses = [next(call)]
        server.send_signal(number)
        responses += call
    assert [response.WhichOneof("event") for response in responses] == ["result"] * 48
    assert responses[-1].HasField("summary")
    code, out, err = ended(server, tmp_path)
    assert (code, out) == (0, "")
    assert "ERROR" not in err


def test_health_answers_while_the_model_loads(start: Start, model_folder: Path, tmp_path: Path) -> None:
    server = start("--model", str(model_folder), "--host", f"unix:{tmp_path}/socket", "--metrics-port", "off")
    with grpc.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        codes = set()
        until = time.monotonic() + 60
        while grpc.StatusCode.OK not in codes and time.monotonic() < until:
            codes.add(_code(stub))
            time.sleep(0.01)
    assert codes == {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK}
    server.send_signal(signal.SIGTERM)
    code, out, _ = ended(server, tmp_path)
    assert (code, out) == (0, f"patchclamp-server ready on unix:{tmp_path}/socket (model tiny)\n")


def _code(stub: Any) -> grpc.StatusCode:
    try:
        stub.Describe(model_pb2.DescribeRequest())
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_metrics_are_served_beside(start: Start, model_folder: Path, tmp_path: Path) -> None:
    server = start("--model", str(model_folder), "--port", "0")
    ready_address(server)
    found = re.search(r"metrics on (http://127\.0\.0\.1:\d+/metrics)", (tmp_path / "stderr").read_text("utf-8"))
    assert found
    with urllib.request.urlopen(found[1]) as answer:  # noqa: S310
        assert b"patchclamp_model_info{" in answer.read()


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_1(start: Start, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    server = start("--model", str(tmp_path / "empty"), "--port", "0", "--log-level", "error")
    code, out, err = ended(server, tmp_path)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"patchclamp-server: cannot load the model .*\n", err)


def test_wrong_settings_are_one_line_and_exit_2(start: Start, tmp_path: Path) -> None:
    code, out, err = ended(start("--demo", "--port", "x"), tmp_path)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"patchclamp-server: --port: .*\n", err)
