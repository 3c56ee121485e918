"""The data of a stage against the record that its run keeps of them: nothing that changed is trained on unnoticed."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mljax import rundir
from mljax.data import fingerprint
from mljax.data.source import Source
from mljax.errors import UserError
from mljax.pipeline.images import ImageError, decode
from mljax.rundir import Change, DataRecord
from mljax.rundir.progress import Writer
from mljax.train.spec import StageSpec
from mljax.trees import flatten


@dataclasses.dataclass(frozen=True)
class Checked:
    """The splits of a stage, compared with the records that its run has of them.

    Attributes:
      spec: of the stage.
      sources: "train" and "eval" -> the split.
      records: "train" and "eval" -> (record, how it differs from the one that the run keeps).
    """

    spec: StageSpec
    sources: Mapping[str, Source]
    records: Mapping[str, tuple[DataRecord, Change]]

    def save(self) -> None:
        """Keep the records that are new, or whose changes were accepted.

        Without the images of a sample that cannot be decoded: repairing them is not a change that anybody must accept.
        """
        for kind, (record, change) in self.records.items():
            if not change.unsaved:
                continue
            if len(record.images) <= fingerprint.SAMPLE:
                source = self.sources[kind]
                with ThreadPoolExecutor(4) as pool:
                    good = pool.map(lambda row, source=source: readable(source, row), record.images)
                    images = {row: crc for (row, crc), fine in zip(record.images.items(), good) if fine}
                record = dataclasses.replace(record, images=images)
            rundir.save_data_record(self.spec.workdir, rundir.part_of(kind, self.spec.index), record, change)

    def check_tables(self, state: Any, name: str) -> None:
        """Refuse to go on with other rows where the state holds a row for each of them.

        Args:
          state: arrays or their shapes, {"params": .., "variables": ..}.
          name: of the training split.
        Raises:
          UserError: row i is another image than it was, and what was learnt of it would be taken for that image's.
        """
        record, change = self.records["train"]
        shape = len(record.ids), len(record.classes)
        table = next((path for path, leaf in flatten(state).items() if np.shape(leaf) == shape), None)
        if change.rows and table is not None:
            raise UserError(
                f"{name} has changed ({change.what}), and {table} holds what was learnt of each of its rows, so this"
                " change cannot be accepted; restore the rows, or choose another --workdir."
            )


def check_data(spec: StageSpec, train: Source, held_out: Source, writer: Writer) -> Checked:
    """Compare the splits of a stage with the run's records of them, and say what was accepted and what they share.

    A run that never came to train has no records yet, whatever lies there.

    Raises:
      UserError: they are not what they were; see `rundir.check_data_record`.
    """
    data, fresh, records = spec.config.data, rundir.untouched(spec.workdir), {}
    for kind, source in (("train", train), ("eval", held_out)):
        record = fingerprint.record(source, data.get("digest", "sampled"))
        change = Change(unsaved=True)
        if not fresh:
            accept = data.get("changed") == "accept"
            change = rundir.check_data_record(spec.workdir, rundir.part_of(kind, spec.index), record, accept=accept)
        if change.what:
            writer.line(f"{source.name} has changed since the run started, which was accepted: {change.what}")
        records[kind] = record, change
    named, alike = fingerprint.overlap(train, held_out, records["train"][0], records["eval"][0])
    if named + alike:
        compared = len(records["eval"][0].images)
        writer.line(
            f"{named + alike} images of {held_out.name} are in {train.name} too, so that scores are too high:"
            f" {named} by name, {alike} more by content, of {compared} that were compared"
        )
    return Checked(spec, {"train": train, "eval": held_out}, records)


def readable(source: Source, row: int) -> bool:
    """Whether training could use an image."""
    try:
        decode(source.read(row))
    except (ImageError, OSError):
        return False
    return True
