"""MulCon: label-level supervised contrast in two steps, both by one command (Dao et al., Neurocomputing 2023).

    python -m mljax.main --config=configs/mulcon.py --workdir=runs/mulcon                # embedded data set, minutes
    python -m mljax.main --config=configs/mulcon.py:coco2014 --workdir=runs/mulcon_coco  # as the released code
    python -m mljax.main --config=configs/mulcon.py:coco2014,paper --workdir=runs/paper  # as the paper writes it

The first step trains with BCE (`config.optim`); the second (`config.stages[1]`) starts from it and adds the contrastive
loss. --config.optim changes the first step, '--config.stages[1].optim.lr=1e-3' the second.
The paper's mAP, ResNet-101 at 448: COCO 84.0, NUS-WIDE (about 200,000 images) 62.5. Its ablation on COCO, as words:
`backbone` 80.8 (BCE), `image_level` 81.0 (contrast of images), `bce` 83.0, `scratch` 81.1 (one step with both losses).
`bce_two_steps` is ours: both steps with all views and rates of the second, without the contrast; `bce` has one step.
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    system: dict = dict(name="mulcon", level="label", width=128, heads=4, token_layers=2, label_layers=1)
    config.system = system | dict(norm=True, relu=True, scale="width", queries="xavier", contrast=0.1, how="mean")
    config.optim.update(lr=1e-3, epochs=10)
    config.input.views = 2
    two_steps(config, optim=dict(epochs=5, lr=3e-4))
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def two_steps(config, **second):
    config.stages = (dict(system=dict(contrast=0.0), input=dict(views=1)), second)


def code(config):
    """The released code's setting: 15 of the first step's 25 epochs, whose average the second step starts from."""
    c.resnet101(config)
    config.system.update(dict(width=1024, contrast=0.5))
    augment = dict(flip=0.5, randaugment="package")
    config.input.train = dict(crop="random_resized", scale=(0.875, 1.0), **augment)
    config.optim.update(name="adamw", lr=2e-4, epochs=15, batch_size=32, weight_decay=1e-4)
    config.optim.schedule = dict(name="warmup_cosine", warmup_epochs=5, epochs=25)
    config.optim.groups = (("^backbone/", {"lr": 0.1}),)
    config.ema, config.eval.every, config.eval.select = 0.9997, 1, "best_of_raw_and_ema"
    steps, groups = dict(name="step", every=20), (("^(backbone|attention)/", {"lr": 0.1}),)
    sgd = dict(name="sgd", lr=1e-2, epochs=15, batch_size=24, weight_decay=1e-4, schedule=steps, groups=groups)
    two_steps(config, optim=sgd, start="ema", input=dict(train=dict(crop="squish", **augment)))


def paper(config):
    """The paper's architecture and loss; where a data set's word has set the code's steps, the paper's, as long."""
    config.system.update(token_layers=0, label_layers=0, norm=False, relu=False)
    config.system.update(scale="none", queries="normal", how="sum", contrast=0.1)
    if config.ema:
        config.system.width = 2048
        config.optim = dict(name="adam", lr=2e-4, epochs=25, batch_size=64, schedule=dict(name="one_cycle"))
        sgd = dict(config.stages[1]["optim"], batch_size=32, groups=())
        two_steps(config, **{**config.stages[1], "optim": sgd})


CROPS = ("224:tl60", "224:br60", "224:flip:tr60", "224:flip:bl60")


def voc_resplit(config):
    """Frozen MobileNetV1 at 224 on the VOC2007 re-split: six cached views, in the second step four close crops more.

    Of these ten the second step draws two different ones for each image, which share a 25th of the photo or more.
    """
    c.voc_resplit(config, c.MIRRORED)
    config.cache.train_views = c.VIEWS
    config.system.update(width=256, token_layers=0, queries="normal", std=0.06)
    config.optim.update(lr=3e-3, epochs=8, batch_size=64)
    config.eval.every = 8
    two_steps(config, optim=dict(epochs=4, lr=5e-4), eval=dict(every=4), cache=dict(train_views=(*c.VIEWS, *CROPS)))


def alone(config):
    """One step: where the first of two ends within its schedule, all of the schedule."""
    config.stages = ()
    config.optim.epochs = config.optim.schedule.get("epochs", config.optim.epochs)


def bce(config):
    config.system.contrast, config.input.views = 0.0, 1
    alone(config)


def bce_two_steps(config):
    config.system.contrast = 0.0


def image_level(config):
    config.system.level = "image"


def backbone(config):
    image_level(config)
    bce(config)


WORDS: dict = c.data_sets(code, "voc2007", "coco2014", "nuswide") | dict(voc_resplit=voc_resplit, paper=paper)
WORDS |= dict(bce=bce, bce_two_steps=bce_two_steps, scratch=alone, backbone=backbone, image_level=image_level)
