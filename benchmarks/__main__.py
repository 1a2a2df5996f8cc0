"""``make bench``: every measurement, one after the other."""

import argparse
import asyncio
import os
import platform

import torch

from benchmarks import log_appends, rebuild, requests


def main() -> None:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", choices=("log", "requests", "rebuild", []))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores,"
        f" {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    chosen = arguments.only or ("log", "requests", "rebuild")
    if "log" in chosen:
        log_appends.run()
    if "requests" in chosen:
        asyncio.run(requests.run(arguments.threads))
    if "rebuild" in chosen:
        asyncio.run(rebuild.run(arguments.threads))


if __name__ == "__main__":
    main()
