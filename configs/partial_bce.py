"""Partial BCE: the loss of an image grows where few of its labels are known (Durand, Mehrasa and Mori, CVPR 2019).

    python -m mljax.main --config=configs/partial_bce.py:known=0.1 --workdir=runs/partial
    python -m mljax.main --config=configs/partial_bce.py:coco2014,known=0.3 --workdir=runs/partial_coco

For other systems: --config.loss.name=partial_bce --config.loss.reduction=batch_mean --config.observe.name=known.
Average mAP over 10 .. 90 % known in SST's table: COCO 74.7, VG-200 39.8, VOC07 90.0, trained as HCP-MLR-PL trains.
Which head stood on ResNet-101 is not known: here a linear one; SSGRL's by configs/ssgrl.py:coco2014,known=0.1.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="baseline", pooling="average", dropout=0.0)
    config.observe = dict(name="known", proportion=0.1, mode="hcp")
    config.loss = dict(name="partial_bce", reduction="batch_mean", alpha=-4.45, beta=5.45, gamma=1.0)
    config.optim.lr = 3e-3
    config.vectors = "none"
    return c.choose(config, arg, WORDS)


def paper(config):
    config.vectors = "none"


def voc_resplit(config):
    c.voc_resplit(config, ("224", "224:flip"))
    config.vectors = "none"
    config.optim.update(lr=3e-3, epochs=30, batch_size=64)


def mean(config):
    """The plain mean over known labels of an image: g(r) = 1 / r."""
    config.loss.update(alpha=1.0, beta=0.0, gamma=-1.0)


WORDS: dict = partial_labels.partial_sets(paper)
WORDS |= {"voc_resplit": voc_resplit, "mean": mean, "known=": partial_labels.known}
