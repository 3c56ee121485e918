"""Small made-up weight files of the backbones by the authors' names, and by the names that others give them."""

import re

import numpy as np

SWIN = dict(width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=2)
VIT = dict(width=8, depth=3, heads=2, size=32)
CVT = dict(widths=(8, 12, 16), depths=(1, 1, 2), heads=(1, 3, 4))


# --- ResNet and TResNet: other names of a state dict ------------------------------------------------------------------


def sequential_names(weights):
    children = {"conv1": "0", "bn1": "1"} | {f"layer{i}": str(i + 3) for i in range(1, 5)}
    return {re.sub(r"^\w+", lambda m: children[m[0]], k): v for k, v in weights.items()}


def transformers_names(weights):
    found = {}
    for name, value in weights.items():
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.", name)
        name = re.sub(r"downsample\.0", "shortcut.convolution", name)
        name = re.sub(r"downsample\.1", "shortcut.normalization", name)
        name = re.sub(r"\.conv(\d)", lambda m: f".layer.{int(m[1]) - 1}.convolution", name)
        name = re.sub(r"\.bn(\d)", lambda m: f".layer.{int(m[1]) - 1}.normalization", name)
        found["resnet." + name] = value
    return found


def timm_names(weights):
    found = {}
    for name, value in weights.items():
        name = re.sub(r"(conv\d)\.0\.([01])\.", r"\1.\2.", name)
        name = re.sub(r"(conv\d|downsample\.\d)\.0\.(?=weight$)", r"\1.conv.", name)
        name = re.sub(r"(conv\d|downsample\.\d)\.1\.", r"\1.bn.", name)
        found[name] = np.abs(value) + np.float32(1e-5) if name.endswith("bn.weight") else value
    return found


# --- Swin -------------------------------------------------------------------------------------------------------------


