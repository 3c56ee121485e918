"""CSRA: class-specific residual attention (Zhu, Wu; ICCV 2021).

    python -m mljax.main --config=configs/csra.py --workdir=runs/csra                # embedded data set, minutes
    python -m mljax.main --config=configs/csra.py:voc2007 --workdir=runs/voc2007     # ResNet-101, 448, as the paper
    python -m mljax.main --config=configs/csra.py:coco2014,heads=6 --workdir=runs/coco --config.weights.name=cutmix.pth

The paper's mAP with ResNet-101: VOC2007 94.7 (1 head), 95.2 with weights from CutMix; COCO 83.3 (4 heads), 85.6 with
weights from CutMix (6 heads). Its ViT rows are not here. Options: --config.system.lam, words heads=1 | 2 | 4 | 6 | 8
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="csra", heads=1, lam=0.1)
    config.optim.lr = 1e-2
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def paper(config, every):
    """SGD, the head at ten times the rate of the backbone, which falls every 4 (VOC) or 5 (COCO) of 30 epochs.

    Not as the authors: no warm-up of 2 epochs, and images are normalised as the weights ask for, not scaled to [0, 1].
    """
    c.resnet101(config)
    config.input.train = {"crop": "random_resized", "scale": (0.7, 1.0), "flip": 0.5}
    config.optim.update(name="sgd", lr=1e-1, epochs=30, batch_size=16, weight_decay=1e-4, momentum=0.9)
    config.optim.update(schedule="step", every=every, groups=(("backbone/.*", {"lr": 0.1}),))
    config.eval.every = 1


def voc2007(config):
    c.voc(config, "2007")
    config.data.difficult = "V4"
    config.eval.scored_in = "all"  # difficult entries are left out of P, R, F1 too
    paper(config, 4)


def coco2014(config):
    c.coco2014(config)
    paper(config, 5)
    config.system.update(heads=4, lam=0.5)


def voc_resplit(config):
    """Frozen MobileNetV1 at 224 on the VOC2007 re-split, the image and its mirror image cached."""
    c.voc_resplit(config, ("224", "224:flip"))
    config.system.update(heads=4, lam=0.5)
    config.optim.update(lr=1e-2, epochs=20, batch_size=64)
    config.eval.every = 20


def csv(config):
    c.own_csv(config)
    config.system.update(heads=4, lam=0.5)
    config.optim.update(lr=1e-2, epochs=20, batch_size=64)


def heads(config, count):
    config.system.heads = int(count)


WORDS = {"voc2007": voc2007, "coco2014": coco2014, "voc_resplit": voc_resplit, "csv": csv, "heads=": heads}
