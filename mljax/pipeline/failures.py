"""Training images that cannot be read: counted over the whole run, each named once, and listed in a file."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

from mljax.errors import UserError, printable
from mljax.rundir.files import write_text

HEAD = "row\timage\treason\n"
log = logging.getLogger("mljax")


@dataclasses.dataclass
class Failures:
    """Unreadable training images, which batches carry with mask 0; too many of them end the run.

    Attributes:
      total, allowed: images, and which share of them may be unreadable.
      bad: row -> (name, why).
      listed: the file of `write`, for the error.
      earlier: (row, name, why) of images that the run met before and that do not count: repaired, or of other data.
      shared: a file in which worker processes tell each other, so that the limit is that of the run.
    """

    total: int
    allowed: float = 0.01
    bad: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
    shared: Path | None = None
    listed: Path | None = None
    earlier: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)

    def add(self, row: int, name: str, why: str) -> None:
        """Count an image.

        Raises:
          UserError: there are more than allowed.
        """
        if row in self.bad:
            return
        self.bad[row] = name, why
        log.warning("unreadable image %d, left out: %s", len(self.bad), printable(why))
        if self.shared is not None:
            with self.shared.open("a") as file:  # one write of a line, which others' do not tear
                file.write(json.dumps([row, name, why]) + "\n")
            self.collect()
        if len(self.bad) > max(1, self.allowed * self.total):
            names = ", ".join(printable(name) for name, _ in list(self.bad.values())[:5])
            raise UserError(
                f"{len(self.bad)} of {self.total} training images cannot be read, more than {self.allowed:.0%};"
                f" the first: {names}. Repair or remove them{f'; {self.listed} lists all' if self.listed else ''}."
            )

    def collect(self) -> None:
        """Take over what worker processes have told each other."""
        if self.shared is not None and self.shared.is_file():
            told = map(json.loads, self.shared.read_text().splitlines())
            self.bad = {row: (name, why) for row, name, why in told} | self.bad

    def write(self, path: Path) -> None:
        """Write the list, a line for each image; nothing if all can be read."""
        if rows := self.rows():
            lines = [f"{row}\t{printable(name)}\t{printable(why)}\n" for row, name, why in rows]
            write_text(path, HEAD + "".join(lines))

    def rows(self) -> list[tuple[int, str, str]]:
        """(row, name, why) of all images that the run met, each once."""
        self.collect()
        met = {(row, printable(name)): why for row, name, why in self.earlier}
        met |= {(row, printable(name)): why for row, (name, why) in self.bad.items()}
        return [(row, name, why) for (row, name), why in sorted(met.items())]

    def read(self, path: Path, counts: Callable[[int, str], bool] = lambda row, name: True) -> None:
        """Take over the list of a run that goes on, so that its images count and are not named again.

        Args:
          counts: (row, name) -> whether that image still cannot be read; what can is only listed.
        Raises:
          UserError: it is not such a list.
        """
        if not path.is_file():
            return
        try:
            lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
            rows = [(int(row), name, why) for row, name, why in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a list of unreadable images ({error}); remove it.") from None
        still = [counts(row, name) for row, name, _ in rows]
        self.bad = {row: (name, why) for (row, name, why), bad in zip(rows, still) if bad} | self.bad
        self.earlier += [entry for entry, bad in zip(rows, still) if not bad]
