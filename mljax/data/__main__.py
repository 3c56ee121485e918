"""`python -m mljax.data` runs `mljax.commands.data`, which stands on the top floor since it opens experiments."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mljax.commands.data", run_name="__main__")
