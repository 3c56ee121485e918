"""SSGRL: label vectors look for their labels, a gated graph passes on what they found (Chen et al., ICCV 2019).

    python -m mljax.main --config=configs/ssgrl.py --workdir=runs/ssgrl                        # embedded, minutes
    python -m mljax.main --config=configs/ssgrl.py:coco2014 --workdir=runs/ssgrl_coco          # ResNet-101, 576
    python -m mljax.main --config=configs/ssgrl.py:coco2014,known=0.1 --workdir=runs/ssgrl_10  # SST's baseline

Reported mAP: COCO 83.8, VOC2007 93.4, VOC2012 93.9, VG-500 36.6 (its KGGR extension: 84.3, 93.6, -, 37.4). With partial
labels, average over 10 .. 90 % known in SST's table: COCO 74.1, VG-200 39.7, VOC2007 89.5.
With known= the network and training are those of HCP-MLR-PL on the papers' data sets.
The reset gate of the released code uses the update gate's weights; `fixed` gives it its own. Without the graph:
--config.system.steps=0. For Visual Genome give --config.vectors a file of its labels' vectors.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="ssgrl", width=128, steps=3, reset_gate="released", graph="labels", pool=1)
    config.optim.lr = 2e-3
    return c.choose(config, arg, WORDS)


def paper(config):
    """576 cropped from 640, no flip, Adam at a constant rate; layer4 and what is new are trained."""
    c.resnet101(config, 576)
    config.backbone.frozen = "stem,layer1,layer2,layer3"
    config.input.train = dict(crop="ssgrl", pre_size=640, flip=0.0)
    config.input.eval = dict(crop="center", pre_size=640)
    config.system.update(width=2048, pool=2)
    config.optim.update(name="adam", lr=1e-5, epochs=200, batch_size=4, weight_decay=0.0)
    config.optim.schedule = dict(name="constant")
    config.eval.update(every=1, definition="env")


def voc2007(config):
    c.data_set(config, "voc2007")
    config.data.difficult = "V2"
    paper(config)


def voc2012(config):
    c.data_set(config, "voc2012")
    config.data.difficult = "V2"
    paper(config)


def coco2014(config):
    c.data_set(config, "coco2014")
    config.data.update(order="id", annotated_only=False)
    paper(config)


def known(config, share):
    """Partial BCE on the masks of HCP-MLR-PL; on the papers' data sets its training and its network too."""
    if config.backbone.name == "resnet101":
        config.system.update(channels=1024, width=1024, hidden=512, reset_gate="fixed")
    elif config.backbone.name == "mobilenet_v1":  # ten positives a label: nothing is reduced or propagated, as in SST
        config.system.update(channels=None, hidden=128, steps=0)
    partial_labels.partial_baseline(config, share)


def voc_resplit(config):
    """Frozen MobileNetV1 at 224 on the VOC2007 re-split, the image and its mirror image cached."""
    c.voc_resplit(config, ("224", "224:flip"))
    config.system.update(channels=256, width=256, pool=2)
    config.optim.update(lr=1e-3, epochs=12, batch_size=64)
    config.eval.every = 12


def csv(config):
    c.own_csv(config)
    config.system.update(channels=256, width=256)
    config.optim.update(lr=1e-3, epochs=12, batch_size=64)


def fixed(config):
    config.system.reset_gate = "fixed"


WORDS: dict = dict(voc2007=voc2007, voc2012=voc2012, coco2014=coco2014, voc_resplit=voc_resplit, csv=csv)
WORDS |= c.data_sets(paper, "vg200", "vg500") | {"known=": known, "fixed": fixed}