def swin_state(seed=0):
    """Names and shapes as in the authors' files, for SWIN."""
    rng, state = np.random.default_rng(seed), {}

    def add(name, *shape):
        state[name] = rng.normal(size=shape).astype(np.float32)

    def pair(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    pair("patch_embed.proj", 8, 3, 4, 4)
    pair("patch_embed.norm", 8)
    for i, (depth, heads) in enumerate(zip(SWIN["depths"], SWIN["heads"])):
        d = 8 * 2**i
        for j in range(depth):
            b = f"layers.{i}.blocks.{j}"
            pair(f"{b}.norm1", d)
            add(f"{b}.attn.relative_position_bias_table", 9, heads)
            state[f"{b}.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
            pair(f"{b}.attn.qkv", 3 * d, d)
            pair(f"{b}.attn.proj", d, d)
            pair(f"{b}.norm2", d)
            pair(f"{b}.mlp.fc1", 4 * d, d)
            pair(f"{b}.mlp.fc2", d, 4 * d)
        if i < 3:
            add(f"layers.{i}.downsample.reduction.weight", 2 * d, 4 * d)
            pair(f"layers.{i}.downsample.norm", 4 * d)
    state["layers.1.blocks.1.attn_mask"] = np.zeros((4, 4, 4), np.float32)
    pair("norm", 64)
    pair("head", 5, 64)
    return state


def swin_of_new_timm(state):
    shift = lambda m: f"layers.{int(m[1]) + 1}.downsample"  # noqa: E731
    new = {re.sub(r"layers\.(\d)\.downsample", shift, k).replace("head.", "head.fc."): v for k, v in state.items()}
    return {k: v for k, v in new.items() if not k.endswith(("relative_position_index", "attn_mask"))}


def swin_of_transformers(state):
    new = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(value, 3))
            new |= {name.replace("attn.qkv", f"attention.self.{part}"): v for part, v in parts}
        else:
            new[name] = value
    for old, now in (
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "embeddings.norm"),
        ("layers.", "encoder.layers."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.output.dense."),
        (".attn.relative", ".attention.self.relative"),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ):
        new = {name.replace(old, now): value for name, value in new.items()}
    new["layernorm.weight"], new["layernorm.bias"] = new.pop("norm.weight"), new.pop("norm.bias")
    new = {f"swin.{k}": v for k, v in new.items() if not k.startswith("head.")}
    return new | {"classifier.weight": state["head.weight"], "classifier.bias": state["head.bias"]}


def swin_of_query2label(state):
    new = {f"module.backbone.0.{k}": v for k, v in state.items() if not k.startswith("head.")}
    return new | {"module.backbone.1.pe": np.zeros((1, 64, 2, 2)), "module.fc.W": np.zeros((1, 5, 64))}


# --- ViT --------------------------------------------------------------------------------------------------------------


def vit_state(seed=0):
    """Names and shapes as in timm's files, for VIT."""
    rng, state = np.random.default_rng(seed), {}

    def add(name, *shape):
        state[name] = rng.normal(size=shape).astype(np.float32)

    def pair(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("cls_token", 1, 1, 8)
    add("pos_embed", 1, 5, 8)
    pair("patch_embed.proj", 8, 3, 16, 16)
    for i in range(3):
        for name, shape in (("norm1", (8,)), ("attn.qkv", (24, 8)), ("attn.proj", (8, 8)), ("norm2", (8,))):
            pair(f"blocks.{i}.{name}", *shape)
        pair(f"blocks.{i}.mlp.fc1", 32, 8)
        pair(f"blocks.{i}.mlp.fc2", 8, 32)
    pair("norm", 8)
    pair("head", 5, 8)
    return state


def _vit_of_transformers(state, names):
    new = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(value, 3))
            new |= {name.replace("attn.qkv", f"attn.{part}"): v for part, v in parts}
        elif not name.startswith("head."):
            new[name] = value
    for old, now in names:
        new = {re.sub(old, now, name): value for name, value in new.items()}
    new = {f"vit.{name}": value for name, value in new.items()}
    return new | {f"classifier.{k}": state[f"head.{k}"] for k in ("weight", "bias")}


_VIT_NAMES = (
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)


def vit_of_transformers_4(state):
    """google/vit-large-patch16-224."""
    names = (
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^blocks\.", "encoder.layer."),
    )
    return _vit_of_transformers(state, _VIT_NAMES + names) | {"vit.pooler.dense.weight": np.zeros((8, 8))}


def vit_of_transformers_5(state):
    names = (
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.([qkv])\w+\.", r".attention.\1_proj."),
        (r"^blocks\.", "layers."),
    )
    return _vit_of_transformers(state, _VIT_NAMES + names)


def vit_of_csra(state):
    """CSRA's, from several GPUs."""
    new = {f"module.{k}": v for k, v in state.items() if not k.startswith("head.")}
    return new | {"module.classifier.multi_head.0.head.weight": np.zeros((5, 8, 1, 1))}


# --- CvT --------------------------------------------------------------------------------------------------------------


def cvt_state(seed=0):
    """Names and shapes as in the authors' files, for CVT."""
    rng, state = np.random.default_rng(seed), {}

    def pair(name, *shape):
        state[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        state[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)

    below = 3
    for i, (d, depth) in enumerate(zip(CVT["widths"], CVT["depths"])):
        pair(f"stage{i}.patch_embed.proj", d, below, *((7, 7) if i == 0 else (3, 3)))
        pair(f"stage{i}.patch_embed.norm", d)
        for j in range(depth):
            b = f"stage{i}.blocks.{j}"
            for part in "qkv":
                conv = f"{b}.attn.conv_proj_{part}"
                state[f"{conv}.conv.weight"] = rng.normal(size=(d, 1, 3, 3)).astype(np.float32)
                pair(f"{conv}.bn", d)
                state[f"{conv}.bn.running_mean"] = rng.normal(size=d).astype(np.float32)
                state[f"{conv}.bn.running_var"] = rng.uniform(size=d).astype(np.float32)
                state[f"{conv}.bn.num_batches_tracked"] = np.array(7)
                pair(f"{b}.attn.proj_{part}", d, d)
            for name, shape in (("norm1", (d,)), ("attn.proj", (d, d)), ("norm2", (d,))):
                pair(f"{b}.{name}", *shape)
            pair(f"{b}.mlp.fc1", 4 * d, d)
            pair(f"{b}.mlp.fc2", d, 4 * d)
        below = d
    state["stage2.cls_token"] = rng.normal(size=(1, 1, below)).astype(np.float32)
    pair("norm", below)
    pair("head", 5, below)
    return state


def cvt_of_transformers(state):
    words, new = {"q": "query", "k": "key", "v": "value"}, {}
    for name, value in state.items():
        name = re.sub(r"stage(\d)\.", r"cvt.encoder.stages.\1.", name)
        name = name.replace("patch_embed.proj", "embedding.convolution_embeddings.projection")
        name = name.replace("patch_embed.norm", "embedding.convolution_embeddings.normalization")
        name = name.replace(".blocks.", ".layers.")
        for part, word in words.items():
            inner = f".attention.attention.convolution_projection_{word}.convolution_projection."
            name = name.replace(f".attn.conv_proj_{part}.conv.", f"{inner}convolution.")
            name = name.replace(f".attn.conv_proj_{part}.bn.", f"{inner}normalization.")
            name = name.replace(f".attn.proj_{part}.", f".attention.attention.projection_{word}.")
        name = name.replace(".attn.proj.", ".attention.output.dense.")
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        new[re.sub("^norm", "layernorm", re.sub("^head", "classifier", name))] = value
    return new


def cvt_of_query2label(state):
    new = {f"backbone.0.{k}": v for k, v in state.items() if not k.startswith("head.")}
    return new | {"backbone.1.pe": np.zeros((1, 16, 2, 2)), "fc.W": np.zeros((1, 5, 16))}
