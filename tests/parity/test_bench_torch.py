"""The torch networks that the benchmark times are ours: same weights, same logits, as many parameters."""

import jax
import numpy as np
import pytest

from mljax.backbones import resnet, swin
from mljax.bench import command
from mljax.bench import model as bench_model
from mljax.systems import query2label
from mljax.weights.published import Names, convert_head

torch = pytest.importorskip("torch")
rival_module = pytest.importorskip("mljax.bench.torch_reference")
pytestmark = pytest.mark.parity

SMALL = ["--config.backbone.name=resnet18", "--config.devices=1", "--size=64"]
SMALL += ["--batch=2", "--labels=5", "--config.ema=0"]


def made(words, *flags):
    args, own = command.arguments([f"--config=configs/{words}", *SMALL, *flags])
    model = bench_model.Model(command.configured(own, args), labels=args.labels)
    torch.manual_seed(0)
    return model, rival_module.Rival(model, 2)


def arrays(module):
    return {name: x.detach().numpy().copy() for name, x in module.state_dict().items()}


def cmsg_params(state):
    """The names of the torch CMSG, which are its own, in linen's tree."""
    names = Names(state)

    def layer(own, attention, norms):
        norm1, norm2 = (names.norm(f"{own}.{norm}") for norm in norms)
        ffn = {"in": names.linear(f"{own}.linear1"), "out": names.linear(f"{own}.linear2")}
        return {"attention": names.attention(f"{own}.{attention}"), "ffn": ffn, "norm1": norm1, "norm2": norm2}

    params = {"pooling": {"score": names.linear("score"), "transform": names.linear("transform")}}
    params |= {"memory": names.linear("memory"), "classifier": {"kernel": state["fc.W"][0], "bias": state["fc.b"][0]}}
    params |= {f"sga_{i}": layer(f"sga.{i}", "self_attn", ("norm1", "norm2")) for i in range(names.count("sga."))}
    params |= {f"saa_{i}": layer(f"saa.{i}", "multihead_attn", ("norm2", "norm3")) for i in range(names.count("saa."))}
    return params


CMSG = ("--config.system.width=16", "--config.system.ffn=24")


@pytest.mark.parametrize("words, flags", [
    ("baseline.py:voc2007", ()),
    ("baseline.py:voc2007", ("--config.backbone.name=swin_tiny_224", "--size=224")),
    ("cmsg.py:voc2007", CMSG),
    ("cmsg.py:voc2007", (*CMSG, "--config.system.position=True", "--config.system.normalise=True")),
    ("cmsg.py:voc2007", (*CMSG, "--config.system.mode=none", "--config.system.activation=gelu")),
    ("query2label.py:voc2007", ("--config.system.width=16", "--config.system.ffn=24")),
    ("query2label.py:voc2007", ("--config.system.width=16", "--config.system.self_attention=all")),
])  # fmt: skip
def test_same_weights_same_logits(words, flags):
    model, rival = made(words, *flags)
    swins, head = "swin" in str(flags), rival.net.head
    if swins:
        pytest.importorskip("transformers")
    backbone = swin.convert(arrays(rival.net.backbone.net)) if swins else resnet.convert(arrays(rival.net.backbone))
    constants = {}
    if "cmsg" in words:
        own = cmsg_params(arrays(head))
        if head.bias is not None:
            constants = {"constants": {"correlation": head.bias.numpy()}}
    elif "query2label" in words:
        own = convert_head(arrays(head), model.run.system)["params"]
        assert query2label.PUBLISHED is not None
    else:
        own = {"kernel": head.fc.weight.detach().numpy().T.copy(), "bias": head.fc.bias.detach().numpy().copy()}
    variables = {
        "params": {"backbone": backbone["params"], **own},
        **({"batch_stats": {"backbone": backbone["batch_stats"]}} if backbone["batch_stats"] else {}),
        **constants,
    }
    assert rival.size() == sum(x.size for x in jax.tree.leaves(model.variables["params"]))
    rival.net.eval()
    with torch.inference_mode():
        theirs = rival.run(rival.input).numpy()
    ours = np.asarray(jax.jit(model.run.scores)(variables, model.batch(2)))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("flags, word", [
    (("--config.loss.name=focal",), "losses"),
    (("--config.backbone.name=small",), "backbones"),
    (("--config.system.name=csra",), "systems"),
])  # fmt: skip
def test_what_torch_has_not_is_a_sentence(flags, word):
    from mljax.errors import UserError

    with pytest.raises(UserError, match=f"knows the {word}"):
        made("baseline.py:voc2007", *flags)
