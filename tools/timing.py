"""Runs a command with an empty compile cache and prints its wall time and the slowest tests.

python tools/timing.py [--slowest=30] make test
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter

DURATION = re.compile(r"([\d.]+)s (?:call|setup|teardown)\s+(\S+\.py)(::\S+)")


def run(command: list[str], folder: str) -> tuple[int, float, list[str]]:
    """The exit status, seconds and lines of a command whose temporary files, the tests' cache too, are in `folder`."""
    options = f"{os.environ.get('PYTEST_ADDOPTS', '')} --durations=0 --durations-min=0.5"
    env = {**os.environ, "TMPDIR": folder, "PYTEST_ADDOPTS": options.strip()}
    start, lines = time.perf_counter(), []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not DURATION.match(line):
                print(line, end="", flush=True)
    return process.returncode, time.perf_counter() - start, lines


def tables(lines: list[str], slowest: int) -> list[str]:
    """The slowest tests, and the slowest files with the seconds of all their tests."""
    found = [DURATION.match(line) for line in lines]
    tests: Counter[str] = Counter()  # milliseconds
    files: Counter[str] = Counter()
    for match in filter(None, found):
        tests[match[2] + match[3]] += round(1000 * float(match[1]))
        files[match[2]] += round(1000 * float(match[1]))
    return [
        f"slowest {kind}:\n" + "\n".join(f"{time / 1000:8.1f} s  {name}" for name, time in counter.most_common(slowest))
        for kind, counter in (("tests", tests), ("files", files))
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowest", type=int, default=30, metavar="N", help="how many tests and files to list")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("the command is missing; give one, e.g. make test")
    with tempfile.TemporaryDirectory(prefix="mljax-timing-") as folder:
        status, seconds, lines = run(args.command, folder)
    print(*tables(lines, args.slowest), sep="\n\n")
    print(
        f"\n{' '.join(args.command)}: exit status {status}, {seconds // 60:.0f} min {seconds % 60:02.0f} s of wall time"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
