"""What systems share that work around another system, their field `net`: building it, and passing on what it offers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mljax.build import build
from mljax.errors import UserError
from mljax.types import Batch, Constant, Meta

# The backbone is a field of both, one and the same object, so that its variables stay at "backbone" as everywhere.


def inner(section: Any, *, criterion: Any, **given: Any) -> nn.Module:
    """The system of `config.system.net`, built with the backbone, the facts and the criterion of the outer one."""
    if not hasattr(section, "items"):
        raise UserError(
            f"config.system.net is {section!r}; it is the section of a system, such as {{'name': 'baseline'}}."
        )
    return build("systems", section, criterion=criterion, **given)


def codes(meta: Meta) -> Constant:
    """(N l) int8: 1 for known positives, -1 for known negatives, 0 for what is not known."""
    observed = meta.observed.astype(np.int8)
    return Constant(observed * (2 * meta.labels.astype(np.int8) - 1))


def scores(net: Any, batch: Batch) -> jax.Array:
    """(b l): the scores of a system whose paper predicts in its own way, or its logits."""
    return net.scores(batch) if hasattr(net, "scores") else net(batch).logits


def refresh(net: Any, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
    """What the inner system refreshes, if anything; it sees and changes its own variables only."""
    if getattr(net, "refresh", None) is None or epoch % getattr(net, "refresh_every", 1):
        return dict(variables)
    own = {collection: tree["net"] for collection, tree in variables.items() if "net" in tree}
    changed = net.refresh(own, score, epoch)
    return {**variables, **{name: {**variables.get(name, {}), "net": tree} for name, tree in changed.items()}}
