"""What the documents say exists: commands and their flags, config files, words and keys, functions, files, links; and
the notebook is the one that its source makes."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from mljax import build, sweep
from mljax.check import check
from mljax.config.base import base
from mljax.config.command import Parser
from mljax.config.flags import parse
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.config.sections import OPTIM
from mljax.config.stages import stage_configs
from mljax.errors import UserError
from mljax.pipeline import transforms

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "notebooks" / "tour.py"
LARGEST = 300_000


def percent_cells(text):
    """Percent format -> [("markdown" | "code", source)]."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        mark, _, body = part.partition("\n")
        if "[markdown]" in mark:
            cells.append(("markdown", re.sub(r"^# ?", "", body, flags=re.M).strip()))
        else:
            cells.append(("code", body.strip()))
    return cells


def notebook_cells():
    notebook = json.loads(TOUR.with_suffix(".ipynb").read_text())
    return [(cell["cell_type"], "".join(cell["source"]).strip(), cell) for cell in notebook["cells"]]


def documents():
    """Name -> text: what people read about mljax, docstrings of modules and configs included."""
    found = {}
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md"):
        found |= {str(p.relative_to(ROOT)): p.read_text() for p in sorted(ROOT.glob(pattern))}
    for pattern in ("mljax/**/*.py", "configs/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            found[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text())) or ""
    words = [body for kind, body in percent_cells(TOUR.read_text()) if kind == "markdown"]
    return found | {"notebooks/tour.py": "\n\n".join(words)}


DOCUMENTS = documents()
PAGES = [name for name in DOCUMENTS if name.endswith(".md") or name == "notebooks/tour.py"]


def commands(text):
    """[module, argument, ..] of every `python -m mljax.module ..`; what is optional is taken to be given."""
    for line in text.replace("\\\n", " ").splitlines():
        for match in re.finditer(r"python -m (mljax(?:\.\w+)+)", line):
            rest = line[match.end() :]
            if "`" in line[: match.start()]:
                rest = rest.partition("`")[0]
            yield [match[1], *shlex.split(re.sub(r"(?<= )\[([^]]*)\]", r"\1", rest), comments=True)]


COMMANDS = sorted({tuple(c) for text in DOCUMENTS.values() for c in commands(text)})


class Parsed(Exception):
    """The arguments were understood."""


def stopping(parse_args):
    """A command stops once its arguments are parsed."""

    def wrapped(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    return wrapped


def checked(argument, overrides):
    """A config by its argument and overrides, as a run would check it."""
    for stage in stage_configs(overridden(read_config(argument), overrides)):
        check(stage)


def test_documents_name_commands():
    assert {c[0] for c in COMMANDS} >= {"mljax.main", "mljax.evaluate", "mljax.predict", "mljax.sweep"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_is_understood(command, monkeypatch, tmp_path):
    name, *argv = command
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):  # a package is run by its __main__
        room = name.removeprefix("mljax.")
        for place in (f"mljax.{room}.command", f"mljax.commands.{room}"):
            if importlib.util.find_spec(place):
                module = importlib.import_module(place)
    if name == "mljax.main":
        flags = parse(argv)
        if "yours" not in flags.get("config", "yours"):
            checked(flags["config"], flags["overrides"])
        assert flags.get("list") or flags.get("help") or flags.get("workdir")
    elif name == "mljax.sweep":
        ran = []

        def run(job, workdir, extra, split=""):
            del workdir, split
            ran.append(job)
            checked(job.config, [*extra, *job.variant])
            report = {"metrics": {"mAP": 0.0, "CF1": 0.0, "OF1": 0.0}}
            return report, report

        monkeypatch.setattr(sweep, "run", run)
        argv = [f"--workdir={tmp_path}" if word.startswith("--workdir=") else word for word in argv]
        if argv:
            assert module.main(argv) == 0 and ran
    elif argv:
        for parser in (argparse.ArgumentParser, Parser):
            monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))
        with pytest.raises(Parsed):
            module.main(argv)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_configs_and_words_exist(page):
    for line in DOCUMENTS[page].splitlines():
        file = None
        for match in re.finditer(r"(configs/\w+\.py)(:[\w,=.]*\w)?|`(:[\w,=]+)`", line):
            file = match[1] or file
            if file and file != "configs/yours.py":
                read_config(file + (match[2] or match[3] or ""))


