"""Swin and CvT beside transformers' with the same random weights: every endpoint, training statistics, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax.backbones import cvt, swin

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


def randomise(model, seed):
    """Random parameters and buffers everywhere, so that no term is zero or one by its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=generator) * 0.2
                value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return {name: value.clone().numpy() for name, value in model.state_dict().items()}


def close(ours, theirs, scale=1e-4):
    """Relative to the largest value of the tensor."""
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert ours.shape == theirs.shape and error < scale, error


def images(*shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return jnp.asarray(x), torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


SWIN = dict(depths=(2, 2, 3, 2), heads=(1, 2, 4, 8), window=4)


def torch_swin(size, window=4):
    config = transformers.SwinConfig(
        image_size=size,
        embed_dim=8,
        depths=list(SWIN["depths"]),
        num_heads=list(SWIN["heads"]),
        window_size=window,
        drop_path_rate=0.0,
        attn_implementation="eager",
    )
    return transformers.SwinModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize(("h", "w"), [(128, 128), (256, 128), (160, 192)], ids=["whole", "wide", "padded"])
def test_swin_endpoints_and_gradients(h, w):
    model = torch_swin(128)
    net = swin.Swin(width=8, **SWIN, endpoints=("4", "8", "16", "32"))
    variables = swin.convert(randomise(model, 0))
    ours_in, theirs_in = images(2, h, w, 3)

    def run(params):
        out = net.apply({"params": params}, ours_in, train=True)
        return jnp.sum(out["32"] ** 2), out

    (_, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(variables["params"])
    theirs = model(theirs_in, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    for i, stride in enumerate(("4", "8", "16")):
        close(out[stride], theirs.reshaped_hidden_states[i + 1].permute(0, 2, 3, 1))
    last = theirs.last_hidden_state.reshape(2, h // 32, w // 32, 64)
    close(out["32"], last)
    last.square().sum().backward()
    expected = swin.convert({name: p.grad.numpy() for name, p in model.named_parameters()})["params"]
    shared = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), grads, expected)
    assert max(jax.tree.leaves(shared)) < 1e-3, shared


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (3, 4)])
def test_swin_tables_interpolate_as_torch(old, new):
    table = np.random.default_rng(0).normal(size=((2 * old - 1) ** 2, 3)).astype(np.float32)
    image = torch.from_numpy(table.T.reshape(1, 3, 2 * old - 1, 2 * old - 1).copy())
    theirs = torch.nn.functional.interpolate(image, size=(2 * new - 1, 2 * new - 1), mode="bicubic")
    ours, _ = swin.adapt({"params": {"bias_table": table}}, swin.Swin(window=new))
    np.testing.assert_allclose(ours["params"]["bias_table"], theirs[0].reshape(3, -1).T, rtol=1e-4, atol=1e-5)


def torch_cvt():
    # transformers reads the drop path of stage i from its layer i: it needs at least i + 1 of them.
    config = transformers.CvtConfig(
        embed_dim=[8, 12, 16], num_heads=[1, 3, 4], depth=[1, 2, 3], drop_path_rate=[0.0] * 3
    )
    return transformers.CvtForImageClassification(config)


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize(("h", "w"), [(64, 64), (80, 48)])
def test_cvt_endpoints_statistics_and_gradients(h, w, train):
    model = torch_cvt().train(train)
    variables = cvt.convert(randomise(model, 0))
    net = cvt.CvT(widths=(8, 12, 16), depths=(1, 2, 3), heads=(1, 3, 4), activation="gelu", endpoints=("4", "8", "16"))
    ours_in, theirs_in = images(3, h, w, 3)

    def run(params):
        out, new = net.apply({**variables, "params": params}, ours_in, train=train, mutable=["batch_stats"])
        return jnp.sum(out["16"] ** 2), (out, new["batch_stats"])

    (_, (out, stats)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(variables["params"])
    theirs = model.cvt(theirs_in, output_hidden_states=True)
    for i, stride in enumerate(("4", "8")):
        close(out[stride], theirs.hidden_states[i].permute(0, 2, 3, 1))
    last = model.layernorm(theirs.last_hidden_state.permute(0, 2, 3, 1))
    close(out["16"], last)
    last.square().sum().backward()
    after = cvt.convert({name: value.numpy() for name, value in model.state_dict().items()})["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stats, after)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    expected = cvt.convert(theirs)["params"]
    for path, grad in jax.tree_util.tree_leaves_with_path(expected):
        ours = grads
        for key in path:
            ours = ours[key.key]
        # Biases that all keys share have gradient zero, up to rounding: the scale is then that of the other leaves.
        assert np.abs(ours - grad).max() < 2e-3 * max(np.abs(grad).max(), 1.0), path
