"""`search`: the whole mission."""

from __future__ import annotations

from pathlib import Path

from jointnas import loading
from jointnas.bilevel import optimise
from jointnas.config import RunConfig
from jointnas.convergence import sentences
from jointnas.pipeline import evaluate_found, finish, ready_tasks
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
    loading.check_unquantized(loading.model_config(config.model), config.model)
    evaluated = (Path(config.out) / "eval.json").is_file()
    tasks = None if evaluated else ready_tasks(config)
    run = prepare(config)
    if config.resume == "auto" and (run.folder / "choice.json").is_file():
        load_supernet(run)
    else:
        optimise(run)
    if not (run.folder / "final").is_dir():
        finish(run)
    if not evaluated:
        evaluate_found(run, tasks)
    report(str(run.folder))
    return run.folder


def text(folder: Path) -> str:
    """What the command prints."""
    rows = text_table(read_json(folder / "eval.json"))
    ends = "\n".join(sentences(folder))
    return f"{rows}\n\n{ends}\n\nmodel: {folder / 'final'}\nreport: {folder / 'report.html'}"
