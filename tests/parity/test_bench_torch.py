"""The torch networks that the benchmark times are ours: same weights, same logits, as many parameters."""

import jax
import numpy as np
import pytest

from mljax import bench, bench_model
from mljax.backbones import resnet
from mljax.published import convert_head
from mljax.systems import query2label

torch = pytest.importorskip("torch")
bench_torch = pytest.importorskip("mljax.bench_torch")
pytestmark = pytest.mark.parity

SMALL = ["--config.backbone.name=resnet18", "--size=64", "--batch=2", "--labels=5", "--config.ema=0"]


def made(words, *flags):
    args, own = bench.arguments([f"--config=configs/{words}", *SMALL, *flags])
    model = bench_model.Model(bench.configured(own, args), labels=args.labels)
    torch.manual_seed(0)
    return model, bench_torch.Rival(model, 2)


def arrays(module):
    return {name: x.detach().numpy().copy() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("words, flags", [
    ("baseline.py:voc2007", ()),
    ("query2label.py:voc2007", ("--config.system.width=16", "--config.system.ffn=24")),
    ("query2label.py:voc2007", ("--config.system.width=16", "--config.system.self_attention=all")),
])  # fmt: skip
def test_same_weights_same_logits(words, flags):
    model, rival = made(words, *flags)
    backbone, head = resnet.convert(arrays(rival.net.backbone)), rival.net.head
    if "query2label" in words:
        own = convert_head(arrays(head), model.run.system)["params"]
        assert query2label.PUBLISHED is not None
    else:
        own = {"kernel": head.fc.weight.detach().numpy().T.copy(), "bias": head.fc.bias.detach().numpy().copy()}
    variables = {
        "params": {"backbone": backbone["params"], **own},
        "batch_stats": {"backbone": backbone["batch_stats"]},
    }
    assert rival.size() == sum(x.size for x in jax.tree.leaves(model.variables["params"]))
    rival.net.eval()
    with torch.inference_mode():
        theirs = rival.net(rival._input()).numpy()
    ours = np.asarray(jax.jit(model.run.scores)(variables, model.batch(2)))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("flags, word", [
    (("--config.loss.name=focal",), "losses"),
    (("--config.backbone.name=small",), "backbones"),
])  # fmt: skip
def test_what_torch_has_not_is_a_sentence(flags, word):
    from mljax.errors import UserError

    with pytest.raises(UserError, match=f"knows the {word}"):
        made("baseline.py:voc2007", *flags)
