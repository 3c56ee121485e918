"""What holds of Swin, ViT and CvT alike: shapes, weight files in every dialect, rematerialisation, bfloat16, errors."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import toy
import weight_states as states
from mljax import build
from mljax.backbones import cvt, swin, vit
from mljax.errors import UserError
from mljax.trees import flatten
from test_backbones import COUNTS

RECORD = {"arch", "hub", "file", "sha256", "licence", "paper", "size", "mean", "std", "note"}
KEYWORDS = {"frozen", "norm", "dtype", "axis", "endpoints", "remat", "drop_path"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
      net, tiny: the linen module and its settings for `state()`, a file of the authors.
      size: of images that it takes.
      strides: of its endpoints; the last is the one that it gives if not asked.
      dialects: other names for the same weights.
      places: our path -> what stands there, from the authors' file.
      other: tensors that no file of the family has.
      cut: (dialect, its tensor that is left out, what the message says).
      widths: part of a name -> width at each stride.
    """

    module: ModuleType
    net: Any
    tiny: Mapping[str, Any]
    size: int
    strides: tuple[str, ...]
    state: Callable
    dialects: tuple[Callable, ...]
    places: Mapping[str, Callable]
    other: tuple[str, ...]
    cut: tuple[Callable, str, str] | None
    widths: Mapping[str, tuple[int, ...]]
    keywords: tuple[str, ...] = ()


FAMILIES = {
    "swin": Family(
        module=swin, net=swin.Swin, tiny=states.SWIN, size=64, strides=("4", "8", "16", "32"), state=states.swin_state,
        dialects=(states.swin_of_new_timm, states.swin_of_transformers, states.swin_of_query2label),
        places={
            "stem/conv/kernel": lambda w: w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "layer2/block2/attention/out/kernel": lambda w: w["layers.1.blocks.1.attn.proj.weight"].T,
            "layer3/merge/norm/scale": lambda w: w["layers.2.downsample.norm.weight"],
            "norm/bias": lambda w: w["norm.bias"],
        },
        other=("absolute_pos_embed", "layer1.0.conv1.weight"),
        cut=(states.swin_of_transformers, "swin.encoder.layers.0.blocks.0.attention.self.key.weight", "key"),
        widths={"": (96, 192, 384, 768), "base": (128, 256, 512, 1024), "large": (192, 384, 768, 1536)},
    ),
    "vit": Family(
        module=vit, net=vit.ViT, tiny=states.VIT, size=32, strides=("16",), state=states.vit_state,
        dialects=(states.vit_of_transformers_4, states.vit_of_transformers_5, states.vit_of_csra),
        places={
            "stem/conv/kernel": lambda w: w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "stem/pos_embed": lambda w: w["pos_embed"],
            "stem/cls_token": lambda w: w["cls_token"],
            "block2/attention/out/kernel": lambda w: w["blocks.1.attn.proj.weight"].T,
            "block3/norm2/scale": lambda w: w["blocks.2.norm2.weight"],
            "norm/bias": lambda w: w["norm.bias"],
        },
        other=(
            "dist_token", "norm_pre.weight", "blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight",
            "layer1.0.conv1.weight",
        ),
        cut=(
            states.vit_of_transformers_4, "vit.encoder.layer.0.attention.attention.key.weight",
            r"ViT weights have .*query.* without .*key",
        ),
        widths={"": (768,), "large": (1024,)},
        keywords=("size",),
    ),
    "cvt": Family(
        module=cvt, net=cvt.CvT, tiny=states.CVT, size=32, strides=("4", "8", "16"), state=states.cvt_state,
        dialects=(states.cvt_of_transformers, states.cvt_of_query2label),
        places={
            "layer3/block2/attention/k_conv/kernel": lambda w: w[
                "stage2.blocks.1.attn.conv_proj_k.conv.weight"
            ].transpose(2, 3, 1, 0),
            "layer1/block1/attention/v_bn/var": lambda w: w["stage0.blocks.0.attn.conv_proj_v.bn.running_var"],
            "layer3/cls_token": lambda w: w["stage2.cls_token"],
        },
        other=("layers.0.blocks.0.norm1.weight", "stage0.pos_embed", "stage0.cls_token"),
        cut=None,
        widths={"": (64, 192, 384), "w24": (192, 768, 1024)},
        keywords=("activation",),
    ),
}  # fmt: skip

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def tiny(family, **settings):
    return family.net(**{**family.tiny, **settings})


