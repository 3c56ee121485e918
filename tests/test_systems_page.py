"""docs/systems.md has a row for every system and every experiment file, and what a row says is so."""

import importlib
import re

import pytest

import toy
from mljax import build
from mljax.config.reading import read_config

PAGE = (toy.ROOT / "docs" / "systems.md").read_text()
HEAD = ["system", "paper", "what it adds", "config, and settings worth a run", "exact?"]
SPOKEN_OF = {
    *("CMSG", "MulCon", "Query2Label", "ML-Decoder", "ML-GCN", "SSGRL", "ADD-GCN", "GATN", "C-Tran", "TDRG", "MCAR"),
    *("CSRA", "SST", "SARB", "ROLE"),
}


def rows():
    """[(cells of a row)] of the first table."""
    lines = PAGE[PAGE.index("| system |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if not line.startswith("|---")]


ROWS = rows()[1:]


def config_of(row):
    return re.search(r"`configs/(\w+)\.py", row[3])[1]


def test_every_row_fills_every_column():
    assert rows()[0][: len(HEAD)] == HEAD
    assert {len(row) for row in rows()} == {len(HEAD) + 1}
    assert all(cell for row in ROWS for cell in row)


def test_every_system_and_every_config_has_a_row():
    assert {re.search(r"`(\w+)`", row[0])[1] for row in ROWS} == set(build.names("systems"))
    assert sorted(config_of(row) for row in ROWS) == toy.CONFIGS
    assert {row[0].partition(",")[0] for row in ROWS} >= SPOKEN_OF | {"Baseline", "Single-positive losses"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_the_system_of_its_config_its_words_and_its_settings(row):
    file, name = f"configs/{config_of(row)}.py", re.search(r"`(\w+)`", row[0])[1]
    assert read_config(file).system.name == name
    for word in re.findall(r"[`y](:[\w,=.]+)`", row[3] + row[4]):
        assert read_config(file + word).system.name == name, word
    keywords = build.keywords(build.find("systems", name))
    for key in re.findall(r"`system\.(\w+)`", row[3]):
        assert key in keywords, key


def test_the_mark_of_released_files_is_where_they_are_read():
    for row in ROWS:
        constructor = build.find("systems", re.search(r"`(\w+)`", row[0])[1])
        module = importlib.import_module(constructor.__module__)
        assert row[0].endswith("†") == hasattr(module, "PUBLISHED"), row[0]
