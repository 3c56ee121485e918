"""Retrieval, t-SNE and attention of a small run: their numbers by plain loops, their pictures by size, their errors."""

import argparse
import json
import sys

import numpy as np
import pytest
from PIL import Image

import toy
from mljax import experiment, predict, train
from mljax.analyze import command, embeddings
from mljax.analyze.inputs import Inputs
from mljax.errors import UserError
from mljax.pictures import plots
from mljax.types import Outputs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze") / "run"
    train.fit(toy.shallow(toy.config("cmsg", optim__epochs=1)), folder)
    return folder


@pytest.fixture(scope="module")
def seen(workdir):
    """(run, source, label features of all images, each of length 1)."""
    run = predict.load(workdir)
    source = experiment.source(run.experiment.config, "test", training=False)
    found = [out.label_features for _, _, out in run.stream([source.read(i) for i in range(len(source))])]
    x = np.concatenate(found).astype(np.float64)
    return run, source, x / np.sqrt((x**2).sum(-1, keepdims=True))


def call(workdir, *argv):
    assert command.main([f"--workdir={workdir}", *argv]) == 0


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def pair(source):
    """Two labels that at least two images have."""
    together = np.triu(source.labels.astype(int).T @ source.labels, 1)
    i, j = np.unravel_index(together.argmax(), together.shape)
    return [source.classes[i], source.classes[j]], [i, j]


def test_retrieval_by_one_label_and_by_two(workdir, seen, tmp_path, capsys):
    _, source, x = seen
    names, columns = pair(source)
    flags = (f"--labels={names[0]}", f"--labels={','.join(names)}", "--neighbours=3", "--queries=2")
    call(workdir, "retrieval", *flags, f"--out={tmp_path}")
    found = read(tmp_path, "retrieval")["retrieval"]
    for told, labels, chosen in ((found[0], names[:1], columns[:1]), (found[1], names, columns)):
        assert told["labels"] == labels
        having = [i for i in range(len(source)) if all(source.labels[i, l] for l in chosen)]
        similar = np.zeros((len(source), len(source)))
        for i in range(len(source)):
            for j in range(len(source)):
                similar[i, j] = np.mean([x[i, l] @ x[j, l] for l in chosen])
        hits = []
        for i in having:
            order = sorted((j for j in range(len(source)) if j != i), key=lambda j: -similar[i, j])[:3]
            hits.append(np.mean([j in having for j in order]))
        assert told["precision"] == pytest.approx(100 * np.mean(hits))
        assert told["chance"] == pytest.approx(100 * (len(having) - 1) / (len(source) - 1))
        assert len(told["queries"]) == 2
        for query in told["queries"]:
            i = list(source.ids).index(query["query"])
            assert i in having
            for near in query["nearest"]:
                j = list(source.ids).index(near["id"])
                assert near["similarity"] == pytest.approx(similar[i, j], abs=1e-4)
                assert near["hit"] == (j in having) and i != j
            values = [near["similarity"] for near in query["nearest"]]
            assert values == sorted(values, reverse=True)
        with Image.open(tmp_path / told["picture"]) as picture:
            assert picture.width == 8 + 4 * 208 and picture.height > 2 * 200  # a query and three photos, two rows
    assert (
        f"retrieval by {' + '.join(names)}: {found[1]['precision']:.1f} % of the 3 nearest" in capsys.readouterr().out
    )


