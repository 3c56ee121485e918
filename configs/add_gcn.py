"""ADD-GCN: label features by activation maps, a static and a dynamic label graph (Ye et al., ECCV 2020).

    python -m mljax.main --config=configs/add_gcn.py --workdir=runs/add_gcn              # embedded data set, minutes
    python -m mljax.main --config=configs/add_gcn.py:coco2014 --workdir=runs/coco2014    # ResNet-101, 448, as the paper

The paper's mAP with ResNet-101: COCO 84.2 (448), 85.2 (576, the word coco576); VOC2007 96.0, from a run on COCO.
Ablations: --config.system.graphs=none | static | dynamic, --config.system.pooling=average
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="add_gcn", width=128, pooling="max", graphs="both", normalise=True)
    config.optim.lr = 3e-3
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def paper(config, size=448):
    """ResNet-101, SGD, the backbone at a tenth of the rate; images are squished to 64 pixels more than the crop."""
    c.resnet101(config, size)
    config.input.train = {"crop": "multi_scale", "pre_size": size + 64, "flip": 0.5}
    config.system.update(width=1024, normalise=False)
    config.optim.update(name="sgd", lr=5e-2, epochs=50, batch_size=16, weight_decay=1e-4, clip_norm=10.0)
    config.optim.update(momentum=0.9, groups=(("backbone/.*", {"lr": 0.1}),))
    config.optim.schedule = dict(name="step", boundaries=(30, 40))
    config.eval.every = 1


def coco576(config):
    c.data_set(config, "coco2014")
    paper(config, 576)


def lighter(config):
    config.system.width = 512
    config.optim.update(lr=2e-3, epochs=12, batch_size=64)


WORDS: dict = c.data_sets(paper, "voc2007", "coco2014") | c.small_sets(lighter, c.VIEWS) | dict(coco576=coco576)
