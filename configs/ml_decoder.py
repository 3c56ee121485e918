r"""ML-Decoder: groups of labels as fixed queries of one cross-attention layer (Ridnik et al., WACV 2023).

    python -m mljax.main --config=configs/ml_decoder.py --workdir=runs/mld                 # embedded data set, minutes
    python -m mljax.main --config=configs/ml_decoder.py:coco2014 --workdir=runs/coco       # TResNet-L, 448, released
    python -m mljax.main --config=configs/ml_decoder.py:openimages --config.data.file=labels.csv \
      --config.system.groups=200 --workdir=runs/oi
Labels that training does not have, by their vectors: queries from label vectors, one classifier for all labels.
    python -m mljax.main --config=configs/ml_decoder.py:zero_shot --workdir=runs/zsl       # 16 of 20 kinds, minutes
    python -m mljax.evaluate --workdir=runs/zsl --labels=unseen                            # the other four; or all
    python -m mljax.predict --workdir=runs/zsl photo.jpg --labels=sheep,kettle [--vectors=glove]
On other data sets `zero_shot` takes --config.unseen=cat,dog. `nuswide_zero_shot`: 925 tags seen, 81 concepts unseen.

The authors' COCO mAP: tresnet_m at 224 84.2, tresnet_l at 448 90.1, tresnet_xl at 640 91.4. Open Images (9,605 labels,
200 groups, tresnet_m) 86.8; NUS-WIDE zero-shot 31.1, of the epoch that is best on the unseen labels (here: the seen).
Their runs start from TResNets trained with ML-Decoder, which no hub has: give such a file as --config.weights.name
(tresnet_xl needs it; L and M start from ImageNet-21k otherwise).
"""

from ml_collections import config_dict

from mljax import config as c
from mljax.data.nuswide import CLASSES


def get_config(arg=None):
    config = c.base()
    system: dict = dict(name="ml_decoder", width=128, ffn=256, heads=8, zero_shot=False, dropout=0.1)
    config.system = system | dict(groups=config_dict.placeholder(int))  # None: a query per label up to 100 labels
    asl(config, "batch_mean")
    config.optim.lr = 1e-3
    config = c.choose(config, arg, WORDS)
    if not config.system.zero_shot:
        config.vectors = "none"  # nothing else uses them
    elif config.data.name == "scenes":
        config.unseen = ("bus", "sheep", "kettle", "sofa")
    return config


def asl(config, reduction):
    config.loss = dict(name="asl", gamma_neg=4.0, gamma_pos=0.0, clip=0.05, reduction=reduction)


def released(name, weights, size):
    """As the authors train on COCO; L2 is part of Adam's gradient, so the loss is a sum, as theirs."""

    def word(config):
        config.backbone, config.weights.name = dict(name=name), weights
        config.system.update(width=768, ffn=2048, initial="torch")
        train = dict(crop="squish", flip=0.0, cutout=0.5, randaugment="package")
        config.input.update(size=size, train=train, eval=dict(crop="squish"))
        asl(config, "sum")
        config.cache.train_views = config.cache.eval_views = ()
        config.optim.update(name="adam", lr=1e-4, weight_decay=1e-4, no_decay=("1-D",), epochs=40, batch_size=56)
        config.eval.every, config.eval.select, config.ema = 1, "best_of_raw_and_ema", 0.9997
        if config.data.name == "coco":
            config.data.order = "id"

    return word


tresnet_m = released("tresnet_m", "tresnet_m_in21k", 224)
tresnet_l = released("tresnet_l_v2", "tresnet_l_v2_in21k", 448)


def openimages(config):
    """Thousands of labels from a CSV file, TResNet-M at 224; the authors have 200 groups."""
    c.own_csv(config)
    tresnet_m(config)


def zero_shot(config):
    config.system.zero_shot, config.system.groups = True, None
    config.optim.weight_decay = 1e-2
    if config.data.name != "scenes" and config.vectors in ("auto", "none"):
        config.vectors = "glove"


def nuswide_zero_shot(config):
    """data.csv and wordvec_array.pth of the authors, in the data folder's nus_wide/; unseen are NUS-WIDE's concepts."""
    c.data_set(config, "nuswide")
    config.data.variant, config.vectors, config.unseen = "zsl", "nus_wide/wordvec_array.pth", CLASSES
    tresnet_l(config)
    zero_shot(config)


def lighter(config):
    """A smaller head on cached features of a frozen MobileNetV1."""
    config.system.update(width=512, ffn=512)
    config.optim.update(lr=3e-4, epochs=12, batch_size=64)


WORDS: dict = c.data_sets(tresnet_l, "voc2007", "coco2014", "nuswide") | c.small_sets(lighter, c.VIEWS)
WORDS |= dict(openimages=openimages, zero_shot=zero_shot, nuswide_zero_shot=nuswide_zero_shot)
WORDS |= dict(tresnet_m=tresnet_m, tresnet_l=tresnet_l)
WORDS |= dict(tresnet_xl=released("tresnet_xl_v2", "tresnet_xl_v2_ml_decoder", 640))
