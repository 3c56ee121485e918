"""C-Tran: positions and labels are tokens of one encoder; some labels may be known (Lanchantin et al., CVPR 2021).

    python -m mljax.main --config=configs/c_tran.py --workdir=runs/c_tran              # embedded data set, minutes
    python -m mljax.main --config=configs/c_tran.py:coco2014 --workdir=runs/coco2014   # ResNet-101, 576, as the paper
    python -m mljax.evaluate --workdir=runs/c_tran --known=0.5                         # half of the labels given
    python -m mljax.predict --workdir=runs/c_tran photo.jpg --known=dog=1,cat=0        # what is known of the photo

The paper's mAP with ResNet-101 at 576 and no label known: COCO 85.1 (CF1 79.9, OF1 81.7), VG-500 38.4.
Ablations: --config.system.mask_training=False | --config.system.loss_on=all | --config.system.max_known=0
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="c_tran", layers=3, heads=4, width=128, ffn=128, dropout=0.1)
    config.system.update(mask_training=True, max_known=0.75, loss_on="unknown", eval_known=0.0, position=False)
    config.optim.update(lr=1e-3, epochs=15)
    config = c.choose(config, arg, WORDS)
    config.vectors = "none"  # nothing here uses them
    return config


def paper(config):
    """The authors' commands: Adam without decay, a tenth of the rate after 6 epochs without a lower validation loss."""
    c.resnet101(config, 576)
    config.input.train = {"crop": "ssgrl", "flip": 0.5}
    config.input.eval = {"crop": "center", "pre_size": 640}
    config.system.width = config.system.ffn = None
    config.loss = dict(name="bce", reduction="sum")
    config.optim.update(name="adam", lr=1e-5, epochs=100, batch_size=16, weight_decay=0.0)
    config.optim.schedule = dict(name="plateau", metric="loss", mode="min", factor=0.1, patience=5)
    config.eval.update(every=1, select="best", definition="sklearn")
    if config.data.name == "voc":
        config.data.difficult, config.optim.accumulate = "V2", 2
    if config.data.name == "visual_genome":
        config.system.max_known = 0.0  # no label is known in training, as in the authors' code


def lighter(config):
    config.system.update(width=256, ffn=256, layers=2)
    config.optim.update(lr=1e-3, epochs=10, batch_size=64)


WORDS: dict = c.data_sets(paper, "voc2007", "coco2014", "vg500") | c.small_sets(lighter)
