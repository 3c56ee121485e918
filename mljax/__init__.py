"""mljax: multi-label image classification systems in JAX/Flax.

    import mljax
    mljax.fit(mljax.read_config("configs/cmsg.py"), "runs/cmsg")
    run = mljax.load("runs/cmsg")
    run.predict(["photo.jpg"])

Submodules are imported on first use, so that `import mljax` costs nothing; compiled programs are kept for the next
time, as by the commands.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "read_config": ("mljax.config.flags", "read_config"),
    "fit": ("mljax.train", "fit"),
    "load": ("mljax.predict", "load"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from mljax.cache import setup_jax
        from mljax.errors import UserError

        with suppress(UserError):  # without a cache folder everything is compiled anew
            setup_jax()
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'mljax' has no attribute {name!r}")
