"""ML-GCN: classifiers from label vectors by graph convolution over label co-occurrence (Chen et al., CVPR 2019).

    python -m mljax.main --config=configs/ml_gcn.py --workdir=runs/ml_gcn              # embedded data set, minutes
    python -m mljax.main --config=configs/ml_gcn.py:voc2007 --workdir=runs/voc2007     # ResNet-101, 448, as the paper
    python -m mljax.main --config=configs/ml_gcn.py:coco2014,known=0.1 --workdir=runs/partial  # a row of SST's table

The authors' mAP with ResNet-101 at 448: COCO 83.0, VOC2007 94.0, NUS-WIDE 62.5 (its list is not known; ours is ASL's);
COCO at 576: 84.3. Their baseline: configs/baseline.py. Without the graph: --config.system.correlation=none
"""

from mljax import config as c
from mljax.config import partial_labels


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="ml_gcn", width=128, correlation="cooccurrence", threshold=0.4, p=0.2)
    config.optim.lr = 3e-3
    return c.choose(config, arg, WORDS)


def paper(config, size=448):
    """ResNet-101 at 448, SGD, the backbone at a tenth of the rate, as the paper and its code train."""
    c.resnet101(config, size)
    config.system.width = 1024
    config.optim.update(name="sgd", lr=1e-2, epochs=100, batch_size=16, weight_decay=1e-4, clip_norm=10.0)
    config.optim.update(momentum=0.9, groups=(("backbone/.*", {"lr": 0.1}),))
    config.optim.schedule = dict(name="step", every=40)
    config.eval.every = 1


def coco576(config):
    c.data_set(config, "coco2014")
    paper(config, 576)


def lighter(config):
    config.system.width = 1024
    config.optim.update(lr=1e-3, epochs=20, batch_size=64)


WORDS: dict = c.data_sets(paper, "voc2007", "coco2014", "nuswide", "vg200") | c.small_sets(lighter, c.VIEWS)
WORDS |= {"coco576": coco576, "known=": partial_labels.partial_baseline}
