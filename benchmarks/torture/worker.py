"""Runs cases of one kind: an index a line on stdin, an outcome a line on stdout.

python -m benchmarks.torture.worker KIND OPTIONS (started by the harness)
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.torture.harness import Options, run_case
from benchmarks.torture.kinds.all import KINDS


def main(name: str, settings: str) -> None:
    # Whatever a case prints goes to the log: stdout is the harness's.
    outcomes = os.fdopen(os.dup(1), "w", buffering=1)
    os.set_inheritable(outcomes.fileno(), False)
    os.dup2(2, 1)
    values = json.loads(settings)
    options = Options(**{**values, "out": Path(values["out"])})
    outcomes.write("ready\n")
    for line in sys.stdin:
        outcomes.write(json.dumps(run_case(KINDS[name], int(line), options)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
