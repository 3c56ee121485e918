# %% [markdown]
# # A tour of mljax
#
# Train a system on pictures that mljax draws itself, look at where it looks, predict, and take the same training step on one
# device and on two. No downloads; a few minutes on two CPU cores. Needs `pip install -e '.[notebooks]'` in the repository.
#
# The first cell makes this CPU look like two devices. That has to happen before jax starts; leave the three lines out to
# use the accelerators that are there.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

# %%
import copy
import json
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import mljax
from mljax import experiment, metrics, parallel, train
from mljax.data import labels
from mljax.pictures import drawing
from mljax.pipeline import loader

sys.stderr = sys.stdout  # progress as plain text below the cell
runs = Path(tempfile.mkdtemp())
jax.devices()

# %% [markdown]
# ## The pictures
#
# The data set `scenes` has 20 labels. A place (kitchen, street, farm, ..) decides what is likely to stand in it, so labels
# come in company. Pictures are drawn when they are read, always the same ones. Below are pictures of the test split at 128
# pixels; `clutter` and `strangers` are off here, which makes the task easier.

# %%
scenes = {"name": "scenes", "train_images": 2000, "test_images": 400, "clutter": 0.0, "strangers": 0.0}
config = mljax.read_config("configs/cmsg.py")
with config.unlocked():
    config.data = {**scenes, "size": 128}
test = experiment.source(config, "test", training=False)


def named(row):
    return [name for name, on in zip(test.classes, row) if on]


def caption(row):
    return textwrap.fill(", ".join(named(row)), 20)


pictures = [Image.fromarray(test[i]["image"]) for i in range(10)]
captions = [caption(test.labels[i]) for i in range(10)]
drawing.contact_sheet(pictures, captions, columns=5, cell=128)

# %% [markdown]
# ## Training
#
# An experiment is a file in `configs/` plus changes. `configs/cmsg.py` without words trains CMSG on `scenes`; here it becomes
# smaller still: 64 pixels, a narrow backbone that stops at stride 8, label-queried features (each label pools the map by its
# own attention, from the start), one layer of attention among labels, and no cross-attention layers, which take longer to
# learn. On the command line these would be `--config.input.size=64 --config.system.width=48` and so on.

# %%
with config.unlocked():
    config.data.size = config.input.size = 64
    config.backbone.update(widths=(16, 32, 64, 64), endpoints=("8",))
    config.system.update(features="label_queried", width=48, ffn=96, saa_layers=0, dropout=0.0)
    config.loss.update(gamma_neg=2.0, clip=0.0)
    config.optim.update(lr=3e-3, batch_size=32, epochs=8)
    config.eval.every = 2

report = mljax.fit(config, runs / "cmsg")

# %% [markdown]
# That is the table that papers print: average precision per label and its mean; then precision, recall and F1 per class
# (CP, CR, CF1) and overall (OP, OR, OF1), of labels above probability 0.5 and of the three likeliest. A minute of training
# shows the way, not what the system can do. Calling `fit` again would print the table and train nothing; had it been
# interrupted, it would go on where it stopped.
#
# The run directory holds everything, the curves as TensorBoard events and as lines of JSON:

# %%
print(*sorted(path.name for path in (runs / "cmsg").iterdir() if "tfevents" not in path.name))
lines = [json.loads(line) for line in (runs / "cmsg" / "metrics.jsonl").open()]


def curve(name):
    return zip(*((line["step"], line[name]) for line in lines if name in line))


figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), dpi=80, layout="constrained")
left.plot(*curve("loss"), color="tab:blue")
left.set(xlabel="step", ylabel="training loss")
right.plot(*curve("raw/mAP"), "o-", color="tab:orange")
right.set(xlabel="step", ylabel="mAP of test (%)", xlim=(0, None), ylim=(0, 50))
plt.show()

# %% [markdown]
# ## Predicting
#
# Three lines, and the data set is not needed: paths, PIL images, bytes or arrays of any size go in.

# %%
run = mljax.load(runs / "cmsg")
photos = [test[0]["image"], pictures[1], pictures[2].resize((300, 200))]
run.predict(photos, top=3)

# %% [markdown]
# `python -m mljax.predict --workdir=RUN photo.jpg holiday/` does the same for files and folders.
#
# ## Where it looked
#
# `run.attention` gives a map for every image and label, `run.overlay` a picture of one. Below are the four test pictures
# with three labels or more that the system is surest of, each with its labels' maps of 8 x 8 cells. Some maps sit on their
# thing; others sit on what usually stands beside it, which is how a small network guesses from company.

# %%
scores = run.scores([test[i]["image"] for i in range(100)])
truth = test.labels[:100] > 0
sure = np.where(truth.sum(1) >= 3, (scores * truth).sum(1) / truth.sum(1), 0)
shown, captions = [], []
for i in np.argsort(-sure)[:4]:
    picture = Image.fromarray(test[i]["image"])
    shown.append(picture)
    captions.append(caption(truth[i]))
    for label in sorted(named(truth[i]), key=lambda name: -scores[i, test.classes.index(name)])[:3]:
        shown.append(run.overlay(picture, label))
        captions.append(f"{label} {scores[i, test.classes.index(label)]:.2f}")
drawing.contact_sheet(shown, captions, columns=8, cell=112)

