"""mljax: multi-label image classification systems in JAX/Flax.

    import mljax
    mljax.fit(mljax.read_config("configs/cmsg.py"), "runs/cmsg")
    run = mljax.load("runs/cmsg")
    run.predict(["photo.jpg"])

Submodules (`mljax.metrics`, ..) are imported on first use, so that `import mljax` costs nothing; compiled programs are
kept for the next time, as by the commands.
"""

from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mljax import interrupt

interrupt.install()  # where this is a command: from its first line on

__version__ = "0.1.0"

_FUNCTIONS = {
    "read_config": ("mljax.config.reading", "read_config"),
    "fit": ("mljax.train", "fit"),
    "load": ("mljax.run", "load"),
}
_MODULES = frozenset(info.name for info in iter_modules(__path__))


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mljax.{name}")
    if name in _FUNCTIONS:
        from mljax.cache import setup_jax
        from mljax.errors import UserError

        with suppress(UserError):  # without a cache folder everything is compiled anew
            setup_jax()
        module, attribute = _FUNCTIONS[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'mljax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS, *_MODULES})
