"""TDRG: a transformer over three scales guides a label graph (Zhao et al., ICCV 2021).

    python -m mljax.main --config=configs/tdrg.py --workdir=runs/tdrg                # embedded data set, minutes
    python -m mljax.main --config=configs/tdrg.py:coco2014 --workdir=runs/coco2014   # ResNet-101, 448, as the paper
    python -m mljax.main --config=configs/tdrg.py:voc2007 --workdir=runs/voc2007

The authors' logs with ResNet-101 at 448: mAP COCO 84.6 (CF1 79.1, OF1 81.2), VOC2007 95.0. Paper, COCO at 576: 86.0.
Their first code attends over the batch: --config.system.attend=batch
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="tdrg", width=64, layers=2, heads=4, ffn=128, attend="image", normalise=True)
    config.backbone.endpoints = ("8", "16")
    config.optim.lr = 2e-3
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def paper(config, size=448):
    """ResNet-101, SGD, the backbone at a tenth of the rate; images are squished to 64 pixels more before the crop."""
    c.resnet101(config, size)
    config.backbone.endpoints = ("16", "32")
    config.input.train = {"crop": "multi_scale", "pre_size": size + 64, "flip": 0.5}
    config.system.update(width=512, layers=3, ffn=2048, normalise=False, initial="stacked")
    config.optim.update(name="sgd", lr=3e-2, epochs=50, batch_size=64, weight_decay=1e-4, clip_norm=10.0)
    config.optim.update(momentum=0.9, groups=(("backbone/.*", {"lr": 0.1}),))
    config.optim.schedule = dict(name="step", boundaries=(40,))
    config.eval.update(every=1, select="best")


def coco576(config):
    c.data_set(config, "coco2014")
    paper(config, 576)


def lighter(config):
    """Both of the last strides are cached."""
    config.backbone.endpoints = ("16", "32")
    config.system.update(width=128, ffn=256, layers=1)
    config.optim.update(lr=1e-3, epochs=7, batch_size=64)


WORDS: dict = c.data_sets(paper, "voc2007", "coco2014") | c.small_sets(lighter) | dict(coco576=coco576)
