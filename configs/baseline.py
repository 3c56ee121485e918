"""The baseline: backbone, global pooling, linear classifier; average, max or mean-of-both pooling; BCE, ASL or focal.

    python -m mljax.main --config=configs/baseline.py --workdir=runs/baseline
    python -m mljax.main --config=configs/baseline.py:voc2007,max --workdir=runs/gmp

Published mAP with ResNet-101 at 448 (ML-GCN's readme), average and max pooling: COCO 77.3 and 81.9, VOC2007 91.7 and
93.0, NUS-WIDE 56.9 and 59.7 (its list is not known; ours is that of ASL's authors).
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="baseline", pooling="average", dropout=0.0)
    config.optim.lr = 3e-3
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def paper(config):
    c.resnet101(config)
    config.optim.update(name="sgd", lr=1e-2, epochs=40, batch_size=16, weight_decay=1e-4)
    config.eval.every = 1
    config.optim.update(momentum=0.9, groups=(("backbone/.*", {"lr": 0.1}),))
    config.optim.schedule = dict(name="step", every=20)


def voc_resplit(config):
    c.voc_resplit(config)
    config.optim.update(lr=1e-2, epochs=30, batch_size=64)


def csv(config):
    c.own_csv(config)
    config.optim.update(lr=1e-2, epochs=30, batch_size=64)


def pooling(kind):
    return lambda config: config.system.update(pooling=kind)


def asl(config):
    config.loss = dict(name="asl", gamma_neg=4.0, gamma_pos=0.0, clip=0.05, reduction="batch_mean")


def focal(config):
    config.loss = dict(name="focal", reduction="batch_mean")


WORDS: dict = c.data_sets(paper, "voc2007", "voc2012", "coco2014", "nuswide")
WORDS |= dict(voc_resplit=voc_resplit, csv=csv, asl=asl, focal=focal)
WORDS |= {kind: pooling(kind) for kind in ("average", "max", "mean_of_both")}
