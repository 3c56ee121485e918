"""The COCO reader on a small tree in the real layout, and what it says of broken ones."""

import json

import numpy as np
import pytest
from PIL import Image

from mljax.data import _published_counts
from mljax.data.coco import CLASSES_BY_ID, coco
from mljax.errors import UserError

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
IDS = [i for i in range(1, 91) if i not in GAPS]


@pytest.fixture
def tree(tmp_path):
    """Three images; the second without instances; the third with a crowd and two of one class."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2014").mkdir()
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg"} for i in (9, 25, 30)]
    for image in images:
        Image.new("RGB", (8, 6)).save(folder / "train2014" / image["file_name"])
    cat, zebra, toothbrush = (IDS[CLASSES_BY_ID.index(n)] for n in ("cat", "zebra", "toothbrush"))
    instances = [(9, cat, 0), (30, zebra, 0), (30, zebra, 0), (30, toothbrush, 1)]
    content = {
        "images": images,
        "categories": [{"id": i, "name": n} for i, n in zip(IDS, CLASSES_BY_ID)][::-1],
        "annotations": [{"image_id": i, "category_id": c, "iscrowd": k} for i, c, k in instances],
    }
    path = folder / "annotations" / "instances_train2014.json"
    path.write_text(json.dumps(content))
    return tmp_path, path, content


def named(source, row):
    return {source.classes[i] for i in np.flatnonzero(source.labels[row])}


def test_ids_have_the_published_gaps_and_person_is_alphabetical_49():
    assert len(IDS) == 80 == len(set(CLASSES_BY_ID)) and IDS[CLASSES_BY_ID.index("toothbrush")] == 90
    assert sorted(CLASSES_BY_ID).index("person") == 49


@pytest.mark.parametrize("order", ["alphabetical", "id"])
def test_reads_annotated_images_with_crowds(tree, order):
    source = coco("train", root=str(tree[0]), order=order)
    assert len(source) == 2 and [named(source, i) for i in range(2)] == [{"cat"}, {"zebra", "toothbrush"}]
    assert source.classes[0] == ("airplane" if order == "alphabetical" else "person")
    assert source.ids[1] == "COCO_train2014_000000000030.jpg" and source[0]["image"][:2] == b"\xff\xd8"


def test_all_images_keep_those_without_instances(tree):
    source = coco("train", root=str(tree[0]), annotated_only=False)
    assert len(source) == 3 and not source.labels[1].any() and "all images" in source.name


def test_alphabetical_order_is_that_of_the_published_counts(real_data):
    with np.load(real_data / "labels" / "coco2014_val_labels.npz", allow_pickle=False) as arrays:
        key = next(k for k in arrays.files if "class" in k or ("name" in k and "file" not in k))
        assert tuple(map(str, arrays[key])) == tuple(sorted(CLASSES_BY_ID))


def test_broken_trees(tree, tmp_path):
    root, path, content = tree
    with pytest.raises(UserError, match="no coco/annotations/instances_val2014.json under"):
        coco("val", root=str(root))
    with pytest.raises(UserError, match="no split 'trian' .did you mean 'train'"):
        coco("trian", root=str(root))
    (path.parents[1] / "train2014" / content["images"][0]["file_name"]).unlink()
    with pytest.raises(UserError, match="1 are not there"):
        coco("train", root=str(root))
    path.write_text(json.dumps({**content, "categories": content["categories"][:3]}))
    with pytest.raises(UserError, match="has 3 categories, of which 3 are COCO's 80"):
        coco("train", root=str(root))
    for text in (json.dumps(content)[:-40], "[" * 1_000_000, '{"images":' * 100_000):  # also nested beyond measure
        path.write_text(text)
        with pytest.raises(UserError, match="is not a COCO instances file"):
            coco("train", root=str(root))


def test_2017(tree):
    """The same under the other year's names, whose files carry no prefix."""
    root, path, content = tree
    (root / "coco" / "val2017").mkdir()
    for image in content["images"]:
        image["file_name"] = f"{image['id']:012d}.jpg"
        Image.new("RGB", (8, 6)).save(root / "coco" / "val2017" / image["file_name"])
    (path.parent / "instances_val2017.json").write_text(json.dumps(content))
    source = coco("val", root=str(root), year="2017", annotated_only=False)
    assert source.name == "COCO2017 val (all images)" and source.ids[0] == "000000000009.jpg"
    assert [named(source, i) for i in range(3)] == [{"cat"}, set(), {"zebra", "toothbrush"}]


def rewritten(path, content, **changes):
    path.write_text(json.dumps({**content, **changes}))


def test_ids_and_names_that_do_not_fit(tree):
    root, path, content = tree
    swapped = [dict(c) for c in content["categories"]]
    swapped[0]["name"], swapped[1]["name"] = swapped[1]["name"], swapped[0]["name"]
    rewritten(path, content, categories=[{**c, "id": 91 - c["id"]} for c in content["categories"]])
    with pytest.raises(UserError, match="COCO's 80 names under other ids, 'toothbrush' first where 'person'"):
        coco("train", root=str(root))
    rewritten(path, content, categories=swapped)
    with pytest.raises(UserError, match="COCO's 80 names under other ids"):
        coco("train", root=str(root))
    rewritten(path, content, categories=[*content["categories"][:-1], content["categories"][0]])
    with pytest.raises(UserError, match="two categories with one name or id"):
        coco("train", root=str(root))
    annotation = content["annotations"][0]
    rewritten(path, content, annotations=[{**annotation, "image_id": 77}])
    with pytest.raises(UserError, match="annotates image 77, which it does not list"):
        coco("train", root=str(root))
    rewritten(path, content, annotations=[{**annotation, "category_id": 12}])
    with pytest.raises(UserError, match="annotates category 12, which it does not list"):
        coco("train", root=str(root))
    rewritten(path, content, images=[*content["images"], content["images"][0]])
    with pytest.raises(UserError, match="lists images under one id twice"):
        coco("train", root=str(root))


def test_val_labels_as_published(real_data, tmp_path):
    """The published validation labels have the published counts; as instances they are read back in both orders."""
    with np.load(real_data / "labels" / "coco2014_val_labels.npz", allow_pickle=False) as arrays:
        labels = np.unpackbits(arrays["labels"], axis=1)[:, :80]
        names, classes = arrays["file_names"].tolist(), arrays["classes"].tolist()
    assert labels.shape == (40137, 80) and labels.any(axis=1).all()
    assert dict(zip(classes, labels.sum(axis=0).tolist())) == _published_counts.counts("COCO2014 val")
    rows = np.arange(0, 40137, 400)
    folder = tmp_path / "annotations"
    folder.mkdir()
    (tmp_path / "val2014").mkdir()
    for row in rows:
        (tmp_path / "val2014" / names[row]).write_bytes(b"")
    instances = [
        {"image_id": int(row), "category_id": IDS[CLASSES_BY_ID.index(classes[column])], "iscrowd": 0}
        for row in rows
        for column in np.flatnonzero(labels[row])
    ]
    content = {
        "images": [{"id": int(row), "file_name": names[row]} for row in rows],
        "categories": [{"id": i, "name": n} for i, n in zip(IDS, CLASSES_BY_ID)],
        "annotations": instances,
    }
    (folder / "instances_val2014.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(coco("val", root=str(tmp_path)).labels, labels[rows])
    by_id = coco("val", root=str(tmp_path), order="id")
    np.testing.assert_array_equal(by_id.labels, labels[rows][:, [classes.index(n) for n in CLASSES_BY_ID]])
