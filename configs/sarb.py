"""SARB: positives made by blending label features of images and of prototypes (Pu et al., AAAI 2022).

    python -m mljax.main --config=configs/sarb.py:known=0.1 --workdir=runs/sarb                    # embedded, minutes
    python -m mljax.main --config=configs/sarb.py:coco2014,known=0.1 --workdir=runs/sarb_coco_10   # ResNet-101, 448

Reported mAP, averages over 10 .. 90 % known (at 10 %): COCO 77.9 (71.2), VG-200 45.6, VOC2007 90.7 (83.5).
Ablations as words: `instance` and `prototype`, one kind of blending alone; `plain`, neither.
`as_released`: alpha and beta learn through their targets too, and fully known images are blended, as in the code.
For VG-200 give --config.vectors a file of its labels' vectors.
"""

from mljax import config as c


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
    """512 cropped to 448, Adam with L2, twenty epochs; layer4 and what is new are trained."""
    c.resnet101(config)
    config.backbone.frozen = "stem,layer1,layer2,layer3"
    config.input.train = dict(crop="ssgrl", pre_size=512, flip=0.5, resize="bicubic")
    config.input.eval = dict(crop="squish", resize="bicubic")
    config.system.update(width=1024, pool=2, start=5, every=5)
    config.optim.update(name="adam", lr=1e-5, epochs=20, batch_size=32, weight_decay=5e-4, schedule="step", every=10)
    config.eval.update(every=1, definition="env")


def voc2007(config):
    c.partial(config, "voc2007")
    paper(config)


def coco2014(config):
    c.partial(config, "coco2014")
    paper(config)


def vg200(config):
    config.data = dict(name="visual_genome", root=None, size=200)
    config.vectors = "glove"
    paper(config)


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


WORDS: dict = dict(voc2007=voc2007, coco2014=coco2014, vg200=vg200, voc_resplit=voc_resplit, csv=csv)
WORDS |= {"known=": c.known, "as_released": option(target_gradient=True, blend_known=True)}
WORDS |= {name: option(blends=name) for name in ("instance", "prototype")} | {"plain": option(blends="none")}
