"""Where the file of published weights lies: here already, or downloaded once into the hub's usual cache."""

import errno
import hashlib
import logging
import os
from pathlib import Path

from mljax.errors import UserError
from mljax.untrusted import open_regular

log = logging.getLogger("mljax")

# File names that say nothing of what is in them: looked for under the record's name instead.
_GENERIC = ("model.safetensors", "pytorch_model.bin")


def local_names(name: str, file: str) -> tuple[str, ...]:
    """Under which names a record's file is looked for in $MLJAX_DATA/weights."""
    own = name + Path(file).suffix
    return (own,) if Path(file).name in _GENERIC else (Path(file).name, own)


def find(name: str, hub: str | None, file: str) -> Path | None:
    """The file of a record in $MLJAX_DATA/weights or the hub's cache; None if it is in neither. No network."""
    data = os.environ.get("MLJAX_DATA")
    for local in local_names(name, file) if data else ():
        path = Path(data or "").expanduser() / "weights" / local
        if path.is_file():
            return path
    if hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub, file)
    return Path(cached) if isinstance(cached, str) else None


def fetch(name: str, hub: str | None, file: str) -> Path:
    """The file of a record; downloaded, with progress, if it is not here.

    Raises:
      UserError: it is on no hub, or there is no network, no such file, or no space.
    """
    path = find(name, hub, file)
    if path is not None:
        return path
    place = f"put it into $MLJAX_DATA/weights as {local_names(name, file)[0]}, or give its path as the weights' name"
    if hub is None:
        raise UserError(f"The file {file} of the weights {name!r} is missing, and no hub has it; {place}.")
    from huggingface_hub import constants, errors, hf_hub_download

    log.warning("Downloading %s of %s, once.", file, hub)
    theirs = logging.getLogger("huggingface_hub")
    level = theirs.level
    theirs.setLevel(logging.ERROR)  # it logs each of its attempts
    try:
        return Path(hf_hub_download(hub, file))
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "there is no network, or the hub does not answer"
        advice = f"{'unset it, or ' if offline else ''}get the file elsewhere and {place}"
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError):
        reason, advice = "the hub does not have this file, or does not let you read it", place
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space" if full else str(error.strerror or type(error).__name__)
        advice = f"free space in {constants.HF_HUB_CACHE}, or set HF_HOME to another folder"
        advice = advice if error.errno else f"try again, or get the file elsewhere and {place}"
    except Exception as error:  # the client of the hub lets its HTTP library's errors through
        reason, advice = type(error).__name__, f"try again, or get the file elsewhere and {place}"
    finally:
        theirs.setLevel(level)
    raise UserError(f"{file} of {hub} (weights {name!r}) cannot be downloaded: {reason}; {advice}.") from None


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read ({error.strerror}); check the path.") from None


def check_digest(path: Path, expected: str | None, name: str) -> None:
    """UserError unless the file has the expected sha256.

    A wrong file in the hub's cache is removed, so that the next use downloads it again; no other file ever is.
    """
    if expected is None:
        return
    digest = sha256(path)
    if digest == expected:
        return
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE).resolve() in path.resolve().parents
    if cached:
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
    raise UserError(
        f"{path} is not the published file of {name!r}: its sha256 is {digest[:16]}.. and the record says"
        f" {expected[:16]}..; {'it was removed, run again to download it' if cached else 'get it again'}."
    )
