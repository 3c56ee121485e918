"""The type checker behind jaxtyping's import hook: arrays have the shapes and dtypes that annotations say."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import typeguard
from jaxtyping import AbstractArray


def names_shapes(annotation: Any) -> bool:
    """Whether a jaxtyping array is part of an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(names_shapes(part) for part in get_args(annotation))


def checked(function: Callable) -> Callable:
    """A function that refuses arrays of another shape or dtype; anything else is left to pyright.

    typeguard's own decorator rewrites a function's source, which functions that jaxtyping makes do not have.
    """
    signature = inspect.signature(function)
    arrays = {name: p.annotation for name, p in signature.parameters.items() if names_shapes(p.annotation)}
    result = signature.return_annotation
    if not arrays and not names_shapes(result):
        return function

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, annotation in arrays.items():
            if name in bound.arguments:
                check(bound.arguments[name], annotation)
        output = function(*args, **kwargs)
        if names_shapes(result):
            check(output, result)
        return output

    return wrapper


def check(value: Any, annotation: Any) -> None:
    """A value against an annotation; where an array of the device is named, one of the host will do, as in JAX."""
    try:
        typeguard.check_type(value, annotation)
    except typeguard.TypeCheckError:
        on_device = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, value)
        typeguard.check_type(on_device, annotation)
