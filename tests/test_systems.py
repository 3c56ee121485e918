"""What every system must do, whatever its paper: finite losses, gradients where they belong, and learning."""

import re

import jax
import numpy as np
import pytest

import toy
from mljax import build, experiment

# Leaves whose gradient is zero by construction.
NO_GRADIENT = {
    "": (r"key'\]\['bias'",),  # a constant added to every score of a query leaves the softmax as it is
    "add_gcn": (r"context'\]\['bias'",),  # BatchNorm comes right after it
    # constants added to all scores of a softmax over positions
    "ssgrl": (r"(joint|score)'\]\['bias'",),
    "sst": (r"(joint|score)'\]\['bias'",),
    "sarb": (r"(joint|score)'\]\['bias'", r"\['beta'\]"),  # no prototypes before the first refresh
}

# The share of the first loss that is reached, where it is not 0.35.
SHARES = {
    "sarb": 0.5,  # blended entries have targets of 1/2, whose entropy stays, in losses that the first step lacks
}


# The learning rate, where it is not 2e-3.
RATES = {"role": 2e-2}  # estimates of what nobody told must leave the middle first


def test_every_system_has_a_config_and_every_config_a_system():
    assert {toy.config(name).system.name for name in toy.CONFIGS} == set(build.names("systems"))


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_gradient_at_every_trainable_leaf(name):
    found = toy.without_dropout(toy.config(name))
    run, source = toy.assembled(found)
    variables = experiment.init_variables(run, 0)
    batch = run.prepare(toy.batches(found, source, run, 1)[0])
    value, grads = toy.loss_and_gradients(run.system, variables, batch, step=10_000)
    assert np.isfinite(value)
    exempt = "|".join(NO_GRADIENT[""] + NO_GRADIENT.get(name, ()))
    for path, grad in toy.flat(grads).items():
        assert np.isfinite(grad).all(), path
        if not re.search(exempt, path):
            assert np.abs(grad).max() > 0, f"{path} gets no gradient"


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_fits_eight_images(name):
    rate = {"optim__lr": RATES.get(name, 2e-3), "optim__schedule": {"name": "constant"}}
    found = toy.without_dropout(toy.config(name, optim__batch_size=8, **rate))
    found.data.train_images = 8
    found.input.train = {"crop": "squish", "flip": 0.0}
    _, losses = toy.steps(found, 1, count=60)
    assert losses[-1] < SHARES.get(name, 0.35) * losses[0]


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_evaluation_is_per_image_and_shapes_hold(name):
    """Logits of an image do not depend on what else is in the batch, and outputs have the stated shapes."""
    found = toy.config(name)
    run, source = toy.assembled(found)
    variables = experiment.init_variables(run, 0)
    batch = toy.batches(found, source, run, 1)[0]
    out = run.system.apply(variables, run.prepare(batch), train=False)
    b, l = batch["labels"].shape
    assert out.logits.shape == (b, l)
    if out.label_features is not None:
        assert out.label_features.shape[:2] == (b, l)
    if out.attention is not None:
        assert out.attention.shape[0] == b and out.attention.shape[2] == l
        np.testing.assert_allclose(out.attention.sum((-2, -1)), 1, rtol=1e-4)
    alone = run.system.apply(variables, run.prepare(jax.tree.map(lambda x: x[:1], batch)), train=False)
    np.testing.assert_allclose(alone.logits[0], out.logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", toy.CONFIGS)
@pytest.mark.parametrize("case", ["nothing", "everything", "unknown"])
def test_degenerate_labels_give_finite_losses_and_gradients(name, case):
    found = toy.config(name)
    run, source = toy.assembled(found)
    variables = experiment.init_variables(run, 0)
    batch = run.prepare(toy.batches(found, source, run, 1)[0])
    batch["labels"] = np.full_like(batch["labels"], case == "everything")
    batch["observed"] = np.full_like(batch["observed"], case != "unknown")
    value, grads = toy.loss_and_gradients(run.system, variables, batch, step=3)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
