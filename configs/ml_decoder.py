r"""ML-Decoder: groups of labels as fixed queries of one cross-attention layer (Ridnik et al., WACV 2023).

    python -m mljax.main --config=configs/ml_decoder.py --workdir=runs/mld                 # embedded data set, minutes
    python -m mljax.main --config=configs/ml_decoder.py:coco2014 --workdir=runs/coco       # TResNet-L, 448, released
    python -m mljax.main --config=configs/ml_decoder.py:openimages --config.data.file=labels.csv \
      --config.system.groups=200 --workdir=runs/oi

The authors' COCO mAP: tresnet_m at 224 84.2, tresnet_l at 448 90.1, tresnet_xl at 640 91.4. Open Images (9,605 labels,
200 groups, tresnet_m) 86.8; NUS-WIDE zero-shot 31.1. Their runs start from TResNets trained with ML-Decoder, which no
hub has: give such a file as --config.weights.name (tresnet_xl needs it; L and M start from ImageNet-21k otherwise).
Options: --config.system.groups=20 | zero_shot (queries from label vectors, one classifier for all labels)
"""

from ml_collections import config_dict

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    system: dict = dict(name="ml_decoder", width=128, ffn=256, heads=8, zero_shot=False, dropout=0.1)
    config.system = system | dict(groups=config_dict.placeholder(int))  # None: a query per label up to 100 labels
    asl(config, "batch_mean")
    config.optim.lr = 1e-3
    config = c.choose(config, arg, WORDS)
    if not config.system.zero_shot:
        config.vectors = "none"  # nothing else uses them
    return config


VIEWS = ("224", "224:flip", "224:tl85", "224:br85", "224:flip:tr85", "224:flip:bl85")  # those of CMSG


def asl(config, reduction):
    config.loss = dict(name="asl", gamma_neg=4.0, gamma_pos=0.0, clip=0.05, reduction=reduction)


def released(name, weights, size):
    """As the authors train on COCO; L2 is part of Adam's gradient, so the loss is a sum, as theirs."""

    def word(config):
        config.backbone, config.weights.name = dict(name=name), weights
        config.system.update(width=768, ffn=2048)
        train = dict(crop="squish", flip=0.0, cutout=0.5, randaugment="package")
        config.input.update(size=size, train=train, eval=dict(crop="squish"))
        asl(config, "sum")
        config.cache.train_views = config.cache.eval_views = ()
        config.optim.update(name="adam", lr=1e-4, weight_decay=1e-4, no_decay=("1-D",), epochs=40, batch_size=56)
        config.eval.every, config.eval.select, config.ema = 1, "best_of_raw_and_ema", 0.9997

    return word


tresnet_m = released("tresnet_m", "tresnet_m_in21k", 224)
tresnet_l = released("tresnet_l_v2", "tresnet_l_v2_in21k", 448)
tresnet_xl = released("tresnet_xl_v2", "tresnet_xl_v2_ml_decoder", 640)


def voc2007(config):
    c.voc(config, "2007")
    tresnet_l(config)


def coco2014(config):
    c.coco2014(config)
    tresnet_l(config)
    config.data.order = "id"


def openimages(config):
    """Thousands of labels from a CSV file, TResNet-M at 224; the authors have 200 groups."""
    c.own_csv(config)
    tresnet_m(config)


def zero_shot(config):
    config.system.zero_shot, config.system.groups = True, None
    config.optim.weight_decay = 1e-2
    if config.data.name != "scenes":
        config.vectors = "glove"


def small_set(data_set, *arguments):
    """A lighter head on cached features of a frozen MobileNetV1."""

    def word(config):
        data_set(config, *arguments)
        config.system.update(width=512, ffn=512)
        config.optim.update(lr=3e-4, epochs=12, batch_size=64)
        config.eval.every = 12

    return word


WORDS = dict(voc2007=voc2007, coco2014=coco2014, openimages=openimages, zero_shot=zero_shot)
WORDS |= dict(voc_resplit=small_set(c.voc_resplit, VIEWS), csv=small_set(c.own_csv))
WORDS |= dict(tresnet_m=tresnet_m, tresnet_l=tresnet_l, tresnet_xl=tresnet_xl)
