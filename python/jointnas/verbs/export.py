"""`export`: the finished model of a run, elsewhere: as it is, or as a file for llama.cpp."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Literal

from jointnas import loading
from jointnas.checkpoint import replacing
from jointnas.config import ModelConfig
from jointnas.exporting import CHOICE_FILE
from jointnas.preparation import open_run
from jointnas.run_folder import final_folder, new
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import save_adapters
from jointnas_kernels.hf.gguf.write import write

log = logging.getLogger(__name__)
GGUF_FILE = "model.gguf"


def export(run: str, out: str, adapters: bool = False, format: Literal["hf", "gguf"] = "hf") -> Path:
    """Copies the finished model of a run folder (a plain transformers folder already), or writes it for llama.cpp.

    Args:
        run: run folder of a search; with format gguf also a model folder, such as `quantize` writes.
        out: new folder.
        adapters: also write OUT/adapters/NAME: what the search trained, as PEFT adapters (w2, w4, .. by weight
            precision) of the original model.
        format: hf, or gguf: OUT/model.gguf with the same integers and scales where llama.cpp has types for them.

    Raises:
        JointNASError: there is no finished model, `out` exists, or the model has no form in the format.
    """
    if format == "gguf":
        if adapters:
            raise JointNASError("export: adapters are written beside format hf only")
        return export_gguf(Path(run), new(out))
    final, folder = final_folder(Path(run)), new(out)
    supernet = open_run(run).supernet if adapters else None
    shutil.copytree(final, folder)
    if supernet is not None:
        save_adapters(supernet, folder / "adapters")
    return folder


def export_gguf(run: Path, out: Path) -> Path:
    """OUT/model.gguf of a run's finished model or of a model folder, with its card and its licence."""
    is_model = (run / "config.json").is_file()
    if not is_model and not (run / "config.yaml").is_file():
        raise JointNASError(f"{run} is neither a model folder (config.json) nor a run folder (config.yaml)")
    folder = run if is_model else final_folder(run)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise JointNASError(f"{folder} has no tokenizer, which a GGUF file must hold")
    source = ModelConfig(source=str(folder))
    licence, notices = loading.licence(source)
    record = json.loads((folder / CHOICE_FILE).read_text()) if (folder / CHOICE_FILE).is_file() else {}
    name = Path(record.get("base") or folder.resolve().name).name
    with replacing(out) as temporary:
        done = write(folder, temporary / GGUF_FILE, loading.load_tokenizer(source), name, licence)
        for file in notices:
            shutil.copy(file, temporary / file.name)
        kinds = sorted(set(done.types.values()))
        counts = [(kind, list(done.types.values()).count(kind)) for kind in kinds]
        size = (temporary / GGUF_FILE).stat().st_size
        lines = ["---", *([f"license: {licence}"] if licence else []), "---", "", f"# {name}, for llama.cpp", ""]
        lines += [f"`{GGUF_FILE}`, {size / 1e6:,.1f} MB: " + ", ".join(f"{n} × {kind}" for kind, n in counts) + "."]
        lines += [f"- {remark}" for remark in done.remarks]
        lines += [f"- {key}: {value}" for key, value in record.get("facts", {}).items()]
        (temporary / "README.md").write_text("\n".join(lines) + "\n")
    for remark in done.remarks:
        log.info("%s", remark)
    return out
