"""What a GPU machine need not make itself, made ahead on a CPU: the extension for its Python, packages, Triton's cache.

    python -m benchmarks.gpu_package build [--python python3.12] [--with pydantic jsonargparse ...] [--triton FOLDER]
                                                  [--ahead PYTHON]
    python -m benchmarks.gpu_package load [FILE]

``build`` writes build/gpu-package.tar.gz. The extension has neither torch headers nor libraries: all of it is compiled
for this Python already (with nvcc, else there is no CUDA part) but bindings.cpp, which is compiled again with the other
Python's headers. ``--with`` adds packages and what they need. ``--triton`` adds a cache of compiled kernels, e.g.
build/triton of a run there: Triton's keys hold a hash of Triton itself, so only a cache of the same version is of use.
``--ahead PYTHON`` fills one here (triton_ahead.py): PYTHON has the torch and the Triton of that machine.

``load`` unpacks it, unless it is stale: other sources, another Python, another platform. It says why, and builds the
extension instead, as it does where there is no package.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "build" / "gpu-package.tar.gz"
SITE = ROOT / "build" / f"site-{sys.implementation.cache_tag}"  # packages
CACHE = ROOT / "build" / "triton"  # compiled kernels
MANIFEST, MODULE = "manifest.json", "jointnas_kernels"
MOST = 64 << 20  # bytes of a package: what is copied to such a machine at once
ASK = """import json, sysconfig
print(json.dumps([sysconfig.get_paths()["include"], sysconfig.get_config_var("EXT_SUFFIX")]))"""


class Stale(Exception):
    """A package that does not belong here."""


def sources(root: Path = ROOT) -> str:
    """A hash of all that the extension is made of."""
    digest = hashlib.sha256()
    for path in [root / "setup.py", *sorted(p for p in (root / "csrc").rglob("*") if p.is_file())]:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- build ------------------------------------------------------------------------------------------------------------


def extension(python: str, build: Path) -> Path:
    """The extension for another Python: objects of this one's build, but for the bindings."""
    include, suffix = json.loads(subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True).stdout)
    if not (Path(include) / "Python.h").is_file():
        raise SystemExit(f"{python} has no headers: {include}/Python.h is missing")
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    target, tag = build / f"_C{suffix}", suffix.split(".")[1]
    text = other_python((build / "build.ninja").read_text(), include, tag, target)
    (build / f"{tag}.ninja").write_text(text)
    subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-f", f"{tag}.ninja"], cwd=build, check=True)
    return target


def other_python(text: str, include: str, tag: str, target: Path) -> str:
    """build.ninja as it is for headers elsewhere: other bindings, another target, all else the same."""
    own = re.search(r"^build (\S+): link ", text, re.MULTILINE)
    assert own is not None, "setup.py writes it"
    changes = {
        own[1]: str(target),
        sysconfig.get_paths()["include"]: include,
        "csrc_bindings.cpp.o": f"bindings.{tag}.o",
    }
    for old, new in changes.items():
        assert old in text, f"no {old} in build.ninja"
        text = text.replace(old, new)
    return text


def packages(names: list[str], python: str, folder: Path) -> None:
    """These packages and all they need (so that versions fit), as the other Python's pip takes them."""
    command = [python, "-m", "pip", "install", "-q", "--no-compile", "--only-binary=:all:"]
    subprocess.run([*command, "--target", str(folder), *names], check=True)


def compile_ahead(python: str, cache: Path, seconds: float) -> str:
    """Fills a Triton cache on this machine with the other one's Python; returns the version of its Triton. What is
    there stays: only other kernels are compiled."""
    ask = "import importlib.metadata as m; print(m.version('triton'))"
    version = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    fill = [python, "-m", "benchmarks.triton_ahead", "fill", "--cache", str(cache), "--seconds", str(seconds)]
    subprocess.run(fill, cwd=ROOT, check=True)
    return version


def build(args: argparse.Namespace) -> Path:
    if args.ahead:
        args.triton = ROOT / "build" / "triton-ahead"
        args.version = compile_ahead(args.ahead, args.triton, args.seconds)
    library = extension(args.python, ROOT / "build" / f"ninja-{sys.implementation.cache_tag}")
    manifest: dict[str, Any] = {"sources": sources(), "suffix": library.name.removeprefix("_C"), "triton": args.version}
    manifest["cuda"] = b"lowbit_stream" in library.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        if args.packages:
            packages(args.packages, args.python, site)
        pack(args.out, manifest, {f"{MODULE}/{library.name}": library, "site": site, "triton": args.triton})
    return args.out


