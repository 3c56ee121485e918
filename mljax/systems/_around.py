"""What the systems share that work around another one, their field `net`: building it, and passing on its hooks."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int8

from mljax.build import build
from mljax.errors import UserError
from mljax.types import Batch, Meta

# The backbone is a field of both, one and the same object, so that its variables stay at "backbone" as everywhere.
SHARED = ("backbone", "meta", "dtype", "axis", "steps_per_epoch")


def build_net(system: Any, criterion: Any) -> None:
    """Put the inner system in place of its config section, in the `__post_init__` of the outer one.

    Args:
      system: the outer system. Its `net` is a section, None for the baseline, or a system already, as in a clone.
      criterion: of the inner system, which gets the other `SHARED` fields from the outer one.
    Raises:
      UserError: `net` is not a section, or it does not build.
    """
    if isinstance(system.net, nn.Module):
        return
    section = system.net or {"name": "baseline"}
    if not hasattr(section, "items"):
        raise UserError(
            f"config.system.net is {section!r}; expected the section of a system, such as {{'name': 'baseline'}}."
        )
    given = {name: getattr(system, name) for name in SHARED}
    object.__setattr__(system, "net", build("systems", section, criterion=criterion, **given))


def codes(meta: Meta) -> Int8[np.ndarray, "N l"]:
    """1 for known positives, -1 for known negatives, 0 for what is not known."""
    observed = meta.observed.astype(np.int8)
    return observed * (2 * meta.labels.astype(np.int8) - 1)


def scores(net: Any, batch: Batch) -> Float[Array, "b l"]:
    """The scores of a system whose paper predicts in its own way, or its logits."""
    return net.scores(batch) if hasattr(net, "scores") else net(batch).logits


def refresh(net: Any, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
    """What the inner system refreshes, if anything; it sees and changes its own variables only."""
    if getattr(net, "refresh", None) is None or epoch % getattr(net, "refresh_every", 1):
        return dict(variables)
    inner = {collection: tree["net"] for collection, tree in variables.items() if "net" in tree}
    changed = net.refresh(inner, score, epoch)
    return {**variables, **{name: {**variables.get(name, {}), "net": tree} for name, tree in changed.items()}}
