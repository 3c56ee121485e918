"""ViT beside transformers' with the same random weights: the map at several sizes, gradients, positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax.backbones import vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SHAPE = dict(width=16, depth=3, heads=4, size=64)


def torch_vit():
    config = transformers.ViTConfig(
        image_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize(("h", "w"), [(64, 64), (96, 64), (32, 80)], ids=["its-size", "tall", "wide"])
def test_map_and_gradients(h, w):
    model, net = torch_vit(), vit.ViT(**SHAPE)
    variables = vit.convert({name: value.numpy() for name, value in model.state_dict().items()})
    image = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)

    def run(params):
        out = net.apply({"params": params}, jnp.asarray(image), train=True)["16"]
        return jnp.sum(out**3), out

    (_, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(variables["params"])
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    theirs = model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:].reshape(2, h // 16, w // 16, 16)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)
    theirs.pow(3).sum().backward()
    expected = vit.convert({name: value.grad.numpy() for name, value in model.named_parameters()})["params"]
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for path, grad in jax.tree_util.tree_leaves_with_path(expected):
        ours = grads
        for key in path:
            ours = ours[key.key]
        assert np.abs(ours - grad).max() < 1e-3 * np.abs(grad).max(), path


@pytest.mark.parametrize(("old", "new"), [(14, 28), (14, 7), (14, 24), (3, 4)])
def test_positions_interpolate_as_torch(old, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + old * old, 3)).astype(np.float32)
    grid = torch.from_numpy(table[0, 1:].T.reshape(1, 3, old, old).copy())
    theirs = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    ours = vit.resize_positions(table, new, new)
    np.testing.assert_array_equal(ours[:, 0], table[:, 0])
    np.testing.assert_allclose(ours[0, 1:], theirs[0].reshape(3, -1).T, rtol=1e-4, atol=1e-5)
    traced = jax.jit(lambda x: vit.resize_positions(x, new, new))(table)
    np.testing.assert_allclose(traced, ours, rtol=1e-4, atol=1e-5)
