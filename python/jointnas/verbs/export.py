"""`export`: the finished model of a run, elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from jointnas.preparation import open_run
from jointnas.run_folder import final_folder, new
from jointnas_kernels.hf import save_adapters


def export(run: str, out: str, adapters: bool = False) -> Path:
    """Copies the finished model of a run folder (it is a plain transformers folder already).

    Args:
        run: run folder of a search.
        out: new folder.
        adapters: also write OUT/adapters/NAME: what the search trained, as PEFT adapters (w2, w4, .. by weight
            precision) of the original model.

    Raises:
        JointNASError: there is no finished model, or `out` exists.
    """
    final, folder = final_folder(Path(run)), new(out)
    supernet = open_run(run).supernet if adapters else None
    shutil.copytree(final, folder)
    if supernet is not None:
        save_adapters(supernet, folder / "adapters")
    return folder
