"""Proves that the protos suffice: a Node client reads from the demo server what the SDK reads.

Starts `patchclamp-server --demo` on a free port, runs `client.mjs` against it, compares, and stops the server.
"""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import patchclamp as pc

HERE = Path(__file__).resolve().parent
SERVER = Path(sys.executable).with_name("patchclamp-server")
READY = re.compile(r"patchclamp-server ready on (?P<address>\S+) \(model (?P<model>.+)\)")
READY_WITHIN_S = 120
STOPPED_WITHIN_S = 60

PROMPT = "Fact: the capital of the state containing Dallas is"
SITE, LAYER = "SITE_RESID_POST", 1
HOOK = f"blocks.{LAYER}.resid_post"


@contextmanager
def demo_server() -> Iterator[tuple[str, str]]:
    """A demo server of our own: gives its address and model, and ends with SIGTERM, which must end it well."""
    with subprocess.Popen([SERVER, "--demo", "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        # A server that never gets ready is killed, which ends its output and with it the search for the line.
        overdue = threading.Timer(READY_WITHIN_S, process.kill)
        overdue.start()
        try:
            yield ready(process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOPPED_WITHIN_S) == 0, f"the server ended with {process.returncode}"
        finally:
            overdue.cancel()
            process.kill()


def ready(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Address and model from the line that says the server is ready."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := READY.fullmatch(line.strip()):
            return found["address"], found["model"]
    raise AssertionError(f"the server ended with {process.wait()}, or was killed, before it was ready")


def ask_node(address: str) -> dict[str, Any]:
    """What the Node client found."""
    command = ["node", str(HERE / "client.mjs"), address, PROMPT, SITE, str(LAYER)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=120).stdout
    found: dict[str, Any] = json.loads(printed)
    return found


def main() -> None:
    """Compare the two clients."""
    with demo_server() as (address, model):
        node = ask_node(address)
        with pc.connect(address) as client:
            info = client.describe()
            run = client.run(PROMPT, read=[HOOK])

    assert node["model"] == model == info.name
    assert node["dims"]["n_layers"] == info.dims.n_layers
    assert node["tokens"] == [token.id for token in run.tokens]
    assert node["name"] == HOOK
    values = np.asarray(node["values"], dtype=np.float32).reshape(node["shape"])
    # The two runs shared no batch; they differ by rounding at most.
    np.testing.assert_allclose(values, run[HOOK], rtol=1e-4, atol=1e-5)

    refused = node["refused"]
    assert refused["code"] == "INVALID_ARGUMENT", refused
    assert refused["details"]["google.rpc.ErrorInfo"]["domain"] == "patchclamp", refused
    assert refused["details"]["google.rpc.ErrorInfo"]["reason"] == "INVALID_FIELD", refused
    violations = refused["details"]["google.rpc.BadRequest"]["field_violations"]
    assert len(violations) >= 2, refused
    assert all(violation["field"] and violation["description"] for violation in violations), refused
    print(f"Node and Python read the same {HOOK} {node['shape']} from {model}")
    print(f"a bad request was refused with {len(violations)} field violations")


if __name__ == "__main__":
    main()
