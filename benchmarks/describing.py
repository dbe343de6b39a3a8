"""The other caller of the transfer benchmark: calls Describe until told to stop, then prints its latencies."""

from __future__ import annotations

import sys
import threading
import time

import patchclamp as pc


def main() -> None:
    """Argument: the server's address."""
    stopped = threading.Event()

    def wait() -> None:
        sys.stdin.readline()
        stopped.set()

    threading.Thread(target=wait, daemon=True).start()
    found = []
    with pc.connect(sys.argv[1]) as client:
        client.describe()
        print("calling", flush=True)
        while not stopped.is_set():
            began = time.perf_counter()
            client.describe()
            found.append(time.perf_counter() - began)
            # A caller, not a load test: a hundred or so calls a second.
            time.sleep(0.005)
    print("\n".join(map(str, found)))


if __name__ == "__main__":
    main()
