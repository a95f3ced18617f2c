"""`search`: the whole mission."""

from __future__ import annotations

from pathlib import Path

from jointnas import loading, parallel
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

    With `resume: auto` everything that is already in the folder is kept. Under torchrun, its processes train together.

    Args:
        config: the whole configuration.

    Raises:
        JointNASError: bad input, or a folder that already holds another search or cannot be made.
    """
    with parallel.session(config) as main:
        folder = Path(config.out)
        with parallel.main_first():
            writable(folder)
            loading.check_unquantized(loading.model_config(config.model), config.model)
            evaluated = (folder / "eval.json").is_file()
            tasks = None if evaluated else ready_tasks(config)
        searched, finished = parallel.from_main(
            lambda: [(folder / "choice.json").is_file(), (folder / "final").is_dir()]
        )
        run = prepare(config)
        if config.resume == "auto" and searched:
            load_supernet(run)
        else:
            optimise(run)
        if not finished:
            finish(run)
    if main:
        if not evaluated:
            evaluate_found(run, tasks)
        report(str(folder))
    return folder


def text(folder: Path) -> str:
    """What the command prints."""
    rows = text_table(read_json(folder / "eval.json"))
    ends = "\n".join(sentences(folder))
    return f"{rows}\n\n{ends}\n\nmodel: {folder / 'final'}\nreport: {folder / 'report.html'}"
