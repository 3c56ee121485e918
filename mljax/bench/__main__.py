"""`python -m mljax.bench`."""

import sys

from mljax.bench.command import main
from mljax.config.command import guarded

if __name__ == "__main__":
    sys.exit(guarded(main))