def shapes(net, shape):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), train=False))


def initialised(family, batch=4):
    """Random variables, also where the start is zero or one, and images."""
    rng, side = np.random.default_rng(0), family.size
    image = jnp.asarray(rng.normal(size=(batch, side, side, 3)), jnp.float32)

    def draw(path, leaf):
        value = rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(np.abs(value) + 0.5 if path.endswith("var") else value, jnp.float32)

    variables = {path: draw(path, leaf) for path, leaf in flatten(shapes(tiny(family), image.shape)).items()}
    return traverse_util.unflatten_dict(variables, sep="/"), image


def apply(net, variables, image, **options):
    """The maps in training mode."""
    maps, _ = net.apply(variables, image, train=True, mutable=["batch_stats"], **options)
    return maps


# --- nets -------------------------------------------------------------------------------------------------------------


NAMES = [name for family in FAMILIES.values() for name in family.module.NAMES]


@pytest.mark.parametrize("name", toy.slow_but(NAMES, ["swin_tiny_224", "vit_base_16_224", "cvt_13_224"]))
def test_parameter_count_and_shapes(name):
    family = next(family for family in FAMILIES.values() if name in family.module.NAMES)
    size = int(name.split("_")[-1])
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    net = family.module.NAMES[name](endpoints=family.strides)
    out, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x, train=False), image)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == COUNTS[name]
    widths = next((w for part, w in family.widths.items() if part and f"_{part}_" in name), family.widths[""])
    sides = [size // int(stride) for stride in family.strides]
    assert out.keys() == set(family.strides)
    assert [out[s].shape for s in family.strides] == [(1, side, side, width) for side, width in zip(sides, widths)]


@every_family
def test_remat_has_the_same_gradient_under_the_same_key(family):
    variables, image = initialised(family)
    stride = family.strides[:2][-1]  # later stages are built of the same blocks

    def gradient(remat):
        net = tiny(family, remat=remat, drop_path=0.5, endpoints=(stride,))

        def loss(params):
            maps = apply(net, {**variables, "params": params}, image, rngs={"dropout": jax.random.key(1)})
            return jnp.sum(maps[stride] ** 3)

        return jax.jit(jax.grad(loss))(variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradient(True), gradient(False))


@every_family
def test_bfloat16_is_close_and_keeps_float32_variables(family):
    full, half = (tiny(family, dtype=dtype, endpoints=family.strides) for dtype in (jnp.float32, jnp.bfloat16))
    variables, image = initialised(family)
    assert {x.dtype for x in jax.tree.leaves(shapes(half, image.shape))} == {jnp.dtype(jnp.float32)}
    expected, out = (jax.jit(lambda v, net=net: net.apply(v, image, train=False))(variables) for net in (full, half))
    for stride in family.strides:
        assert out[stride].dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(out[stride], np.float32) - expected[stride])
        assert error < 0.03 * np.linalg.norm(expected[stride])


@every_family
def test_frozen_stages_do_not_drop(family):
    """What a feature cache keeps is what training sees; no rng is asked for."""
    net = tiny(family, frozen="all", drop_path=0.9, endpoints=family.strides)
    variables, image = initialised(family)
    both = jax.jit(lambda v: (apply(net, v, image), net.apply(v, image, train=False)))
    jax.tree.map(np.testing.assert_array_equal, *both(variables))


# --- weight files -----------------------------------------------------------------------------------------------------


@every_family
def test_convert_places_every_tensor(family):
    state = family.state()
    made = family.module.convert(state)
    made_shapes = shapes(tiny(family), (1, family.size, family.size, 3))
    assert toy.shapes(made) == {"batch_stats": {}, **toy.shapes(dict(made_shapes))}
    at = flatten(made["params"]) | flatten(made["batch_stats"])
    for path, tensor in family.places.items():
        np.testing.assert_array_equal(at[path], tensor(state), err_msg=path)


@pytest.mark.parametrize(
    ("family", "dialect"), [pytest.param(f, d, id=d.__name__) for f in FAMILIES.values() for d in f.dialects]
)
def test_convert_reads_every_dialect(family, dialect):
    state = family.state()
    expected, actual = flatten(family.module.convert(state)), flatten(family.module.convert(dialect(state)))
    assert expected.keys() == actual.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in FAMILIES for name in FAMILIES[f].other])
