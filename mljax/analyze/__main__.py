"""`python -m mljax.analyze`."""

import sys

from mljax.analyze.command import main
from mljax.config.command import guarded

if __name__ == "__main__":
    sys.exit(guarded(main))
