"""SST: pseudo labels from co-occurrence in the image and from likeness across images (Chen et al., AAAI 2022).

    python -m mljax.main --config=configs/sst.py:known=0.1 --workdir=runs/sst                    # embedded, minutes
    python -m mljax.main --config=configs/sst.py:coco2014,known=0.1 --workdir=runs/sst_coco_10   # ResNet-101, 448

The paper's mAP, averages over 10 .. 90 % known (at 10 %): COCO 76.7 (68.1), VG-200 41.8 (38.8), VOC2007 90.4 (81.5).
Ablations as words, with the paper's averages on COCO: `ist` 75.2 | `cst` 75.4 | `ist,without_loss` 74.3 |
`cst,without_loss` 74.5 | `dataset` 69.1 (co-occurrence of the data set) | `activation` 76.5 (ADD-GCN's pooling).
Threshold study: `threshold=0.85`, where theta ends (from 0.95). `as_written`: the text where the code differs.
For VG-200 give --config.vectors a file of its labels' vectors.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="sst", width=128, steps=3, pool=1, ist_weight=10.0, cst_weight=0.05, memory=100)
    config.system.update(pooling="semantic", graph="labels", branches="both", cooccurrence="image", form="code")
    config.system.update(start=3, first=0.95, last=0.75, drop=0.05)
    config.observe = dict(name="known", proportion=0.5, mode="hcp")
    config.optim.lr = 2e-3
    config = c.choose(config, arg, WORDS)
    if config.experiment.endswith("smoke"):
        config.system.start = 1  # it has two epochs
    return config


def paper(config):
    config.system.update(width=1024, pool=2, start=5, drop=0.025)


def voc_resplit(config):
    """Frozen MobileNetV1 at 224 on the VOC2007 re-split, the image and its mirror image cached.

    At 10 % known a label has ten positives and 12 images have two: features stay as they are (`width` of the map) and
    are not propagated (`steps`), the memory holds two epochs of positives, theta is near the likeness of such features.
    """
    c.voc_resplit(config, ("224", "224:flip"))
    config.system.update(width=1024, output=256, hidden=128, steps=0, pool=2)
    config.system.update(memory=20, start=4, first=0.8, last=0.76, drop=0.01)
    config.optim.update(lr=1e-3, epochs=12, batch_size=64)
    config.eval.every = 12


def csv(config):
    """Labels that are partial on disk; `known=` hides more."""
    c.own_csv(config)
    config.observe = dict(name="all")
    config.system.update(width=256)
    config.optim.update(lr=1e-3, epochs=12, batch_size=64)


def option(**settings):
    return lambda config: config.system.update(**settings)


def as_written(config):
    config.system.form = "paper"
    config.loss = dict(name="partial_bce", reduction="batch_mean", alpha=1.0, beta=0.0, gamma=-1.0)


def threshold(config, last):
    config.system.last = float(last)


WORDS: dict = partial_labels.partial_sets(paper)
WORDS |= dict(voc_resplit=voc_resplit, csv=csv)
WORDS |= {
    "known=": partial_labels.known,
    "threshold=": threshold,
    "both": option(branches="both"),
    "ist": option(branches="ist"),
    "cst": option(branches="cst"),
}
WORDS |= {"without_loss": option(ist_weight=0.0, cst_weight=0.0), "dataset": option(cooccurrence="dataset")}
WORDS |= {"activation": option(pooling="activation"), "as_written": as_written}
