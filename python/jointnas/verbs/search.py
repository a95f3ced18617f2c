"""`search`: the whole mission."""

from __future__ import annotations

from pathlib import Path

from jointnas.bilevel import optimise
from jointnas.config import RunConfig
from jointnas.pipeline import evaluate_found, finish
from jointnas.preparation import prepare
from jointnas.results import text_table
from jointnas.run_folder import load_supernet, read_json
from jointnas.verbs.report import report
from jointnas_kernels.errors import writable


def search(config: RunConfig) -> Path:
    """Searches, prunes, distils, exports, evaluates and reports; returns the run folder.

    With `resume: auto` everything that is already in the folder is kept.

    Args:
        config: the whole configuration.

    Raises:
        JointNASError: bad input, or a folder that already holds another search or cannot be made.
    """
    writable(config.out)
    run = prepare(config)
    if config.resume == "auto" and (run.folder / "choice.json").is_file():
        load_supernet(run)
    else:
        optimise(run)
    if not (run.folder / "final").is_dir():
        finish(run)
    if not (run.folder / "eval.json").is_file():
        evaluate_found(run)
    report(str(run.folder))
    return run.folder


def text(folder: Path) -> str:
    """What the command prints."""
    rows = text_table(read_json(folder / "eval.json"))
    return f"{rows}\n\nmodel: {folder / 'final'}\nreport: {folder / 'report.html'}"