def test_convert_refuses_other_files(family, name):
    convert, state = FAMILIES[family].module.convert, FAMILIES[family].state()
    for tensors in ({name: np.zeros((4, 4))}, state | {name: np.zeros((4, 4))}):
        with pytest.raises(UserError, match=re.escape(name)):
            convert(tensors)


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.cut], ids=["swin", "vit"])
def test_convert_refuses_a_cut_file(family):
    dialect, name, message = family.cut
    state = dialect(family.state())
    del state[name]
    with pytest.raises(UserError, match=message):
        family.module.convert(state)


@every_family
def test_adapt_leaves_a_fitting_state_alone(family):
    made = family.module.convert(family.state())
    adapted, notes = family.module.adapt(made, tiny(family))
    assert notes == ()
    jax.tree.map(np.testing.assert_array_equal, adapted, made)


@pytest.mark.parametrize(
    ("family", "params", "message"),
    [
        ("swin", {"bias_table": np.zeros((8, 1))}, "has 8 rows"),
        ("vit", {"stem": {"pos_embed": np.zeros((1, 6, 8))}}, "has 6 rows"),
    ],
)
def test_adapt_refuses_a_table_that_is_not_square(family, params, message):
    with pytest.raises(UserError, match=message):
        FAMILIES[family].module.adapt({"params": params}, tiny(FAMILIES[family]))


# --- errors and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "shape", "message"),
    [
        ("swin", {}, (1, 100, 64, 3), "multiples of 32.*100x64.*96x64"),
        ("swin", {}, (64, 64, 3), "expected"),
        ("swin", {"endpoints": ("64",)}, (1, 64, 64, 3), "64"),
        ("swin", {"frozen": "layer5"}, (1, 64, 64, 3), "layer5"),
        ("swin", {"frozen": "layer1"}, (1, 64, 64, 3), "stem,layer1"),
        ("swin", {"norm": "layer"}, (1, 64, 64, 3), "norm"),
        ("swin", {"drop_path": 1.0}, (1, 64, 64, 3), "drop_path"),
        ("vit", {}, (1, 100, 64, 3), "multiples of 16.*100x64.*96x64"),
        ("vit", {}, (64, 64, 3), "expected"),
        ("vit", {"endpoints": ("32",)}, (1, 64, 64, 3), "32"),
        ("vit", {"frozen": "block4"}, (1, 64, 64, 3), "block4"),
        ("vit", {"frozen": "block1"}, (1, 64, 64, 3), "stem,block1"),
        ("vit", {"norm": "layer"}, (1, 64, 64, 3), "norm"),
        ("vit", {"drop_path": 1.0}, (1, 64, 64, 3), "drop_path"),
        ("vit", {"size": 100}, (1, 64, 64, 3), "vit has the size 100; give a multiple of 16"),
        ("vit", {"size": 0}, (1, 64, 64, 3), "vit has the size 0"),
        ("cvt", {}, (1, 40, 32, 3), "multiples of 16.*40x32"),
        ("cvt", {"endpoints": ("32",)}, (1, 32, 32, 3), "32"),
        ("cvt", {"frozen": "layer4"}, (1, 32, 32, 3), "layer3"),
        ("cvt", {"norm": "none"}, (1, 32, 32, 3), "norm"),
        ("cvt", {"activation": "quick-gelu"}, (1, 32, 32, 3), "did you mean 'quick_gelu'"),
        ("cvt", {"drop_path": -0.1}, (1, 32, 32, 3), "drop_path"),
    ],
)
def test_wrong_settings_and_images(family, settings, shape, message):
    net = tiny(FAMILIES[family], **settings)
    with pytest.raises(UserError, match=message) as error:
        shapes(net, shape)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


@every_family
def test_records_and_keywords(family):
    module = family.module
    for name, record in module.RECORDS.items():
        assert set(record) == RECORD and name.startswith(record["arch"]) and record["arch"] in module.NAMES
        if module is not cvt:  # whose files at 384 are said to be of 22k images at 384
            assert f"_{record['size']}" in record["arch"]
    if module is vit:
        assert {r["arch"] for r in vit.RECORDS.values()} == set(vit.NAMES)
        assert all(vit.NAMES[r["arch"]]().size == r["size"] for r in vit.RECORDS.values())
    for constructor in module.NAMES.values():
        assert {*KEYWORDS, *family.keywords} <= set(build.keywords(constructor))
