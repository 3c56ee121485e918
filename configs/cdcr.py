"""CDCR: false labels among the positives, told apart while training (repository xiemk/PML-CDCR).

    python -m mljax.main --config=configs/cdcr.py --workdir=runs/cdcr
    python -m mljax.main --config=configs/cdcr.py:coco2014,noise=0.2 --workdir=runs/cdcr_coco

Two stages: all candidates count, then, from the averaged weights, only those that the model believes. The word
difficulty compares with the mean of the class. Around another system: --config.system.net.name=query2label.
"""

from mljax import config as c


def get_config(arg=None):
    config = c.base()
    net = dict(name="baseline", pooling="average", dropout=0.0)
    config.system = dict(name="cdcr", net=net, alpha=0.6, difficulty_aware=False, start=0, view="")
    config.observe = dict(name="candidates", rate=0.1)
    config.loss = dict(name="bce", reduction="batch_mean")
    config.optim.update(lr=3e-3)
    config.ema = 0.99
    config.vectors = "none"
    config.stages = stages(4, 6)
    return c.choose(config, arg, WORDS)


def stages(first, second, **optim):
    plain = {"system": {"start": 1_000_000}, "optim": {"epochs": first, **optim}}
    return (plain, {"system": {"start": 0}, "optim": {"epochs": second, **optim}, "start": "ema"})


def paper(data):
    def word(config):
        c.data_set(config, data)
        config.vectors = "none"
        config.backbone = dict(name="tresnet_l")
        config.weights.name = "tresnet_l_in1k"
        config.input.size = 224
        config.input.train = dict(crop="squish", flip=0.5, cutout=0.5, randaugment="package")
        config.input.eval = dict(crop="squish")
        config.optim.update(name="adam", lr=1e-4, batch_size=128, weight_decay=1e-4, no_decay=("1-D",))
        config.loss.reduction = "sum"
        config.stages = stages(15, 25, schedule=dict(epochs=80))
        config.ema = 0.9997
        config.eval.update(every=1, select="best_of_raw_and_ema")

    return word


def voc_resplit(config):
    c.voc_resplit(config, ("224", "224:flip"))
    config.vectors = "none"
    config.ema = 0.99
    config.optim.update(lr=1e-2, epochs=30, batch_size=64)
    first, second = stages(20, 10)  # what a first stage too short does not believe never comes back
    config.stages = (first, {**second, "optim": {"epochs": 10, "lr": 1e-3}})


def difficulty(config):
    config.system.difficulty_aware = True
    if config.backbone.name == "tresnet_l":  # of the authors' training, which then ends after 20 epochs
        config.stages = stages(15, 5, schedule=dict(epochs=80))


def noise(config, rate):
    config.observe.rate = float(rate)


WORDS: c.Words = {"voc2007": paper("voc2007"), "coco2014": paper("coco2014")}
WORDS = {**WORDS, "voc_resplit": voc_resplit, "difficulty": difficulty, "noise=": noise}
