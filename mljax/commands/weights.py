"""List, show, convert and verify pretrained weights."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mljax.config.command import guarded
from mljax.config.flags import split_overrides
from mljax.errors import UserError, nearest
from mljax.trees import check, nest
from mljax.weights import hub
from mljax.weights.convert import convert, module_of, structure
from mljax.weights.files import read, write
from mljax.weights.identify import identify
from mljax.weights.loading import Weights, records, resolve


def _list(arch: str | None) -> int:
    if arch is not None:
        module_of(arch)
    table = [r for r in records().values() if arch in (None, r.arch)]
    width = max((len(r.name) for r in table), default=0)
    for r in table:
        here = "here" if hub.find(r.name, r.hub, r.file) else "-"
        print(f"{r.name:<{width}}  {r.size:>4}  {here:<4}  {r.licence:<28.28}  {r.hub or r.file}")
    return 0


def _record(name: str) -> Weights:
    table = records()
    if name not in table:
        raise UserError(f"There are no weights {name!r}{nearest(name, table)}.")
    return table[name]


def _show(name: str) -> int:
    record = _record(name)
    fields = {key: "-" if value is None else value for key, value in dataclasses.asdict(record).items()}
    place = hub.local_names(name, record.file)[0]
    later = "downloaded at first use" if record.hub else f"put it into $MLJAX_DATA/weights as {place}"
    fields["path"] = hub.find(name, record.hub, record.file) or f"not here; {later}"
    for key, value in fields.items():
        print(f"{key:<8} {value}")
    return 0


def _convert(
    files: list[str],
    arch: str | None,
    prefix: str,
    config: str | None,
    workdir: str | None,
    classes: str | None,
    overrides: Sequence[tuple[str, str]],
) -> int:
    """A backbone's file for mljax, or with --config and --workdir a system's checkpoint as a run directory."""
    if config or workdir:
        from mljax.release import command

        if not (config and workdir):
            raise UserError("A system's checkpoint needs both --config and --workdir.")
        return command(files, config, Path(workdir), classes, overrides)
    if overrides:
        raise UserError(f"--config.{overrides[0][0]} changes a system's config; name it with --config=FILE.")
    if len(files) != 2:
        raise UserError(f"convert takes FILE and OUT, not {len(files)} files; a system's checkpoint needs --config.")
    file, out = files
    path, target = Path(file).expanduser(), Path(out).expanduser()
    state = read(path, prefix=prefix)
    if arch is None:
        guess = identify(state)
        if not guess.archs:
            raise UserError(f"{file} seems to be {guess.label}; say with --arch which backbone it is for.")
        arch = guess.archs[0]
    record = resolve(file, arch)
    flat = convert(state, arch, path)
    kept = {**dataclasses.asdict(record), "path": None, "sha256": hub.sha256(path)}
    write(target, flat, {"record": kept})
    print(f"{target}: {len(flat)} arrays for the backbone {arch}, {target.stat().st_size / 1e6:.1f} MB")
    return 0


def _verify(name: str, file: str, prefix: str) -> int:
    record, path = _record(name), Path(file).expanduser()
    digest = hub.sha256(path)
    if record.sha256 is not None:
        hub.check_digest(path, record.sha256, name)
    tree = nest(convert(read(path, prefix=prefix), record.arch, path))
    own = structure(record.arch, record.size)
    for collection in ("params", "batch_stats"):
        check(own[collection], tree.get(collection, {}))
    known = "as the record says" if record.sha256 else "the record has none to compare"
    print(f"{path}: sha256 {digest} ({known}); names and shapes fit {record.arch}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mljax.weights", description="Pretrained weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="published weights: name, size, here or not, licence, hub")
    command.add_argument("arch", nargs="?", help="of this backbone alone")
    command = commands.add_parser("show", help="all that is known of one")
    command.add_argument("name")
    command = commands.add_parser(
        "convert", help="a backbone's file to a .safetensors or .npz, or a system's checkpoint to a run directory"
    )
    command.add_argument("files", nargs="+", help="FILE OUT for a backbone, or a system's FILES or their folder")
    command.add_argument("--arch", help="the backbone; default: what the file seems to be")
    command.add_argument("--config", help="of the system, e.g. configs/query2label.py:coco2014, and --config.KEY=VALUE")
    command.add_argument("--workdir", help="the run directory to write for --config")
    command.add_argument("--classes", help="a text file of label names in the checkpoint's order, one a line")
    command.add_argument("--prefix", default="", help="of the names to take")
    command = commands.add_parser("verify", help="is this file the published one, and does it fit its backbone?")
    command.add_argument("name")
    command.add_argument("file")
    command.add_argument("--prefix", default="", help="of the names to take")
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    flags = vars(parser.parse_args(words))
    if flags["command"] == "convert":
        flags["overrides"] = overrides
    elif overrides:
        raise UserError(f"--config.{overrides[0][0]} belongs to the command convert; leave it out.")
    run = {"list": _list, "show": _show, "convert": _convert, "verify": _verify}[flags.pop("command")]
    return run(**flags)


if __name__ == "__main__":
    sys.exit(guarded(main))
