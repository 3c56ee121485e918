"""Batch normalisation folded into the convolutions before it: the same values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import fold
from mljax.backbones import cvt, mobilenet, resnet, small, tresnet

NETS = {
    "resnet": resnet.ResNet(depths=(1, 1, 1, 1), width=8),
    "basic": resnet.ResNet(depths=(1, 1, 1, 1), width=8, bottleneck=False),
    "resnext": resnet.ResNet(depths=(1, 1, 1, 1), width=32, groups=8, base_width=4),
    "tresnet": tresnet.TResNet(depths=(1, 1, 1, 1), width=8, bottlenecks=(False, False, True, True)),
    "small": small.Small(widths=(4, 8, 8, 8), endpoints=("8",)),
    "mobilenet": mobilenet.MobileNetV1(),
    "cvt": cvt.CvT(widths=(8, 16, 16), depths=(1, 1, 1), heads=(1, 2, 2)),
}


@pytest.mark.parametrize("name", toy.slow_but(NETS, ["resnet", "basic", "tresnet", "small"]))
def test_folded_values(name):
    """Random statistics, gains and biases: equal to 1e-5 of the largest value, and nothing left to normalise."""

    class System(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, batch, *, train):
            return self.backbone(batch["image"], train=train)

    system, rng = System(NETS[name]), np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.normal(size=(2, 64, 64, 3)), jnp.float32)}
    variables = toy.init(system, batch, train=False)

    def drawn(path, x):
        leaf = path[-1].key
        if leaf in ("scale", "bias", "mean", "var"):
            x = jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32) if leaf in ("scale", "var") else 0.3 + x
        return x

    variables = jax.tree_util.tree_map_with_path(drawn, variables)
    folded, count = fold.fold(system, variables, batch)
    assert count == sum(p[-1].key == "mean" for p, _ in jax.tree.leaves_with_path(variables["batch_stats"]))
    assert not jax.tree.leaves(folded["batch_stats"])
    wanted, found = (jax.jit(lambda v: system.apply(v, batch, train=False))(v) for v in (variables, folded))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5 * float(jnp.abs(a).max())