def keys_of(section):
    """What may be set in a section: its keys, and the keywords of whatever it can name."""
    kind = build.SECTIONS.get(section)
    constructors = list(build.names(kind).values()) if kind else []
    constructors += {"input.train": [transforms.train], "input.eval": [transforms.evaluate]}.get(section, [])
    shared = {"optim": OPTIM, "loss": ("name", "reduction")}.get(section, ("name",) if kind else ())
    return {key for constructor in constructors for key in build.keywords(constructor)} | set(shared)


def prose(page):
    """A page without the Python of CONTRIBUTING, which test_contracts runs: its system exists only there."""
    python = re.compile(r"```python\n.*?```", re.DOTALL)
    return python.sub("", DOCUMENTS[page]) if page == "CONTRIBUTING.md" else DOCUMENTS[page]


def assert_key(key):
    config = base()
    *path, last = key.split(".")
    section = config
    for name in path:
        assert name in section, f"config.{key}"
        section = section[name]
    assert last in section or last in keys_of(".".join(path)), f"config.{key}"


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_exist(page):
    text = prose(page)
    keys = set(re.findall(r"(?<![\w./])config\.(?!json|py\b)([a-z_]+(?:\.[a-z_0-9]+)*)", text))
    sections = "|".join(key for key, value in base().items() if hasattr(value, "keys"))
    keys |= set(re.findall(rf"(?<=[` ])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?==|`)", text))
    for key in sorted(keys):
        assert_key(key)
    for key, value in re.findall(r"--config\.([\w.]+)=([^\s`]*)", text):
        overridden(base(), [(key, value.rstrip(".,;"))])


@pytest.mark.parametrize("page", PAGES)
def test_functions_exist(page):
    for name in set(re.findall(r"\bmljax(?:\.[A-Za-z_]\w*)+", prose(page))):
        parts, found = name.split("."), None
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            break
        for part in parts[count:]:
            found = getattr(found, part)


def slugs(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *#*$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[page]):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (folder / file) if file else ROOT / page
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor and path.suffix == ".md":
            assert anchor in slugs(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_and_make_targets_exist(page):
    text = DOCUMENTS[page]
    for name in re.findall(r"`((?:mljax|configs|docs|tests|tools|benchmarks|notebooks|\.ci)/[\w./]+)", text):
        assert "yours" in name or (ROOT / name).exists(), name
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    for targets in re.findall(r"^    make ((?:[a-z]+ ?)+)", text, flags=re.M) + re.findall(r"`make ([a-z ]+)`", text):
        assert set(targets.split()) <= set(phony), targets


def test_notebook_is_the_one_of_its_source():
    """After a change of tour.py: python tools/run_notebook.py --write notebooks/tour.ipynb"""
    assert [(kind, source) for kind, source, _ in notebook_cells()] == percent_cells(TOUR.read_text())


def test_notebook_ran_to_its_end_and_is_small():
    assert TOUR.with_suffix(".ipynb").stat().st_size < LARGEST
    cells = [cell for kind, _, cell in notebook_cells() if kind == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        o for cell in cells for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


def test_wrong_words_would_be_found(tmp_path):
    with pytest.raises(UserError):
        checked("configs/cmsg.py", [("optim.epoch", "3")])
    with pytest.raises(UserError):
        checked("configs/cmsg.py:voc207", [])
    with pytest.raises(AssertionError):
        assert_key("system.sga_layer")
    assert slugs("# Two GPUs\n## `a_b`, c!") == {"two-gpus", "a_b-c"}
    text = "see `python -m mljax.sweep --a=1 \\\n  --b` and\n    python -m mljax.evaluate [--split=val] # why"
    assert list(commands(text)) == [["mljax.sweep", "--a=1", "--b"], ["mljax.evaluate", "--split=val"]]
