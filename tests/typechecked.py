"""What jaxtyping's import hook checks annotations with: `install_import_hook(packages, "typechecked.typechecked")`.

typeguard 4 has such a decorator, but it rewrites the source of a function, and the functions that jaxtyping makes have
none: it would fail, or check nothing. `typeguard.check_type` works on values.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from typeguard import CollectionCheckStrategy, check_type

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its arguments and its result checked against their annotations at every call."""
    signature = inspect.signature(function)
    hints = {p.name: p.annotation for p in signature.parameters.values() if p.kind not in VARIADIC}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(value, hints.get(name, inspect.Parameter.empty))
        result = function(*args, **kwargs)
        _check(result, signature.return_annotation)
        return result

    return checked


def _check(value: Any, hint: Any) -> None:
    if hint is not inspect.Parameter.empty and not isinstance(hint, str):
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