def pack(out: Path, manifest: dict[str, Any], parts: dict[str, Path | None]) -> None:
    """The manifest and these files or folders, where they are there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:gz", compresslevel=6) as tar:
        entry, text = tarfile.TarInfo(MANIFEST), json.dumps(manifest).encode()
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
        for name, path in parts.items():
            if path is not None and path.exists():
                tar.add(path, name)
    size = out.stat().st_size
    print(f"{out}: {size / 2**20:.1f} MiB, {json.dumps(manifest)}")
    if size > MOST:
        out.unlink()
        raise SystemExit(f"{size / 2**20:.1f} MiB are more than the {MOST >> 20} that are copied at once; removed")


# --- load -------------------------------------------------------------------------------------------------------------


def load(file: Path, root: Path = ROOT) -> list[str]:
    """Puts the extension beside the package's sources, packages and cache into build/; returns what there is.

    Raises:
        Stale: it was made of other sources, or for another Python.
    """
    with tarfile.open(file) as tar:
        manifest = json.load(tar.extractfile(MANIFEST))  # type: ignore[arg-type]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if manifest["suffix"] != suffix:
            raise Stale(f"it is for {manifest['suffix']}, this Python takes {suffix}")
        if manifest["sources"] != sources(root):
            raise Stale("csrc/ or setup.py are others than it was built of")
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            tar.extractall(scratch, filter="data")
            there, found = Path(scratch), ["extension"]
            (there / MODULE / f"_C{suffix}").replace(root / MODULE / f"_C{suffix}")
            if (there / "site").is_dir():
                shutil.copytree(there / "site", root / "build" / SITE.name, dirs_exist_ok=True)
                found.append("packages")
            if (there / "triton").is_dir() and manifest["triton"] == triton_version():
                shutil.copytree(there / "triton", root / "build" / CACHE.name, dirs_exist_ok=True)
                relocate(root / "build" / CACHE.name)
                found.append("Triton's cache")
            elif (there / "triton").is_dir():
                print(f"its cache is of Triton {manifest['triton']}, here is {triton_version() or 'none'}: left out")
    return found


def relocate(cache: Path) -> None:
    """Groups of a Triton cache name their files by absolute paths; those become paths in this folder."""
    for group in cache.rglob("__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def check() -> str:
    """Loads the extension in a process of its own: whether it has a CUDA part, or why it does not load."""
    code = "from jointnas_kernels import _ext; print(_ext.load().has_cuda)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-300:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    builds = verbs.add_parser("build")
    builds.add_argument("--python", default="python3.12", help="the other machine's Python, with headers")
    builds.add_argument("--with", dest="packages", nargs="*", default=[], help="packages that are missing there")
    builds.add_argument("--triton", type=Path, help="folder of a Triton cache")
    builds.add_argument("--ahead", metavar="PYTHON", help="compile kernels here: a Python with that machine's Triton")
    builds.add_argument("--seconds", type=float, default=600.0, help="of a stage whose kernels are compiled, at most")
    builds.add_argument("--version", default=triton_version(), help="of the Triton that filled it")
    builds.add_argument("--out", type=Path, default=FILE)
    loads = verbs.add_parser("load")
    loads.add_argument("file", type=Path, nargs="?", default=FILE)
    args = parser.parse_args(argv)
    if args.verb == "build":
        build(args)
        return 0
    began, says = time.monotonic(), ""
    try:
        print(f"{args.file}: {', '.join(load(args.file))}")
        says = check()
        reason = "" if says == "True" else f"its extension has no CUDA part, or does not load: {says}"
    except (OSError, Stale, tarfile.TarError) as error:
        reason = str(error)
    if reason:
        print(f"{args.file} is not used: {reason}\nbuilding the extension", flush=True)
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
        says = check()
    print(f"extension with a CUDA part: {says} ({time.monotonic() - began:.1f} s)")
    return 0 if says == "True" else 1


if __name__ == "__main__":
    sys.exit(main())