def test_retrieval_for_a_photo_of_ones_own(workdir, seen, tmp_path):
    _, source, _ = seen
    Image.fromarray(source.read(5)).save(tmp_path / "mine.png")
    call(workdir, "retrieval", "--labels=person", f"--query={tmp_path}/mine.png", f"--out={tmp_path}")
    query = read(tmp_path, "retrieval")["retrieval"][0]["queries"][0]
    assert query["nearest"][0]["id"] == source.ids[5]
    assert query["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_retrieval_without_labels_takes_the_most_frequent(workdir, seen, tmp_path):
    _, source, _ = seen
    call(workdir, "retrieval", f"--out={tmp_path}")
    one, two = read(tmp_path, "retrieval")["retrieval"]
    counts = source.labels.sum(0)
    assert counts[source.classes.index(one["labels"][0])] == counts.max()
    assert two["labels"] == pair(source)[0]


def silhouette(x, groups):
    """Rousseeuw 1987: (b - a) / max(a, b), a and b the mean distances to the own and to the nearest other group."""
    distance = np.array([[1 - p @ q / np.sqrt((p @ p) * (q @ q)) for q in x] for p in x])
    found = []
    for i in range(len(x)):
        own = (groups == groups[i]) & (np.arange(len(x)) != i)
        if not own.any():
            found.append(0.0)
            continue
        a = distance[i, own].mean()
        b = min(distance[i, groups == g].mean() for g in set(groups) if g != groups[i])
        found.append((b - a) / max(a, b))
    return np.array(found)


def test_tsne_and_its_measures(workdir, seen, tmp_path, capsys):
    run, source, x = seen
    call(workdir, "tsne", f"--out={tmp_path}/a")
    call(workdir, "tsne", f"--out={tmp_path}/b")
    found = read(tmp_path / "a", "tsne")
    assert found == read(tmp_path / "b", "tsne")
    assert (tmp_path / "a" / "tsne.png").read_bytes() == (tmp_path / "b" / "tsne.png").read_bytes()
    kept = [l for l in range(len(source.classes)) if source.labels[:, l].sum() > 1]
    rows, groups = np.nonzero(source.labels[:, kept])
    each = silhouette(x[rows, np.array(kept)[groups]], groups)
    assert found["points"] == len(rows)
    assert found["silhouette"] == pytest.approx(each.mean(), abs=1e-3)
    for i, label in enumerate(kept):
        assert found["silhouette_of"][run.classes[label]] == pytest.approx(each[groups == i].mean(), abs=1e-3)
    said = capsys.readouterr().out
    assert f"{len(rows)} label features of {len(kept)} labels; silhouette {found['silhouette']:.3f}" in said


def test_present_against_absent():
    """All absent features are taken where present ones are as many: no draw, so the silhouette is known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5))
    present = np.arange(12) < 6
    got = embeddings.separation(x, present, rng)
    assert got == pytest.approx(silhouette(x, present.astype(int)).mean())
    assert embeddings.separation(x, np.arange(12) < 1, rng) is None


def test_points_are_shared_evenly_by_labels():
    rng = np.random.default_rng(0)
    present = rng.random((200, 3)) < (0.9, 0.5, 0.02)
    images, labels = embeddings.balanced(present, 60, rng)
    rare = present[:, 2].sum()
    counts = np.bincount(labels)
    assert present[images, labels].all() and len(set(zip(images, labels))) == 60
    assert counts[2] == rare and abs(counts[0] - counts[1]) <= 1
    everything = embeddings.balanced(present, 10_000, rng)
    assert len(everything[0]) == present.sum()


def test_attention_pictures(workdir, seen, tmp_path):
    run, source, _ = seen
    call(workdir, "attention", "--count=3", "--top=2", f"--out={tmp_path}")
    found = read(tmp_path, "attention")["attention"]
    assert len({entry["image"] for entry in found}) == 3
    for entry in found:
        i = list(source.ids).index(entry["image"])
        true = {run.classes[l] for l in np.flatnonzero(source.labels[i])}
        names = [label["label"] for label in entry["labels"]]
        assert set(names) <= true and len(names) == min(2, len(true))
        (_, scores, out) = next(iter(run.stream([source.read(i)])))
        for label in entry["labels"]:
            column = run.classes.index(label["label"])
            assert label["score"] == pytest.approx(float(scores[0, column]), abs=1e-5)
            for k, value in enumerate(label["spread"]):
                p = out.attention[0, k, column].ravel().astype(np.float64)
                assert value == pytest.approx(np.exp(-(p * np.log(p)).sum()) / len(p), rel=1e-4)
        with Image.open(tmp_path / entry["picture"]) as picture:
            assert picture.width == 8 + 6 * 208  # photo, all heads, four heads
    assert command.spread(np.full((3, 4), 1 / 12)) == pytest.approx(1)
    assert command.spread(np.eye(4)[:1]) == pytest.approx(1 / 4)


def test_attention_of_a_photo_of_ones_own(workdir, seen, tmp_path):
    _, source, _ = seen
    Image.fromarray(source.read(3)).save(tmp_path / "mine.png")
    call(workdir, "attention", f"--photo={tmp_path}/mine.png", "--labels=person,cup,person", f"--out={tmp_path}")
    (entry,) = read(tmp_path, "attention")["attention"]
    assert {label["label"] for label in entry["labels"]} == {"person", "cup"}


def test_regions_are_drawn_where_a_system_has_them(seen, tmp_path):
    run, source, _ = seen
    inputs = Inputs(run, source, tmp_path, np.random.default_rng(0))
    extra = {"boxes": np.array([[[0, 32, 0, 32]], [[8, 16, 4, 32]]]), "box_labels": np.array([[3], [5]])}
    out = Outputs(logits=np.zeros((2, 20)), extra=extra)
    assert command.regions(inputs, out, 1) == {5: [0.25, 0.125, 0.5, 1.0]}
    assert command.regions(inputs, Outputs(logits=np.zeros((2, 20))), 1) == {}
    picture = np.asarray(plots.boxed(Image.new("RGB", (200, 160)), [0.25, 0.125, 0.5, 1.0]))
    rows, columns = np.nonzero(picture.any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 159, 50, 99)
    assert not picture[30:150, 60:90].any()


def test_images_are_drawn_by_the_seed(workdir, tmp_path):
    def look(seed, folder):
        call(workdir, "retrieval", "--labels=person", "--images=16", f"--seed={seed}", f"--out={folder}")
        return read(folder, "retrieval")

    a, b, c = look(3, tmp_path / "a"), look(3, tmp_path / "b"), look(4, tmp_path / "c")
    assert a == b and a != c
    assert a["split"] == "16 images of scenes test"


def test_a_figure_can_be_added(workdir, tmp_path, monkeypatch):
    def flags(parser):
        parser.add_argument("--factor", type=int, default=2)

    def make(inputs, args):
        return {"doubled": args.factor * len(inputs.source)}

    monkeypatch.setitem(command.FIGURES, "doubling", command.Figure(flags, make, images=10))
    call(workdir, "doubling", "--factor=3", f"--out={tmp_path}")
    assert read(tmp_path, "doubling")["doubled"] == 30


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "The following arguments are required: figure"),
        (["retrieve"], r"'retrieve' is not a figure \(did you mean 'retrieval'\?\)"),
        (["tsne", "--neighbours=3"], "There is no flag --neighbours"),
        (["retrieval", "--labels=persn"], r"'persn' is not a label of this run \(did you mean 'person'\?\)"),
        (["retrieval", "--labels=,"], "--labels is empty; expected labels joined by commas"),
        (["retrieval", "--queries=0"], "--queries and --neighbours count photos; each must be at least 1"),
        (["retrieval", "--images=1"], "--images=1 is too few to compare; expected at least 2"),
        (["retrieval", "--query=gone.jpg", "--labels=person"], "gone.jpg"),
        (["tsne", "--seed=-1"], "--seed=-1 is out of range; expected 0"),
        (["tsne", "--labels=person"], "t-SNE needs two labels that two images have each, and scenes test has 1"),
        (["tsne", "--points=3"], "t-SNE needs two labels that two images have each"),
        (["tsne", "--perplexity=0"], "--perplexity=0 is not positive; 5 to 50 are usual"),
        (["attention", "--count=0"], "--count and --top must be at least 1"),
        (
            ["attention", "--images=2", "--labels=bus,sheep"],
            "has bus . sheep; raise --images, or give a --photo",
        ),
        (["attention", "--split=trian"], "trian"),
    ],
)
def test_what_a_user_can_get_wrong(workdir, tmp_path, argv, said):
    with pytest.raises(UserError, match=said):
        command.main([f"--workdir={workdir}", *argv, f"--out={tmp_path}"])


def test_a_label_that_one_image_has_cannot_ask(workdir, seen, tmp_path):
    _, source, _ = seen
    label = source.classes[int(source.labels.sum(0).argmin())]
    with pytest.raises(UserError, match=f"image with {label}, and a query needs two; name other --labels"):
        call(workdir, "retrieval", f"--labels={label}", f"--out={tmp_path}")


def test_systems_without_label_features_or_attention(tmp_path, seen):
    train.fit(toy.config("baseline", optim__epochs=1), tmp_path / "run")
    with pytest.raises(UserError, match="The system 'baseline' has no label features; expected a run of a system"):
        call(tmp_path / "run", "retrieval")
    call(tmp_path / "run", "attention", "--count=1")  # class activation maps, one head
    (entry,) = read(tmp_path / "run" / "analysis", "attention")["attention"]
    assert all(len(label["spread"]) == 1 for label in entry["labels"])
    with pytest.raises(UserError, match="has no attention"):
        seen[0].maps(Outputs(logits=np.zeros((1, 2))))


def test_absent_packages_are_named(workdir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.manifold", None)
        with pytest.raises(UserError, match=r"needs scikit-learn and matplotlib; install them with: pip install"):
            call(workdir, "tsne", f"--out={tmp_path}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib; install them with: pip install 'mljax\[report\]'"):
        plots.scatter(np.zeros((2, 2)), np.zeros(2, int), ["a"], "t")


def test_a_folder_that_cannot_be_written(workdir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; give another --out"):
        call(workdir, "attention", "--count=1", f"--out={tmp_path}/file")


def test_most_flags_belong_to_one_figure():
    """Every figure's flags are understood beside the common ones."""
    for name, figure in command.FIGURES.items():
        parser = argparse.ArgumentParser()
        figure.flags(parser)
        assert vars(parser.parse_args([])), name