# %% [markdown]
# ## Labels in company
#
# What CMSG knows about labels before it sees a picture are their vectors (of words, for real labels; `scenes` has its own).
# Left: their cosines. Middle: the matrix S that CMSG makes of them, cosines above a threshold, re-weighted; it is added to
# the scores of the attention among labels. Right: how often the label of a column is there when the label of a row is, as
# counted in the training split; `system.correlation=cooccurrence` would use that instead. The diagonals are left out.

# %%
meta, system = run.experiment.meta, run.experiment.config.system
cosine = labels.cosine(meta.vectors)
panels = {
    "cosine of label vectors": cosine,
    "S, what guides attention": labels.mlgcn_correlation(cosine, system.threshold),
    "P(column | row) in training": labels.conditional(meta.labels, meta.observed),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4.1), dpi=72, sharey=True, layout="constrained")
for axis, (title, matrix) in zip(axes, panels.items()):
    axis.set_facecolor("lightgrey")
    image = axis.imshow(np.where(np.eye(len(matrix)), np.nan, matrix), vmin=0)
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(meta.num_labels), meta.classes, rotation=90, fontsize=7)
    axis.set_yticks(range(meta.num_labels), meta.classes, fontsize=7)
    figure.colorbar(image, ax=axis, shrink=0.6)
plt.show()

# %% [markdown]
# Which labels keep company most?

# %%
counts, alone = labels.cooccurrence(meta.labels, meta.observed)
pairs = np.argwhere(np.triu(counts))
for i, j in sorted(pairs, key=lambda pair: -counts[tuple(pair)])[:5]:
    print(f"{meta.classes[i]:>8} and {meta.classes[j]:<8} together in {counts[i, j]} of {len(meta.labels)} pictures")

# %% [markdown]
# ## One device, or two
#
# The training step is written once. Under `jit` arrays are global and the compiler divides the work; under `pmap` every
# device takes a part of the batch, and losses, gradients and BatchNorm statistics are averaged by explicit collectives. Same
# batch, same start: the losses must agree.

# %%
source = experiment.source(config, "train", training=True)
facts = experiment.make_meta(config, source), experiment.preprocessing(config)


def three_steps(how, devices):
    """The losses of the first three training steps."""
    chosen = copy.deepcopy(config)
    chosen.parallel = how
    built = experiment.assemble(chosen, *facts)
    variables = experiment.init_variables(built, seed=0)
    optimizer = train.make_optimizer(chosen, variables["params"], steps_per_epoch=len(source) // 32)
    state = train.create_state(variables, optimizer, ema=0.0, seed=0)
    step, place_state, place = parallel.compile_step(
        train.make_step(built, optimizer), how, jax.devices()[:devices]
    )
    state, losses = place_state(state), []
    for batch in loader.train_batches(
        source, built.train_transform(), batch_size=32, seed=0, start=0, steps=3, views=1, threads=2
    ):
        state, measured = step(state, place(batch))
        losses.append(float(measured["loss"]))
    return losses


one = three_steps("jit", 1)
two = three_steps("pmap", 2)
print("jit, 1 device  ", one)
print("pmap, 2 devices", two)
np.testing.assert_allclose(one[0], two[0], rtol=1e-5)

# %% [markdown]
# They agree but for the rounding of sums that are taken in another order. For a whole run it is one key:
# `config.parallel = "pmap"`, which works with every system.
#
# ## Another average precision
#
# The literature has several definitions. A run keeps its scores, so no picture is looked at again:

# %%
kept = np.load(runs / "cmsg" / "scores.npz")
for definition in ("raw", "env", "sklearn", "11point"):
    found = metrics.evaluate(kept["scores"], kept["labels"], classes=kept["classes"], definition=definition)
    print(f"{definition:>8}  mAP {found['metrics']['mAP']:.2f}")

# %% [markdown]
# Or from the shell: `python -m mljax.evaluate --workdir=RUN --definition=11point`, with `--split=val` for another split.
#
# ## Another system
#
# A system is a section of the config, too. The baseline (average pooling and a linear classifier) on the same pictures, with
# the same backbone, loss and optimiser:

# %%
other = copy.deepcopy(config)
with other.unlocked():
    other.system = {"name": "baseline", "pooling": "average"}
baseline = mljax.fit(other, runs / "baseline")

# %%
for name, found in (("CMSG", report), ("baseline", baseline)):
    print(f"{name:>9}  " + "  ".join(f"{key} {found['metrics'][key]:5.2f}" for key in ("mAP", "CF1", "OF1")))

# %% [markdown]
# One seed, 400 pictures, a minute each: this shows how to compare, not which is better. `python -m mljax.sweep` repeats over
# seeds and settings.
#
# ## What next
#
# - The paper's experiments and your own photos: [README](../README.md), [docs/own_photos.md](../docs/own_photos.md)
# - What CMSG's paper fixes and what was chosen here: [docs/cmsg.md](../docs/cmsg.md)
# - Optimisers, freezing, EMA, feature caches, stages: [docs/training.md](../docs/training.md)
# - What the numbers mean, and whose they match: [docs/metrics.md](../docs/metrics.md)
# - How the house is built, and where a new system goes: [docs/design.md](../docs/design.md)
