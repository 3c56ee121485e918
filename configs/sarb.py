"""SARB: positives made by blending label features of images and of prototypes (Pu et al., AAAI 2022).

    python -m mljax.main --config=configs/sarb.py:known=0.1 --workdir=runs/sarb                    # embedded, minutes
    python -m mljax.main --config=configs/sarb.py:coco2014,known=0.1 --workdir=runs/sarb_coco_10   # ResNet-101, 448

Reported mAP, averages over 10 .. 90 % known (at 10 %): COCO 77.9 (71.2), VG-200 45.6, VOC2007 90.7 (83.5).
Ablations as words: `instance` and `prototype`, one kind of blending alone; `plain`, neither.
`as_released`: alpha and beta learn through their targets too, and fully known images are blended, as in the code.
For VG-200 give --config.vectors a file of its labels' vectors.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="sarb", width=128, steps=3, pool=1, graph="labels", blends="both", contrast=0.05)
    config.system.update(count=10, start=3, every=3, target_gradient=False, blend_known=False)
    config.observe = dict(name="known", proportion=0.5, mode="hcp")
    config.optim.lr = 2e-3
    config = c.choose(config, arg, WORDS)
    if config.experiment.endswith("smoke"):
        config.system.start = 1  # it has two epochs
    return config


def paper(config):
    config.system.update(width=1024, pool=2, start=5, every=5)


def voc_resplit(config):
    """Frozen MobileNetV1 at 224 on the VOC2007 re-split, the image and its mirror image cached."""
    c.voc_resplit(config, ("224", "224:flip"))
    config.system.update(width=256)
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


WORDS: dict = partial_labels.partial_sets(paper)
WORDS |= dict(voc_resplit=voc_resplit, csv=csv)
WORDS |= {"known=": partial_labels.known, "as_released": option(target_gradient=True, blend_known=True)}
WORDS |= {name: option(blends=name) for name in ("instance", "prototype")} | {"plain": option(blends="none")}
