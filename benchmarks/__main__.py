"""``make bench``: everything in one table of ratios, ours against theirs in the same run."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

from benchmarks import (
    analysis,
    audit,
    branches,
    constraints,
    disconnects,
    forks,
    log_appends,
    prompts,
    requests,
    scale,
    stalls,
    throughput,
)
from benchmarks.bench import Bench
from benchmarks.machine import describe
from benchmarks.measured import Measured
from benchmarks.table import as_json, cells, show
from benchmarks.workload import Sizes

# In this order: forks count what a server's cache holds before it is full.
PARTS: Mapping[str, Callable[[Bench], Iterator[Measured]]] = {
    "forks": forks.rows,
    "branches": branches.rows,
    "throughput": throughput.rows,
    "constraints": constraints.rows,
    "prompts": prompts.rows,
    "analysis": analysis.rows,
    "audit": audit.rows,
    "stalls": stalls.rows,
    "disconnects": disconnects.rows,
    "log": log_appends.rows,
    "scale": scale.rows,
    "requests": requests.rows,
}


def measure(bench: Bench, names: Container[str]) -> dict[str, list[Measured]]:
    """Run the parts that are named; each row is reported as it comes."""
    parts: dict[str, list[Measured]] = {name: [] for name in PARTS if name in names}
    for name, rows in parts.items():
        for row in PARTS[name](bench):
            rows.append(row)
            print(f"{name}: {' | '.join(cells(row))}", file=sys.stderr, flush=True)
    return parts


def main() -> None:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each side")
    parser.add_argument("--rounds", type=int, default=3, help="how often each pair is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - PARTS.keys()
    if unknown:
        parser.error(f"no measurement is called {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers and files are let go
    with Bench(Sizes(), threads=arguments.threads, rounds=arguments.rounds, rest_s=0.3) as bench:
        parts = measure(bench, arguments.names or PARTS)
        about = describe(bench)
    show(parts, about)
    if arguments.json:
        arguments.json.write_bytes(as_json(parts, about))


if __name__ == "__main__":
    main()
