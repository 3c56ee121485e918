"""The compiled program as text, and what it reads, writes and copies."""

import dataclasses
import math
import re
from pathlib import Path

from mljax.errors import UserError

MOVES = ("copy", "transpose", "copy-start")
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "after-all")  # touch no memory
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)(?:e\dm\d\w*)?\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Move:
    """An instruction that copies or transposes.

    Attributes:
      name: of the instruction.
      shape: of its result, with its layout.
      size: bytes of its result.
      fused: whether it is part of a fusion that does other work on the same pass over memory.
      source: the operation of the model that it comes from.
    """

    name: str
    shape: str
    size: int
    fused: bool
    source: str


def size_of(shape: str, *, every: bool = False) -> int:
    """Bytes of the first array of a shape such as `bf16[8,224,224,3]{3,2,1,0}`, or of every array of a tuple."""
    total = 0
    for kind, lengths in _ARRAY.findall(shape)[: None if every else 1]:
        bits = {"pred": 8, "bf16": 16}.get(kind) or int(kind[1:])
        total += math.prod(int(length or 1) for length in lengths.split(",")) * bits // 8
    return total


def moves(text: str) -> list[Move]:
    """Copies and transposes of a compiled module's text, the largest first.

    A fusion counts once: as a move of its own if it does nothing but move (copies, transposes, changes of shape or
    type), as a fused one if it also computes. What is reshaped without being touched (`bitcast`) does not count.
    """
    table, computations = [], _computations(text)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text))
    for computation, lines in computations.items():
        if computation in fused:  # looked at where it is called
            continue
        for name, shape, op, rest in lines:
            source = match[1] if (match := re.search(r'op_name="([^"]*)"', rest)) else ""
            if op in MOVES:
                table.append(Move(name, shape, size_of(shape), False, source))
            inside = re.search(r"calls=%?([\w.\-]+)", rest) if op == "fusion" else None
            if inside and (ops := [line[2] for line in computations.get(inside[1], ())]) and {*MOVES} & {*ops}:
                other = {*ops} - {*MOVES, "parameter", "bitcast", "convert", "constant", "reshape"}
                table.append(Move(name, shape, size_of(shape), bool(other), source))
    return sorted(table, key=lambda move: -move.size)


def _computations(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """Name -> its instructions as (name, shape, operation, what follows)."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    lines: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            lines = computations[head[1]] = []
        elif match := _LINE.match(line):
            lines.append((match[1], match[2], match[3], match[4]))
    return computations


def traffic(text: str) -> int:
    """Bytes that a compiled module's operations read and write, operands and results, loops as often as they run.

    What a fusion keeps to itself does not count, nor does the scratch space of a library's kernel; what is read in part
    counts whole, and of a branch both sides.
    """
    computations = _computations(text)

    def bytes_of(computation: str) -> int:
        lines, total = computations.get(computation, []), 0
        sizes = {name: size_of(shape, every=op != "custom-call") for name, shape, op, _ in lines}  # then scratch
        for name, _, op, rest in lines:
            if op in ("while", "call", "conditional"):
                times = int(match[1]) if (match := re.search(r'known_trip_count":\{"n":"(\d+)"', rest)) else 1
                inner = re.findall(r"(?:body|to_apply|_computation)=%?([\w.\-]+)", rest)
                inner += re.findall(r"[\w.\-]+", "".join(re.findall(r"branch_computations=\{(.*?)\}", rest)))
                total += times * sum(bytes_of(each) for each in inner)
            elif op not in FREE:
                operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                total += sizes[name] + sum(sizes.get(each, 0) for each in operands)
        return total

    return bytes_of(match[1]) if (match := re.search(r"(?m)^ENTRY %?([\w.\-]+)", text)) else 0


def counts(table: list[Move]) -> dict[str, int]:
    """Numbers and bytes of moves, of their own and within other work."""
    numbers = {}
    for name, fused in (("alone", False), ("fused", True)):
        sizes = [m.size for m in table if m.fused == fused]
        numbers |= {name: len(sizes), f"{name}_bytes": sum(sizes)}
    return numbers | {"largest_bytes": table[0].size if table else 0}


def summary(numbers: dict[str, int]) -> str:
    """`counts` in words."""
    alone, fused, largest = (numbers[f"{name}_bytes"] / 1e6 for name in ("alone", "fused", "largest"))
    return (
        f"{numbers['alone']} copies and transposes of {alone:.1f} MB, {numbers['fused']} of {fused:.1f} MB within other"
        f" work, the largest of {largest:.1f} MB"
    )


def keep(text: str, table: list[Move], folder: str, part: str) -> None:
    """Write `PART.txt`, the program, and `PART_moves.txt`, its `moves`."""
    lines = [f"{m.size:>14,}  {'fused' if m.fused else 'alone'}  {m.name}  {m.shape}  {m.source}" for m in table]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{part}.txt").write_text(text)
        (Path(folder) / f"{part}_moves.txt").write_text("\n".join(["         bytes", *lines]) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another --hlo.") from None
