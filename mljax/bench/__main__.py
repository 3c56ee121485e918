import sys

from mljax.bench.command import main
from mljax.main import guarded

if __name__ == "__main__":
    sys.exit(guarded(main))
