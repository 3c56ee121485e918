"""What jaxtyping's import hook checks annotations with: `install_import_hook(packages, "typechecked.typechecked")`.

typeguard 4 has such a decorator, but it rewrites the source of a function, and the functions that jaxtyping makes have
none: it would fail, or check nothing. `typeguard.check_type` works on values. Only annotations with dimensions are
checked; the others are pyright's.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

from jaxtyping import AbstractArray
from typeguard import CollectionCheckStrategy, check_type

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the dimensions of its arguments and of its result checked at every call."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind not in VARIADIC]
    hints = {p.name: p.annotation for p in parameters if _has_dimensions(p.annotation)}
    result_hint = signature.return_annotation

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints:
                _check(value, hints[name])
        result = function(*args, **kwargs)
        if _has_dimensions(result_hint):
            _check(result, result_hint)
        return result

    return checked


def _has_dimensions(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_has_dimensions(part) for part in get_args(hint))


def _check(value: Any, hint: Any) -> None:
    check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
