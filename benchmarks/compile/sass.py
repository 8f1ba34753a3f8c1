"""Machine code of a compiled kernel: its loops, and the instructions of the hot one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")
_WIDE = 16  # bytes of the widest access that every target has


@dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    address: int
    guarded: bool
    name: str  # with modifiers: LDG.E.128
    operands: str

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that one thread moves, of an instruction that moves any."""
        for modifier in self.name.split(".")[1:]:
            if found := re.fullmatch(r"[US]?(8|16|32|64|128|256)", modifier):
                return int(found[1]) // 8
        return 4


def cuobjdump(cubin: bytes, *flags: str) -> str:
    """What the tool of Triton's wheel prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> list[Instruction]:
    """The instructions of a `cuobjdump -sass` listing, less the padding."""
    found = (_LINE.match(line) for line in listing.splitlines())
    made = [Instruction(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in found if m]
    return [i for i in made if i.base != "NOP"]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Natural loops, in order of address, without the loops inside them.

    A jump back is a loop only if its target dominates it. Compilers also place waits for a barrier
    out of line, behind the last EXIT, and jump back from there.
    """
    blocks = list(_blocks(code))
    after = _successors(blocks)
    dominators = _dominators(after)
    bodies: dict[int, set[int]] = {}
    for tail, heads in enumerate(after):
        for head in heads & dominators[tail]:
            bodies.setdefault(head, set()).update(_body(after, head, tail))
    made = []
    for head, body in sorted(bodies.items()):
        inner = set().union(*(b for h, b in bodies.items() if h != head and b < body))
        made.append([i for n in sorted(body - inner) for i in blocks[n]])
    return made


def hot(code: list[Instruction]) -> list[Instruction]:
    """The loop with most exponentials and logarithms, or the whole code where none has any.

    Of several with as many the first: a loop over whole tiles comes before one over the rest.
    """

    def special(part: list[Instruction]) -> int:
        return sum(i.base == "MUFU" and i.name[5:8] in ("EX2", "LG2") for i in part)

    best = max(loops(code), key=special, default=[])
    if special(best):
        return best
    products = {i for loop in product_loops(code) for i in loop}
    return [i for i in code if i not in products]


def product_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Loops over the inner size of a matrix product."""
    made = [loop for loop in loops(code) if any(i.base in _MATRIX for i in loop)]
    # A loop over tiles has the last steps of a pipeline in it, and the arithmetic of rows.
    return [loop for loop in made if not any(i.base == "MUFU" for i in loop)]


def count(code: list[Instruction]) -> dict[str, int]:
    """Instructions by class: memory by width, MUFU by function, the rest by name."""
    number: Counter[str] = Counter()
    for i in code:
        if i.base in ("LDG", "STG", "LDGSTS"):
            number[f"{i.base}.{8 * i.width}"] += 1
        elif i.base == "MUFU":
            number[".".join(i.name.split(".")[:2])] += 1
        else:
            number[i.base] += 1
    return dict(number.most_common())


def loaded(code: list[Instruction]) -> int:
    """Bytes that a thread reads from global memory."""
    return sum(i.width for i in code if i.base in ("LDG", "LDGSTS"))


def narrow(code: list[Instruction]) -> int:
    """Accesses of global memory that move less than 16 bytes."""
    return sum(i.base in ("LDG", "STG", "LDGSTS") and i.width < _WIDE for i in code)


def logarithms(code: list[Instruction]) -> int:
    """Calls of libdevice's logf: each turns an exponent into a float.

    So does a division of integers, rounding up.
    """
    return sum(i.base in ("I2FP", "I2F") and ".RP" not in i.name for i in code)


def waits(code: list[Instruction]) -> list[int]:
    """How many groups of wgmma stay in flight at each wait."""
    return [
        int(i.operands.rsplit("0x", 1)[1], 16)
        for i in code
        if i.name.startswith("WARPGROUP.DEPBAR")
    ]


def _blocks(code: list[Instruction]) -> Iterator[list[Instruction]]:
    starts = {i for i in (_target(x) for x in code) if i is not None}
    block: list[Instruction] = []
    for i in code:
        if block and (i.address in starts or _leaves(block[-1])):
            yield block
            block = []
        block.append(i)
    yield block


def _leaves(i: Instruction) -> bool:
    return i.base in ("BRA", "EXIT", "RET", "BRX", "CALL")


def _target(i: Instruction) -> int | None:
    found = re.search(r"0x([0-9a-f]+)", i.operands) if i.base in ("BRA", "CALL") else None
    return int(found[1], 16) if found else None


def _successors(blocks: list[list[Instruction]]) -> list[set[int]]:
    # Padding is gone, so that a jump may lead to the next instruction behind it.
    starts = [block[0].address for block in blocks]
    after = []
    for n, block in enumerate(blocks):
        last, follow = block[-1], set()
        target = _target(last)
        if target is not None:
            follow.update([n for n, start in enumerate(starts) if start >= target][:1])
        conditional = last.guarded or re.match(r"!?U?P\d", last.operands)
        ends = last.base in ("BRA", "EXIT", "RET") and not conditional
        if not ends and n + 1 < len(blocks):
            follow.add(n + 1)
        after.append(follow)
    return after


def _dominators(after: list[set[int]]) -> list[set[int]]:
    """For each block the blocks that every way to it passes, itself among them."""
    before: list[set[int]] = [set() for _ in after]
    for n, follow in enumerate(after):
        for m in follow:
            before[m].add(n)
    every = set(range(len(after)))
    found = [{0}, *(set(every) for _ in after[1:])]
    changed = True
    while changed:
        changed = False
        for n in range(1, len(after)):
            into = [found[m] for m in before[n]]
            now = {n} | (set.intersection(*into) if into else set())
            changed |= now != found[n]
            found[n] = now
    return found


def _body(after: list[set[int]], head: int, tail: int) -> set[int]:
    body, waiting = {head}, [tail]
    while waiting:
        n = waiting.pop()
        if n not in body:
            body.add(n)
            waiting += [m for m, follow in enumerate(after) if n in follow]
    return body
