"""ROLE from one positive label per image (Cole et al., CVPR 2021), around the baseline or any other system.

    python -m mljax.main --config=configs/role.py --workdir=runs/role
    python -m mljax.main --config=configs/role.py:coco2014,linear --workdir=runs/linear  # on cached features
    python -m mljax.main --config=configs/role.py:coco2014,linear_init --workdir=runs/tuned  # then end to end
    python -m mljax.sweep --config=configs/role.py:voc2012 --workdir=runs/grid --grid \
        --over optim.lr=1e-2,1e-3,1e-4,1e-5 --over optim.batch_size=8,16  # the code's; then mljax.evaluate --split=val

Another system inside: --config.system.net.name=cmsg. Published test mAP (VOC12, COCO, NUS, CUB): end to end 87.9, 66.3,
43.1, 15.0; from a linear start 88.2, 69.0, 51.0, 16.8; linear on COCO 66.3.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="role", net=dict(name="baseline", pooling="average", dropout=0.0), expected=3.0)
    config.observe = dict(name="single_positive")
    config.optim.lr = 3e-3
    config.vectors = "none"
    return c.choose(config, arg, WORDS)


def paper(name):
    def word(config):
        partial_labels.single_positive(config, name)
        config.system.expected = c.DATA_SETS[name].positives

    return word


def voc_resplit(config):
    c.voc_resplit(config, ("224", "224:flip"))
    config.vectors = "none"
    config.system.expected = 1.5
    config.optim.update(lr=1e-2, epochs=30, batch_size=64)


WORDS: dict = {name: paper(name) for name in partial_labels.SINGLE_POSITIVE} | dict(voc_resplit=voc_resplit)
WORDS |= dict(linear=partial_labels.linear, linear_init=partial_labels.linear_init)
