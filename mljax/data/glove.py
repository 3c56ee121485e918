"""Word vectors from text files in GloVe's format, a few words at a time, and the Stanford archive they come from."""

import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mljax.cache import atomic_write, cache_dir
from mljax.errors import UserError
from mljax.weights.torch_file import read_torch

URL = "https://downloads.cs.stanford.edu/nlp/data/glove.6B.zip"
SIZE = 862_182_613
SHA256 = "617afb2fe6cbd085c235baf7a465b96f4112bd7f7ccb2b2cbd649fed9cbcf2fb"
MEMBER = "glove.6B.300d.txt"


def read_words(path: Path, words: Iterable[str]) -> dict[str, np.ndarray]:
    """The vectors of some words from a text file: `word x1 .. xe` a line, as GloVe and word2vec write it.

    The file is read once, line by line; what was found is kept in the user's cache folder under the file's
    size and time and the words. A first line with two numbers (word2vec's header) is passed over. Words with
    spaces inside (GloVe 840B has some) are understood. Of a word that occurs twice the first vector counts.

    Args:
      path: the text file.
      words: what is looked for, spelled as in the file.
    Returns:
      {word: (e) float32}, without the words that the file does not have.
    Raises:
      UserError: the file is not in this format.
    """
    wanted = sorted(set(words))
    status = path.stat()
    key = "\n".join([str(status.st_size), str(status.st_mtime_ns), *wanted])
    cached = cache_dir() / "vectors" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    found = _load(cached)
    if found is None:
        found = _stream(path, wanted)
        _save(cached, found)
    return found


def read_rows(path: Path, count: int) -> np.ndarray:
    """Vectors without names, (count e) float32 in the order of the classes, from an .npy file.

    Raises:
      UserError: it cannot be read, or has another number of rows.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{str(path)!r} cannot be read as label vectors ({error}): give (l e) numbers.") from None
    if found.ndim != 2 or len(found) != count or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise UserError(f"{str(path)!r} has shape {found.shape} or no finite numbers, where {count} rows are expected.")
    return found.astype(np.float32)


def read_tensor(path: Path, count: int) -> np.ndarray:
    """Vectors without names from a PyTorch file of one tensor, (e count) as ML-Decoder's or (count e) -> (count e).

    Raises:
      UserError: it cannot be read, or has another number of vectors.
    """
    try:
        found = np.asarray(read_torch(path).array(), np.float32)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as label vectors ({error}): give one tensor.") from None
    if found.ndim != 2 or count not in found.shape or not np.isfinite(found).all():
        raise UserError(f"{str(path)!r} has shape {found.shape} or no finite numbers: {count} vectors are expected.")
    return found if len(found) == count else found.T


def _stream(path: Path, wanted: list[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    bytes_wanted = {word.encode(): word for word in wanted}
    heads = {word.split(b" ")[0] for word in bytes_wanted}
    with path.open("rb") as file:
        width = _width(path, [line for _, line in zip(range(20), file)])
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.partition(b" ")[0] not in heads:
                continue
            fields = line.split()
            word = bytes_wanted.get(b" ".join(fields[:-width]))
            if word is None or word in found:
                continue
            try:
                found[word] = np.array(fields[-width:], np.float32)
            except ValueError as error:
                raise UserError(
                    f"Line {number} of {str(path)!r} does not hold {width} numbers after {word!r}: the file is damaged."
                ) from error
    return found


def _width(path: Path, head: list[bytes]) -> int:
    """Numbers a line: the most frequent count among the first lines, whatever a header or spaced words have."""
    counts = [len(line.split()) - 1 for line in head]
    width = max(sorted(set(counts)), key=counts.count, default=0)
    if width < 2:
        raise UserError(f"{str(path)!r} is not a file of word vectors: a line should be a word and its numbers.")
    return width


def _load(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(map(str, file["words"]), file["vectors"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, found: dict[str, np.ndarray]) -> None:
    try:
        with atomic_write(path) as temporary:
            np.savez(temporary, words=np.array(list(found), dtype=np.str_), vectors=np.array(list(found.values())))
    except OSError:
        pass  # a cache that cannot be written only costs time


def fetch(folder: Path) -> Path:
    """Download GloVe 6B and unpack its 300-d file, once; an interrupted or damaged download leaves nothing
    behind.

    Args:
      folder: where `glove.6B.300d.txt` will lie.
    Returns:
      The text file.
    Raises:
      UserError: no network, no room, or not the archive that was expected; the sentence says what to put
      where.
    """
    target = folder / MEMBER
    if target.is_file():
        return target
    by_hand = f"put {MEMBER} (from {URL}) into {str(folder)!r}, or name a vectors file"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = Path(scratch) / "archive.zip"
            digest = _download(URL, archive, SIZE)
            if archive.stat().st_size != SIZE or digest != SHA256:
                raise UserError(f"What came from {URL} is not the GloVe archive (sha256 {digest[:12]}..): {by_hand}.")
            with zipfile.ZipFile(archive) as file:
                unpacked = file.extract(MEMBER, scratch)
            os.replace(unpacked, target)
    except (urllib.error.URLError, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"GloVe vectors could not be downloaded ({reason}): {by_hand}.") from error
    return target


def _download(url: str, path: Path, size: int) -> str:
    digest, done, shown = hashlib.sha256(), 0, -1
    with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
        while block := answer.read(1 << 20):
            file.write(block)
            digest.update(block)
            done += len(block)
            if (percent := 100 * done // size) // 5 > shown:
                shown = percent // 5
                print(f"GloVe 6B: {done / 1e6:.0f} of {size / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return digest.hexdigest()
