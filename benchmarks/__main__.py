"""`python -m benchmarks [NAME ...]`: runs the benchmarks and prints their table."""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch

from benchmarks import decoding, latency, reading, transfer
from benchmarks.measure import table

BENCHMARKS = {
    "reading": (reading.run, 7),
    "decoding": (decoding.run, 5),
    "latency": (latency.run, 25),
    "transfer": (transfer.run, 15),
}


def main() -> None:
    """Runs what was asked for, everything by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--repeats", type=int, help="repeats of each measurement")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    # Child processes (servers) inherit it: one thread on every side. `make bench` also lets torch ask for huge pages,
    # as the server does, on every side.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows = []
    for name in arguments.names or BENCHMARKS:
        run, repeats = BENCHMARKS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += run(arguments.repeats or repeats)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
