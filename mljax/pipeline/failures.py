"""Training images that cannot be read: counted over the whole run, each named once, and listed in a file."""

import dataclasses
import json
import logging
from pathlib import Path

from mljax.cache import atomic_write
from mljax.errors import UserError, printable

HEAD = "row\timage\treason\n"
log = logging.getLogger("mljax")


@dataclasses.dataclass
class Failures:
    """Unreadable training images, which batches carry with mask 0; too many of them end the run.

    Attributes:
      total, allowed: images, and which share of them may be unreadable.
      bad: row -> (name, why).
      shared: a file in which worker processes tell each other, so that the limit is that of the run.
    """

    total: int
    allowed: float = 0.01
    bad: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
    shared: Path | None = None

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
                f" the first: {names}. Repair or remove them."
            )

    def collect(self) -> None:
        """Take over what worker processes have told each other."""
        if self.shared is not None and self.shared.is_file():
            told = map(json.loads, self.shared.read_text().splitlines())
            self.bad = {row: (name, why) for row, name, why in told} | self.bad

    def write(self, path: Path) -> None:
        """Write the list, a line for each image; nothing if all can be read."""
        self.collect()
        if self.bad:
            lines = [f"{row}\t{printable(name)}\t{printable(why)}\n" for row, (name, why) in sorted(self.bad.items())]
            with atomic_write(path) as temporary:
                temporary.write_text(HEAD + "".join(lines))

    def read(self, path: Path) -> None:
        """Take over the list of a run that goes on, so that its images count and are not named again.

        Raises:
          UserError: it is not such a list.
        """
        if not path.is_file():
            return
        try:
            lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
            self.bad = {int(row): (name, why) for row, name, why in lines} | self.bad
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a list of unreadable images ({error}); remove it.") from None
