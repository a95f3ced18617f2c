"""A small search on a file system that is too small, again and again: ``python -m tests.fuzz.disks --disks 100``.

The search of `kills` writes into a file system in memory (tmpfs) of random size, which is really full at some write.
Each time it must say so in one sentence, and leave no half of anything; then there is a little more room, and it goes
on. In the end every file is that of a search that had room from the beginning. Mounting needs root; where that is not
allowed, it says so and exits with 77.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from jointnas import checkpoint
from tests.fuzz.kills import Point, child, contents, ended, faults, left_over, search

SAID = "cannot be written: No space left on device"
NOT_ALLOWED = 77


def mounted(at: Path, size: int, again: bool = False) -> bool:
    """Gives a folder a file system of so many bytes, or a mounted one another size."""
    options = f"size={size},nr_inodes=4096" + (",remount" if again else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def campaign(root: Path, disks: int, seed: int) -> tuple[int, int, int, list[str]]:
    """Runs until so many disks were full: how many were, searches, starts, failures."""
    torch.set_num_threads(1)
    generator, messages, failures = random.Random(seed), root / "messages", []
    search(root / "whole")
    whole = contents(root / "whole")
    needed = sum(p.stat().st_size for p in (root / "whole").rglob("*") if p.is_file())
    full = searches = starts = 0
    while full < disks and not failures:
        at = root / "disk"
        at.mkdir()
        size = generator.randint(4096, needed)
        if not mounted(at, size):
            raise PermissionError("a file system cannot be mounted here")
        try:
            searches += 1
            while True:
                starts += 1
                code = ended(child(at / "run", Point(), messages))
                if code == 0:
                    break
                full, said = full + 1, messages.read_text().strip().splitlines()
                if not (said and said[-1].startswith("jointnas_kernels.errors.JointNASError") and SAID in said[-1]):
                    failures.append(f"size {size}, start {starts}: {code}: " + "\n".join(said[-12:]))
                    break
                kept = at / "run" / "checkpoints"
                damaged = [d for s in checkpoint.steps(kept) if (d := checkpoint.damage(kept / f"step-{s}"))]
                failures += [f"size {size}: {what}" for what in (*damaged, *left_over(at))]
                size += generator.randint(4096, needed // 3)
                mounted(at, size, again=True)
            if code == 0:
                failures += [f"size {size}: {name} differs" for name in faults(at / "run", whole)]
        finally:
            subprocess.run(["umount", str(at)], check=False)
        at.rmdir()
    return full, searches, starts, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.disks", description=__doc__)
    parser.add_argument("--disks", type=int, default=100, help="that are full")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    root, began = Path(tempfile.mkdtemp(prefix="disks-")), time.monotonic()
    try:
        full, searches, starts, failures = campaign(root, arguments.disks, arguments.seed)
    except PermissionError as error:
        print(error)
        return NOT_ALLOWED
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - began
    print(f"{full} full disks, {searches} searches, {starts} starts, {seconds:.0f} s: {len(failures)} failures")
    print("\n".join(failures[:20]))
    return min(1, len(failures))


if __name__ == "__main__":
    sys.exit(main())
