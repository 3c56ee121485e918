"""Query2Label: labels as queries of a transformer decoder over the image (Liu et al., arXiv 2107.10834).

    python -m mljax.main --config=configs/query2label.py --workdir=runs/q2l                # embedded data set, minutes
    python -m mljax.main --config=configs/query2label.py:coco2014 --workdir=runs/coco      # ResNet-101, 448, released
    python -m mljax.main --config=configs/query2label.py:nuswide,cvt_w24 --workdir=runs/nus

The authors' COCO mAP (env, 40,504 images): r101 84.9, r101_576 86.5, tresnet_l 87.3, tresnet_l_22k 89.2, swin_l 90.5,
cvt_w24 91.3. The paper's VOC2007: tresnet_l_22k 96.1, cvt_w24 97.3; VOC2012: 96.2 to 96.6; NUS-WIDE: r101 65.0,
tresnet_l_22k 66.3, cvt_w24 70.1; Visual Genome 500 with tresnet_l_22k at 512: 42.5.
Options: --config.system.encoder_layers=0 | --config.system.self_attention=first (others, all) |
--config.system.width=512 (keeps the input projection) | --config.backbone.frozen= (nothing frozen)
"""

from mljax import config as c

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
        config.system.update(width=None, ffn=None, initial="stacked")  # the backbone's channels, and 4 times as many
        train = dict(crop="squish", flip=0.0, randaugment="package")
        config.input.update(size=size, train=train, eval=dict(crop="squish"))
        config.cache.train_views = config.cache.eval_views = ()
        config.optim.update(name="adamw", lr=1e-4, weight_decay=1e-2, epochs=80, batch_size=128, eps=1e-11)
        config.eval.update(every=1, select="best_of_raw_and_ema", definition="env")
        config.ema = 0.9997
        if config.data.name == "coco":
            config.data.update(order="id", annotated_only=False)

    return word


def lighter(config):
    """A head without an encoder on cached features; ASL as its authors train."""
    config.system.update(width=384, ffn=512, encoder_layers=0)
    config.loss.update(gamma_neg=4.0, clip=0.05, eps=1e-8)
    config.optim.update(lr=4e-4, epochs=12, batch_size=64)


r101 = released("resnet101", "resnet101", 448, frozen=FROZEN, norm="frozen")
WORDS: dict = c.data_sets(r101, "voc2007", "voc2012", "coco2014", "nuswide")
WORDS |= c.data_sets(released("tresnet_l_v2", "tresnet_l_v2_in21k", 512, frozen=FROZEN), "vg500")
WORDS |= c.small_sets(lighter, c.VIEWS)
WORDS |= dict(r101=r101, r101_576=released("resnet101", "resnet101", 576, frozen=FROZEN, norm="frozen"))
WORDS |= dict(tresnet_l=released("tresnet_l", "tresnet_l_in1k_448", 448, frozen=FROZEN))
WORDS |= dict(tresnet_l_22k=released("tresnet_l_v2", "tresnet_l_v2_in21k", 448, frozen=FROZEN))
WORDS |= dict(swin_l=released("swin_large_384", "swin_large_384_22k", 384))
WORDS |= dict(cvt_w24=released("cvt_w24_384", "cvt_w24_384_22k", 384))
