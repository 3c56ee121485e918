"""GATN: ML-GCN on a graph that a transformer block makes from cosines of label vectors (Yuan et al., TOMM 2023).

    python -m mljax.main --config=configs/gatn.py --workdir=runs/gatn                # embedded data set, minutes
    python -m mljax.main --config=configs/gatn.py:voc2007 --workdir=runs/voc2007     # ResNeXt-101 32x16d, 448

The authors' best checkpoints (ResNeXt-101 32x16d SWSL at 448): mAP COCO 89.3, VOC2007 96.3.
"""

from mljax import config as c

# The authors hold the block that makes the graph back; its row sums could pass through zero otherwise.
SLOW = (("transformer/.*", {"lr": 1e-3}),)


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="gatn", width=128, low=0.4, high=1.0)
    config.optim.update(lr=3e-3, groups=SLOW)
    return c.choose(config, arg, WORDS)


def paper(config):
    """The authors' code: SWSL weights, SGD, three rates; it stops by hand, 40 epochs are ours."""
    c.resnet101(config)
    config.backbone = dict(name="resnext101_32x16d")
    config.weights.name = "resnext101_32x16d_swsl"
    config.input.train = {"crop": "multi_scale", "pre_size": 512, "flip": 0.5}
    config.system.update(width=1024, low=0.2 if config.data.name == "coco" else 0.4)
    config.optim.update(name="sgd", lr=3e-2, epochs=40, batch_size=16, weight_decay=1e-4, clip_norm=10.0, momentum=0.9)
    config.optim.schedule = dict(name="step", boundaries=(20, 30))
    config.optim.groups = (("backbone/.*", {"lr": 0.1}), *SLOW)
    config.eval.every = 1


def lighter(config):
    config.system.width = 1024
    config.optim.update(lr=1e-3, epochs=20, batch_size=64)


WORDS: dict = c.data_sets(paper, "voc2007", "coco2014") | c.small_sets(lighter, c.VIEWS)
