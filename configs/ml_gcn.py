"""ML-GCN: classifiers from label vectors by graph convolution over label co-occurrence (Chen et al., CVPR 2019).

    python -m mljax.main --config=configs/ml_gcn.py --workdir=runs/ml_gcn              # embedded data set, minutes
    python -m mljax.main --config=configs/ml_gcn.py:voc2007 --workdir=runs/voc2007     # ResNet-101, 448, as the paper

The paper's mAP with ResNet-101 at 448: COCO 83.0, VOC2007 94.0 (its baseline with max pooling: 81.9, 93.0).
Without the graph: --config.system.correlation=none
"""

from mljax import config as c

VIEWS = ("224", "224:flip", "224:tl85", "224:br85", "224:flip:tr85", "224:flip:bl85")  # those of CMSG


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="ml_gcn", width=128, correlation="cooccurrence", threshold=0.4, p=0.2)
    config.optim.lr = 3e-3
    return c.choose(config, arg, WORDS)


def paper(config):
    """ResNet-101 at 448, SGD, the backbone at a tenth of the rate, as the paper and its code train."""
    c.resnet101(config)
    config.system.width = 1024
    config.optim.update(name="sgd", lr=1e-2, epochs=100, batch_size=16, weight_decay=1e-4, clip_norm=10.0)
    config.optim.update(schedule="step", every=40, momentum=0.9, groups=(("backbone/.*", {"lr": 0.1}),))
    config.eval.every = 1


def voc2007(config):
    c.voc(config, "2007")
    paper(config)


def coco2014(config):
    c.coco2014(config)
    paper(config)


def voc_resplit(config):
    """Frozen MobileNetV1 at 224 on the VOC2007 re-split, six cached views."""
    c.voc_resplit(config, VIEWS)
    config.system.width = 1024
    config.optim.update(lr=1e-3, epochs=20, batch_size=64)
    config.eval.every = 20


def csv(config):
    c.own_csv(config)
    config.system.width = 1024
    config.optim.update(lr=1e-3, epochs=20, batch_size=64)


WORDS = dict(voc2007=voc2007, coco2014=coco2014, voc_resplit=voc_resplit, csv=csv)
