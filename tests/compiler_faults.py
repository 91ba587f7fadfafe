"""Compiled kernels that a known fault of Triton or ptxas makes wrong; neither the source nor a race checker shows it.

    python tests/compiler_faults.py [CACHE]

looks at all of Triton's cache (by default the one in use), for instance after the GPU tests, for

- tensor core instructions that depend on a register that nothing wrote. ptxas 12.8, which Triton 3.6 carries, compiled
  one form of `modal_sums` so: the address of a product's operand was a uniform register that no instruction before it
  had set, so that the product read whatever lay there (benchmarks/NOTES-long_conv.md);
- products in a branch of a loop, whose tiles Triton 3.6's pipeline lets the copies for a later turn overwrite
  (benchmarks/NOTES-linear_attention.md).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

UNIFORM = re.compile(r"\bUR(\d+)\b")
WRITERS = ("U", "R2UR", "S2UR", "REDUX", "CREDUX", "LDCU", "VOTEU")


def instructions(sass: str) -> Iterator[tuple[str, str]]:
    """Opcode and operands, in the order of their addresses."""
    for line in sass.splitlines():
        found = re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*([^;]*);", line)
        if found:
            yield found.group(1), found.group(2)


def undefined(sass: str) -> list[str]:
    """Instructions that read a uniform register before any instruction in front of them writes it.

    Blocks are taken in the order of their addresses, in which ptxas puts a loop's entry before its body."""
    written: set[int] = set()
    found = []
    for opcode, operands in instructions(sass):
        parts = [part.strip() for part in operands.split(",")]
        writes = opcode.startswith(WRITERS) and re.fullmatch(r"UR\d+", parts[0]) is not None
        text = ",".join(parts[1:] if writes else parts)
        read = {int(number) for number in UNIFORM.findall(text)}
        for number in re.findall(r"gdesc\[UR(\d+)\]", text):
            # Operands of a product: A's address in the first two, unless A lies in registers, and B's in the others.
            first = int(number)
            in_registers = re.match(r"R\w+\s*,\s*R\d+", operands) is not None
            read |= set(range(first + 2, first + 4)) if in_registers else set(range(first, first + 4))
            if in_registers:
                read.discard(first)
        for number in re.findall(r"(?<!g)desc\[UR(\d+)\]", text):
            read |= {int(number), int(number) + 1}
        if read - written:
            names = ", ".join(f"UR{number}" for number in sorted(read - written))
            found.append(f"{opcode} {operands.strip()} reads {names}")
        if writes:
            first = int(parts[0][2:])
            wide = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
            written |= set(range(first, first + wide))
    return found


def branches_in_loops(ttgir: str) -> list[str]:
    """Lines of the branches that lie in a loop and hold a product for the tensor cores.

    Triton 3.6's pipeline lets the copies of a later turn overwrite the tiles that such a product still reads.
    """
    found, open_regions = [], []
    for line in ttgir.splitlines():
        text = line.strip()
        if "dot" in text.split("=", 1)[-1].split("%")[0]:
            inside = [kind for kind, _ in open_regions]
            if "scf.for" in inside and "scf.if" in inside[inside.index("scf.for") :]:
                found += [opened for kind, opened in open_regions if kind == "scf.if"][-1:]
        ends = text.startswith("}")
        if ends and open_regions:
            open_regions.pop()
        if text.endswith("{"):
            kind = next((kind for kind in ("scf.for", "scf.if") if kind in text), "")
            # "} else {" goes on with the branch that it ends
            open_regions.append(("scf.if" if ends and "else" in text else kind, text))
    return found


def sass_of(cubin: Path) -> str:
    """By the cuobjdump that Triton carries, or CUDA's own."""
    import triton

    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(carried) if carried.exists() else "cuobjdump"
    return subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout


def main(cache: Path) -> int:
    unset = branched = looked_at = 0
    for cubin in sorted(cache.rglob("*.cubin")):
        sass = sass_of(cubin)
        looked_at += "HGMMA" in sass
        for line in undefined(sass):
            unset += 1
            print(f"{cubin.parent.name}/{cubin.name}: {line}")
    for ttgir in sorted(cache.rglob("*.ttgir")):
        for line in branches_in_loops(ttgir.read_text(encoding="utf-8")):
            branched += 1
            print(f"{ttgir.parent.name}/{ttgir.name}: {line}")
    print(
        f"{looked_at} kernels with tensor core products on Hopper, {unset} instructions read what nothing wrote, "
        f"{branched} products lie in a branch of a loop"
    )
    return 1 if unset or branched else 0


if __name__ == "__main__":
    default = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else default).expanduser()))
