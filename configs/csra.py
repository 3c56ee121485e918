"""CSRA: class-specific residual attention (Zhu, Wu; ICCV 2021).

    python -m mljax.main --config=configs/csra.py --workdir=runs/csra                # embedded data set, minutes
    python -m mljax.main --config=configs/csra.py:voc2007 --workdir=runs/voc2007     # ResNet-101, 448, as the paper
    python -m mljax.main --config=configs/csra.py:coco2014,heads=6 --workdir=runs/coco --config.weights.name=cutmix.pth

The paper's mAP with ResNet-101: VOC2007 94.7 (1 head), 95.2 with weights from CutMix; COCO 83.3 (4 heads), 85.6 with
weights from CutMix (6 heads). With ViTs, the words vit_base and vit_large (16x16 patches, pretrained at 224): COCO 86.5
with ViT-L at 448 (8 heads), WIDER-Attribute, which is not here, 89.0 with ViT-B and 90.2 with ViT-L at 224 (1 head,
lambda 0.3). Their code has positions for 224 only and does not say how 448 was done; here they are interpolated
(224: --config.input.size=224 --config.backbone.size=224). Options: --config.system.lam, words heads=1 | 2 | 4 | 6 | 8
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="csra", heads=1, lam=0.1)
    config.optim.lr = 1e-2
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def paper(config):
    """SGD, the head at ten times the rate of the backbone, two epochs of warm-up from zero; images stay in [0, 1]."""
    c.resnet101(config)
    config.weights.update(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    config.input.train = {"crop": "random_resized", "scale": (0.7, 1.0), "flip": 0.5}
    config.optim.update(name="sgd", lr=1e-1, epochs=30, batch_size=16, weight_decay=1e-4, momentum=0.9)
    every = 4 if config.data.name == "voc" else 5
    config.optim.schedule = dict(name="step", every=every, warmup_epochs=2.0, warmup_start=0.0)
    config.optim.groups = (("backbone/.*", {"lr": 0.1}),)
    config.eval.every = 1
    if config.data.name == "voc":
        config.data.difficult, config.eval.scored_in = "V4", "all"  # difficult entries are left out of P, R, F1 too
    else:
        config.system.update(heads=4, lam=0.5)


def vit(name, weights, size, heads):
    """A ViT trained as the ResNet-101; lambda is the default of their code for ViTs."""

    def word(config):
        paper(config)
        config.backbone = dict(name=name, size=size)
        config.weights.name, config.input.size = weights, size
        config.cache.train_views = config.cache.eval_views = ()
        config.system.update(heads=heads, lam=0.3)

    return word


def lighter(config):
    config.system.update(heads=4, lam=0.5)
    config.optim.update(lr=1e-2, epochs=20, batch_size=64)


def heads(config, count):
    config.system.heads = int(count)


WORDS: dict = c.data_sets(paper, "voc2007", "coco2014") | c.small_sets(lighter) | {"heads=": heads}
WORDS |= dict(vit_base=vit("vit_base_16_224", "vit_base_16_224_21k_1k", 224, 1))
WORDS |= dict(vit_large=vit("vit_large_16_224", "vit_large_16_224_21k_1k", 448, 8))
