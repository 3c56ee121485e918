"""Run a notebook from its first cell to its last, in a new kernel and an empty folder.

    python tools/run_notebook.py notebooks/tour.ipynb    # status 1 and the cell on stderr at an error
    python tools/run_notebook.py --write notebooks/tour.ipynb  # made again from notebooks/tour.py, with outputs

The .py beside a notebook (jupytext's percent format) is where people edit.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

LARGEST = 300_000  # bytes of a notebook that is kept
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook from .ipynb or from percent format, without outputs, the same for the same cells."""
    notebook = nbformat.read(path, 4) if path.suffix == ".ipynb" else jupytext.read(path)
    cells = []
    for i, cell in enumerate(notebook.cells):
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(cell.source, id=f"cell-{i}"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(notebook: nbformat.NotebookNode, folder: Path, seconds: float) -> None:
    """Fill in the outputs, in place.

    Args:
      folder: empty; the kernel's working and temporary directory, and the home of IPython's settings.
      seconds: for all cells together.
    Raises:
      CellExecutionError, CellTimeoutError, DeadKernelError: what went wrong, with the cell.
    """
    end = time.monotonic() + seconds
    changes = {"TMPDIR": str(folder), "IPYTHONDIR": str(folder / "ipython"), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this Python, not one of the user's
    os.environ["JUPYTER_RUNTIME_DIR"] = str(folder)
    client = NotebookClient(
        notebook, timeout_func=lambda _: max(1, int(end - time.monotonic())), kernel_name="python3",
        record_timing=False, extra_arguments=["--log-level=40"], resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env={**os.environ, **changes})


def tidy(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Outputs as they are kept: one format for each picture, no folders of this machine."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace(str(folder), "/tmp")
            data = output.get("data", {})
            pictures = sorted((kind for kind in PICTURES if kind in data), key=lambda kind: len(data[kind]))
            for kind in pictures[1:]:
                del data[kind]
            if pictures:
                data.pop("text/plain", None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="a notebook: .ipynb, or .py in percent format")
    parser.add_argument(
        "--write", action="store_true", help="keep the cells of the .py and their outputs in the .ipynb"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the whole notebook")
    args = parser.parse_args(argv)
    source = args.file.with_suffix(".py") if args.write else args.file
    if not source.is_file():
        print(f"There is no notebook {source}.", file=sys.stderr)
        return 2
    notebook, began = read(source), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        try:
            execute(notebook, Path(folder), args.timeout)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{source}: {type(error).__name__}\n{error}", file=sys.stderr)
            return 1
        tidy(notebook, Path(folder))
    print(f"{source}: {len(notebook.cells)} cells in {time.monotonic() - began:.0f} s")
    if args.write:
        text = nbformat.writes(notebook) + "\n"
        args.file.with_suffix(".ipynb").write_text(text)
        if len(text) > LARGEST:
            print(f"It has {len(text)} bytes, more than {LARGEST}: make its pictures smaller.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
