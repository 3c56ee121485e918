"""The baseline: backbone, global pooling, linear classifier; average, max or mean-of-both pooling; BCE, ASL or focal.

    python -m mljax.main --config=configs/baseline.py --workdir=runs/baseline
    python -m mljax.main --config=configs/baseline.py:voc2007,max --workdir=runs/gmp

Published mAP with ResNet-101 at 448 (ML-GCN's readme): VOC2007 91.7 average, 93.0 max; COCO 77.3 average, 81.9 max.
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
    config.optim.update(schedule="step", every=20, momentum=0.9, groups=(("backbone/.*", {"lr": 0.1}),))


def voc2007(config):
    c.voc(config, "2007")
    paper(config)


def voc2012(config):
    c.voc(config, "2012")
    paper(config)


def coco2014(config):
    c.coco2014(config)
    paper(config)


def voc_resplit(config):
    c.voc_resplit(config)
    config.optim.update(lr=3e-3, epochs=30, batch_size=64)


def csv(config):
    c.own_csv(config)
    config.optim.update(lr=3e-3, epochs=30, batch_size=64)


def pooling(kind):
    return lambda config: config.system.update(pooling=kind)


def asl(config):
    config.loss = dict(name="asl", gamma_neg=4.0, gamma_pos=0.0, clip=0.05, reduction="batch_mean")


def focal(config):
    config.loss = dict(name="focal", reduction="batch_mean")


WORDS = dict(voc2007=voc2007, voc2012=voc2012, coco2014=coco2014, voc_resplit=voc_resplit, csv=csv, asl=asl)
WORDS |= dict(focal=focal, average=pooling("average"), max=pooling("max"), mean_of_both=pooling("mean_of_both"))
