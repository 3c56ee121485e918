"""`python -m mljax.weights` runs `mljax.commands.weights`, which stands on the top floor since it opens experiments."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mljax.commands.weights", run_name="__main__")
