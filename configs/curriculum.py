"""Curriculum labelling: unknown labels are filled in by what was learnt (Durand, Mehrasa and Mori, CVPR 2019).

    python -m mljax.main --config=configs/curriculum.py:known=0.1 --workdir=runs/curriculum
    python -m mljax.main --config=configs/curriculum.py:coco2014,known=0.3,positives --workdir=runs/curriculum_coco

Strategies: threshold positives proportion class_proportion uncertainty; around another system with
--config.system.net.name=cmsg, with another loss with --config.loss.name=bce.
Average mAP over 10 .. 90 % known in SST's table: COCO 60.7, VG-200 28.4, VOC07 84.1.
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    net = dict(name="baseline", pooling="average", dropout=0.0)
    config.system = dict(name="curriculum", net=net, strategy="threshold", threshold=2.0, every=1, start=2, views=())
    config.system.update(proportion=0.5)
    config.observe = dict(name="known", proportion=0.1, mode="hcp")
    config.loss = dict(name="partial_bce", reduction="batch_mean", alpha=-4.45, beta=5.45, gamma=1.0)
    config.optim.lr = 3e-3
    config.vectors = "none"
    config = c.choose(config, arg, WORDS)
    if config.experiment.endswith("smoke"):
        config.system.start = 1  # it has two epochs
    return config


def paper(config):
    config.vectors = "none"
    config.system.start = 5


def voc_resplit(config):
    c.voc_resplit(config, ("224", "224:flip"))
    config.vectors = "none"
    config.system.start, config.system.views = 10, ("224", "224:flip")
    config.optim.update(lr=3e-3, epochs=30, batch_size=64)


def strategy(name):
    def word(config):
        config.system.strategy = name
        if name == "uncertainty":
            config.system.threshold = 0.05  # of a standard deviation
            size = config.input.size
            config.system.views = (f"{size}", f"{size}:flip")

    return word


WORDS: dict = partial_labels.partial_sets(paper)
WORDS |= {"voc_resplit": voc_resplit, "known=": partial_labels.known}
WORDS |= {s: strategy(s) for s in ("threshold", "positives", "proportion", "class_proportion", "uncertainty")}
