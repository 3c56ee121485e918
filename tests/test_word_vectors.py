"""Label vectors from files: how names are found, damaged files, the download, and the real vectors."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mljax.data import glove, word_vectors
from mljax.data.labels import key
from mljax.data.voc import CLASSES
from mljax.data.word_vectors import load_vectors
from mljax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLJAX_DATA", raising=False)
    monkeypatch.setattr(glove, "URL", "file:///nowhere/glove.6B.zip")
    return tmp_path / "cache"


def text_file(path: Path, words: dict[str, list[float]], header: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "".join(f"{word} {' '.join(map(str, values))}\n" for word, values in words.items()))
    return str(path)


WORDS = {
    "the": [9.0, 9, 9],
    ". . .": [8.0, 8, 8],
    "dog": [1.0, 2, 3],
    "hot": [3.0, 2, 1],
    "dining": [0.0, 1, 0],
    "table": [1.0, 0, 0],
    "tv": [4.0, 5, 6],
    "dog dish": [7.0, 7, 7],
    "cat": [0.5, -0.5, 0.25],
    "dog ": [6.0, 6, 6],
}


@pytest.mark.parametrize("header", ["", "10 3\n"])
def test_words_of_a_text_file(tmp_path: Path, header: str):
    source = text_file(tmp_path / "vectors.txt", WORDS, header)
    found = load_vectors(
        ["cat", "Dog", "hot dog", "hot-dog", "dining_table", "diningtable", "tvmonitor"], source=source
    )
    expected = [[0.5, -0.5, 0.25], [1, 2, 3], [2, 2, 2], [2, 2, 2], [0.5, 0.5, 0], [0.5, 0.5, 0], [4, 5, 6]]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    np.testing.assert_array_equal(load_vectors(["dog dish"], source=source), [[7, 7, 7]])


def test_what_was_read_is_cached_until_the_file_changes(tmp_path: Path, own_cache: Path, monkeypatch):
    source = text_file(tmp_path / "vectors.txt", WORDS)
    first = load_vectors(["dog", "cat"], source=source)
    assert len(list((own_cache / "vectors").glob("*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(glove, "_stream", lambda *_: pytest.fail("the file was read again"))
        np.testing.assert_array_equal(load_vectors(["dog", "cat"], source=source), first)
    text_file(tmp_path / "vectors.txt", WORDS | {"dog": [1.0, 2, 30]})
    assert load_vectors(["dog", "cat"], source=source)[0, 2] == 30
    for cached in (own_cache / "vectors").glob("*.npz"):
        cached.write_bytes(b"damaged")
    assert load_vectors(["dog", "cat"], source=source)[0, 2] == 30


def test_npz_is_matched_by_name(tmp_path: Path):
    np.savez(tmp_path / "v.npz", names=["tv", "Dining Table", "t-shirt", "airplane"], vectors=np.eye(4))
    found = load_vectors(["aeroplane", "T shirt", "diningtable", "tvmonitor"], source=str(tmp_path / "v.npz"))
    np.testing.assert_array_equal(found, np.eye(4)[[3, 2, 1, 0]])


def test_classes_without_a_vector(tmp_path: Path):
    source = text_file(tmp_path / "vectors.txt", WORDS)
    with pytest.raises(UserError, match=r"no vector for 'emu', 'hot emu': .*co-occurrence.*'none'"):
        load_vectors(["dog", "emu", "hot emu"], source=source)
    with pytest.raises(UserError, match="'x7' and 2 more"):
        load_vectors([f"x{i}" for i in range(10)], source=source)


def test_damaged_files(tmp_path: Path):
    def fails(name: str, message: str):
        with pytest.raises(UserError, match=message):
            load_vectors(["dog"], source=str(tmp_path / name))

    fails("absent.npz", "no file of label vectors")
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    fails("broken.npz", "cannot be read")
    np.savez(tmp_path / "keys.npz", words=["dog"], vectors=np.eye(1))
    fails("keys.npz", "cannot be read")
    np.savez(tmp_path / "shape.npz", names=["dog", "cat"], vectors=np.eye(3))
    fails("shape.npz", r"2 names and vectors of shape \(3, 3\)")
    np.savez(tmp_path / "nan.npz", names=["dog"], vectors=[[np.nan, 1.0]])
    fails("nan.npz", "not finite")
    text_file(tmp_path / "cut.txt", {"a": [1.0, 2, 3], "b": [1.0, 2, 3], "dog": [1.0, "x", 3]})  # type: ignore[list-item]
    fails("cut.txt", "Line 3 .* does not hold 3 numbers after 'dog'")
    (tmp_path / "prose.txt").write_text("one\n\n")
    fails("prose.txt", "not a file of word vectors")


def test_glove_is_looked_for_in_the_data_folder_then_fetched(tmp_path: Path, own_cache: Path, monkeypatch):
    root, own = tmp_path / "data", tmp_path / "data" / "label_embeddings"
    text_file(own / "glove.part.txt", WORDS)
    np.savez(own / "glove_pets.npz", names=["dog"], vectors=[[0.0, 0, 1]])
    np.testing.assert_array_equal(load_vectors(["dog"], root=root), [[0, 0, 1]])  # names of a set before single words
    np.testing.assert_array_equal(load_vectors(["dog", "tv"], root=root), [[1, 2, 3], [4, 5, 6]])
    monkeypatch.setenv("MLJAX_DATA", str(root))
    np.testing.assert_array_equal(load_vectors(["dog", "tv"]), [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(load_vectors(["tv"], source="glove.part.txt"), [[4, 5, 6]])
    with pytest.raises(
        UserError, match=r"glove.part.txt' has no vector for 'emu'.*could not be downloaded.*put glove.6B.300d"
    ):
        load_vectors(["dog", "tv", "emu"])
    text_file(own_cache / glove.MEMBER, WORDS | {"emu": [5.0, 5, 5]})
    np.testing.assert_array_equal(load_vectors(["dog", "emu"]), [[1, 2, 3], [5, 5, 5]])


def test_download(tmp_path: Path, own_cache: Path, monkeypatch, capsys):
    archive = tmp_path / "glove.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(glove.MEMBER, "dog 1 2 3\ncat 4 5 6\n")
        file.writestr("glove.6B.50d.txt", "dog 1\n")
    monkeypatch.setattr(glove, "URL", archive.as_uri())
    with pytest.raises(UserError, match="is not the GloVe archive"):
        glove.fetch(own_cache)
    assert list(own_cache.iterdir()) == []  # nothing half-done stays
    monkeypatch.setattr(glove, "SIZE", archive.stat().st_size)
    monkeypatch.setattr(glove, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    path = glove.fetch(own_cache)
    assert path.read_text() == "dog 1 2 3\ncat 4 5 6\n" and list(own_cache.iterdir()) == [path]
    archive.unlink()
    assert glove.fetch(own_cache) == path
    np.testing.assert_array_equal(load_vectors(["cat"]), [[4, 5, 6]])
    assert "GloVe 6B" in capsys.readouterr().err


def test_without_network_the_error_says_what_to_put_where(own_cache: Path):
    with pytest.raises(UserError, match=r"could not be downloaded .*put glove.6B.300d.txt .* into '.*cache'"):
        load_vectors(["dog"])


def test_synonyms_are_words_under_normal_keys():
    for name, words in word_vectors.SYNONYMS.items():
        assert key(name) == name and words and all(word == word.lower() and " " not in word for word in words)


def test_vectors_without_names_go_by_their_order(tmp_path):
    path = tmp_path / "vg_200_vector.npy"
    np.save(path, np.arange(6.0).reshape(3, 2))
    found = load_vectors(["x", "y", "z"], source=str(path))
    assert found.dtype == np.float32 and found.tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match=r"has shape \(3, 2\).*where 2 rows are expected"):
        load_vectors(["x", "y"], source=str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as label vectors"):
        load_vectors(["x"], source=str(path))


# --- real vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["voc", "coco", "nuswide"])
def test_real_vectors(real_data: Path, name: str):
    path = real_data / "label_embeddings" / f"glove300_{name}.npz"
    with np.load(path) as file:
        names, vectors = [str(n) for n in file["names"]], file["vectors"]
    if name == "voc":
        assert names == list(CLASSES)
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = [names[i].upper().replace(" ", "_") for i in order]
    for source in (str(path), "glove"):
        np.testing.assert_array_equal(load_vectors(shuffled, source=source, root=real_data), vectors[order])


def test_text_and_npz_agree(real_data: Path):
    """Names of one word have the same vector in the text as in the .npz; COCO's 15 of two words are not in it."""
    source, single = "glove.subset.300d.txt", 0
    for name in ("voc", "coco", "nuswide"):
        with np.load(real_data / "label_embeddings" / f"glove300_{name}.npz") as file:
            table = {str(n): vector for n, vector in zip(file["names"], file["vectors"]) if " " not in str(n)}
        np.testing.assert_array_equal(
            load_vectors(list(table), source=source, root=real_data), np.stack(list(table.values()))
        )
        single += len(table)
    assert single == 20 + 65 + 81
