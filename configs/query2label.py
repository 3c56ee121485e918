"""Query2Label: labels as queries of a transformer decoder over the image (Liu et al., arXiv 2107.10834).

    python -m mljax.main --config=configs/query2label.py --workdir=runs/q2l                # embedded data set, minutes
    python -m mljax.main --config=configs/query2label.py:coco2014 --workdir=runs/coco      # ResNet-101, 448, released
    python -m mljax.main --config=configs/query2label.py:coco2014,swin_l --workdir=runs/coco_swin

The authors' COCO mAP (env, 40,504 images): r101 84.9, r101_576 86.5, tresnet_l 87.3, tresnet_l_22k 89.2, swin_l 90.5,
cvt_w24 91.3. The paper's VOC2007: tresnet_l_22k 96.1, cvt_w24 97.3; VOC2012: 96.2 to 96.6; NUS-WIDE: r101 65.0,
tresnet_l_22k 66.3, cvt_w24 70.1; Visual Genome 500 with tresnet_l_22k at 512: 42.5.
Options: --config.system.encoder_layers=0 | --config.system.self_attention=first (others, all) |
--config.system.width=512 (keeps the input projection) | --config.backbone.frozen= (nothing frozen)
"""

from mljax import config as c

VIEWS = ("224", "224:flip", "224:tl85", "224:br85", "224:flip:tr85", "224:flip:bl85")  # those of CMSG
FROZEN = "stem,layer1"  # only names with layer2, 3 or 4 train in the authors' code


def get_config(arg=None):
    config = c.base()
    system: dict = dict(name="query2label", width=128, ffn=256, heads=4, encoder_layers=1, decoder_layers=2)
    config.system = system | dict(self_attention="none", dropout=0.1)
    config.loss = dict(name="asl", gamma_neg=2.0, gamma_pos=0.0, clip=0.0, eps=1e-5, reduction="mean")
    config.optim.lr = 1e-3
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def released(name, weights, size, **backbone):
    """The released settings; the loss of the authors' code is 1000 times as large, so Adam's eps is 1e-8 / 1000."""

    def word(config):
        config.backbone, config.weights.name = dict(name=name, **backbone), weights
        config.system.update(width=None, ffn=None)  # the backbone's channels, and 4 times as many
        train = dict(crop="squish", flip=0.0, randaugment="package")
        config.input.update(size=size, train=train, eval=dict(crop="squish"))
        config.cache.train_views = config.cache.eval_views = ()
        config.optim.update(name="adamw", lr=1e-4, weight_decay=1e-2, epochs=80, batch_size=128, eps=1e-11)
        config.eval.update(every=1, select="best_of_raw_and_ema", definition="env")
        config.ema = 0.9997

    return word


r101 = released("resnet101", "resnet101", 448, frozen=FROZEN, norm="frozen")
tresnet_l_22k = released("tresnet_l_v2", "tresnet_l_v2_in21k", 448, frozen=FROZEN)


def voc(year):
    return lambda config: (c.voc(config, year), r101(config))


def coco2014(config):
    c.coco2014(config)
    r101(config)
    config.data.update(order="id", annotated_only=False)


def nuswide(config):
    """The CSV of ASL's authors; which split the paper used is not known."""
    config.data = dict(name="nuswide", root=None, variant="asl")
    config.splits = dict(train="train", eval="val")
    r101(config)


def vg500(config):
    config.data = dict(name="visual_genome", root=None, size=500)
    config.splits = dict(train="train", eval="test")
    tresnet_l_22k(config)
    config.input.size = 512


def small_set(data_set, *arguments):
    """A lighter head without an encoder, on cached features of a frozen MobileNetV1; ASL as its authors train."""

    def word(config):
        data_set(config, *arguments)
        config.system.update(width=384, ffn=512, encoder_layers=0)
        config.loss.update(gamma_neg=4.0, clip=0.05, eps=1e-8)
        config.optim.update(lr=4e-4, epochs=12, batch_size=64)
        config.eval.every = 12

    return word


WORDS = dict(voc2007=voc("2007"), voc2012=voc("2012"), coco2014=coco2014, nuswide=nuswide, vg500=vg500)
WORDS |= dict(voc_resplit=small_set(c.voc_resplit, VIEWS), csv=small_set(c.own_csv))
WORDS |= dict(r101=r101, r101_576=released("resnet101", "resnet101", 576, frozen=FROZEN, norm="frozen"))
WORDS |= dict(tresnet_l=released("tresnet_l", "tresnet_l_in1k_448", 448, frozen=FROZEN), tresnet_l_22k=tresnet_l_22k)
WORDS |= dict(swin_l=released("swin_large_384", "swin_large_384_22k", 384))
WORDS |= dict(cvt_w24=released("cvt_w24_384", "cvt_w24_384_22k", 384))
