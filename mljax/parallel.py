"""jit or pmap, one step: collectives that vanish when arrays are global.

A loss in this library obeys one rule: the mean over devices of what each device returns is the loss of the whole batch.
Then `pmean` of the gradients is the gradient of that loss, with `all_gather` and `pmean` inside it or not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from mljax.errors import UserError, one_of

AXIS = "data"


def pmean(tree: Any, axis: str | None) -> Any:
    """Mean over devices; the identity when arrays are global (axis None)."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def psum(tree: Any, axis: str | None) -> Any:
    """Sum over devices; the identity when arrays are global (axis None)."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def all_gather(x: Any, axis: str | None) -> Any:
    """(b ..) on every device -> (devices*b ..) of all; the identity when arrays are global (axis None)."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def places(count: int) -> Int[Array, "b"]:
    """Where the `count` examples of this device stand in the global batch; 0, 1, .. when arrays are global."""
    try:
        first = jax.lax.axis_index(AXIS) * count
    except NameError:  # no such axis: not under pmap
        first = 0
    return first + jnp.arange(count)


def axis_of(parallel: str) -> str | None:
    """The axis name that modules and losses get: "data" under pmap, None under jit."""
    one_of("config.parallel", parallel, ("jit", "pmap"))
    return AXIS if parallel == "pmap" else None


def devices_for(count: int | None) -> list[Any]:
    """The first `count` devices, or all of them."""
    devices = jax.devices()
    if count is None:
        return devices
    if not 1 <= count <= len(devices):
        raise UserError(
            f"config.devices asks for {count} devices and this machine has {len(devices)} ({devices[0].platform});"
            " lower it, or leave it None to use all."
        )
    return devices[:count]


@dataclasses.dataclass(frozen=True)
class Shardings:
    """How arrays lie on some devices.

    Attributes:
      whole: on each of them.
      split: along the first axis, a part on each.
    """

    whole: NamedSharding
    split: NamedSharding


def shardings(devices: list[Any]) -> Shardings:
    """Those over one axis of all of the devices."""
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    return Shardings(NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS)))


def compile_step(
    step: Callable[[Any, Any], tuple[Any, Any]], parallel: str, devices: list[Any]
) -> tuple[Callable, Callable, Callable]:
    """Compile `step(state, batch) -> (state, metrics)` for some devices.

    Returns:
      (step, place_state, place): the compiled step, which donates its state, and functions that put a host state and a
      host batch on the devices. The state is never replicated by hand.
    """
    on = shardings(devices)
    if parallel == "pmap" and jax.process_count() > 1:
        raise UserError("config.parallel='pmap' is for the devices of one host; set config.parallel='jit' on several.")
    if parallel == "pmap":
        compiled = jax.pmap(
            step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0, devices=devices
        )

        def place(batch: Any) -> Any:  # the step would wait while it copies host arrays
            parts = jax.tree.map(lambda x: _split(x, len(devices)), batch)
            return jax.device_put(parts, on.split)

        return compiled, lambda state: jax.device_put(state, on.whole), place
    whole = (on.whole, on.whole)
    compiled = jax.jit(step, in_shardings=(on.whole, on.split), out_shardings=whole, donate_argnums=0)
    return compiled, lambda state: _put(state, on.whole), lambda batch: _put(batch, on.split)


def _split(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays to (possibly multi-host) global arrays: each process holds its part of a batch."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if sharding.spec == P():
        return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: x[i]), tree)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def check_batch(batch_size: int, devices: int) -> None:
    """Raise a UserError, before anything is compiled, for a batch that does not divide over the devices."""
    if batch_size % devices:
        raise UserError(
            f"A batch of {batch_size} does not divide over {devices} devices; make config.optim.batch_size a multiple"
            f" of {devices}, or set config.devices."
        )
