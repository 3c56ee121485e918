"""One positive label per image and the losses for it (Cole et al., CVPR 2021): a linear classifier on pooled features.

    python -m mljax.main --config=configs/single_positive.py:wan --workdir=runs/wan
    python -m mljax.main --config=configs/single_positive.py:coco2014,linear,an_ls --workdir=runs/an_ls
    python -m mljax.sweep --config=configs/single_positive.py:voc2012,an --workdir=runs/grid --grid \
        --over optim.lr=1e-2,1e-3,1e-4,1e-5 --over optim.batch_size=8,16  # the code's; then mljax.evaluate --split=val

Losses: an an_ls wan epr pr; iu (one negative known), iun (all negatives known); full and full_ls see all labels.
Published test mAP, end to end (VOC12, COCO): full 89.1, 75.8; AN 85.1, 64.1; AN-LS 86.7, 66.9; WAN 86.5, 64.8; EPR
85.5, 63.3; from a linear start AN-LS 86.5, 69.2. Label bias (COCO): --config.observe.bias=size | location | semantic.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="baseline", pooling="average", dropout=0.0)
    config.observe = dict(name="single_positive")
    config.loss = dict(name="an", reduction="mean")
    config.optim.lr = 3e-3
    config.vectors = "none"
    config.expected = 3.0  # positives per image, for EPR
    config = c.choose(config, arg, WORDS)
    if config.loss.name == "epr":
        config.loss.expected = config.expected
    del config.expected
    if config.stages and config.loss.name == "an_ls" and "smoke" not in config.experiment:
        batch_size = 16 if config.data.name == "nuswide" else 8  # the authors' choice
        partial_labels.linear_init(config, lr=1e-4, batch_size=batch_size)
    return config


def paper(name):
    def word(config):
        partial_labels.single_positive(config, name)
        config.expected = c.DATA_SETS[name].positives

    return word


def voc_resplit(config):
    c.voc_resplit(config, ("224", "224:flip"))
    config.vectors = "none"
    config.expected = 1.5
    config.optim.update(lr=1e-2, epochs=30, batch_size=64)


def loss(name, negatives=0):
    def word(config):
        config.loss = dict(name=name, reduction="mean")
        config.observe.negatives = negatives

    return word


def full(name):
    def word(config):
        config.loss = dict(name=name, reduction="mean", eps=1e-5)
        config.observe = dict(name="all")

    return word


WORDS: dict = {name: paper(name) for name in partial_labels.SINGLE_POSITIVE} | dict(voc_resplit=voc_resplit)
WORDS |= dict(
    linear=partial_labels.linear, linear_init=partial_labels.linear_init, iu=loss("iu", 1), iun=loss("iu", -1)
)
WORDS |= {name: loss(name) for name in ("an", "an_ls", "wan", "epr", "pr")}
WORDS |= dict(full=full("bce"), full_ls=full("bce_ls"))
