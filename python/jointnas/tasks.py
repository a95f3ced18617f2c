"""Multiple-choice tasks by name, as lm-eval defines them: the embedded ones, the paper's seven, any other of lm-eval.

Their data comes from the hub, or from local files in the data set's own columns. `eval.task_files` is a folder with

    NAME/SPLIT.jsonl      or .parquet, or SPLIT-00000-of-00002.parquet, ..; the splits are those of lm-eval's definition
    NAME.jsonl            or .parquet: the split that is scored, where no few-shot examples are needed

for every NAME of a task, and nothing is fetched. A group such as mmlu has one such folder per subject (mmlu_anatomy,
..) or one for all, with the subject in the column `subject`, as cais/mmlu's "all" has it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jointnas import assets
from jointnas.config import EvalConfig
from jointnas_kernels.errors import JointNASError, unknown

EMBEDDED = ("continuation", "word", "order", "gloss")
CHANCE = 0.25  # every embedded task has four choices
# the paper's tasks: few-shot examples, and lm-eval's folder (reading all of its 14,000 definitions takes half a minute)
PAPER = {
    "winogrande": (5, "winogrande"), "hellaswag": (10, "hellaswag"), "arc_challenge": (25, "arc"),
    "mmlu": (5, "mmlu/default"), "boolq": (0, "super_glue/boolq"), "piqa": (0, "piqa"), "arc_easy": (0, "arc"),
}  # fmt: skip
SETS = {"embedded": EMBEDDED, "paper": tuple(PAPER)}
ENDINGS = (".jsonl", ".parquet")
Rows = list[dict[str, Any]]


@dataclass
class Tasks:
    """Tasks with their data, ready to be asked."""

    tasks: dict[str, Any] = field(default_factory=dict)  # lm-eval's objects by their names there
    groups: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)  # what is reported: the name of its result
    shots: dict[str, int] = field(default_factory=dict)  # by reported name
    longest: str = ""  # the longest prompt among the first of each task

    def members(self, name: str) -> list[str]:
        """Names of the tasks behind a reported name."""
        group = self.groups.get(self.rows[name])
        return [self.rows[name]] if group is None else [task.task_name for task in group.get_all_tasks()]


def load_tasks(config: EvalConfig) -> Tasks:
    """The configured tasks. Their data is read, or fetched, and the first prompt of each is made.

    Raises:
        JointNASError: an unknown task, a missing file, other columns than the task's, too few examples, a data set that
            cannot be fetched.
    """
    found = Tasks()
    names = list(dict.fromkeys(n for name in config.tasks for n in SETS.get(name, (name,))))
    if config.task_files is not None and not Path(config.task_files).is_dir():
        raise JointNASError(f"eval.task_files: folder {config.task_files!r} does not exist")
    if not names:
        return found
    if importlib.util.find_spec("lm_eval") is None:
        raise JointNASError("tasks need the `lm-eval` package: pip install lm-eval, or set eval.tasks to []")
    with quiet(), contextlib.ExitStack() as after:
        after.callback(read_rows.cache_clear)  # files may change, and are large
        manager = _manager([name for name in names if name not in EMBEDDED])
        for name in names:
            if name in EMBEDDED:
                _embedded(found, name)
            else:
                _catalogued(found, name, config, manager)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the log lines and progress bars of lm-eval and datasets; exceptions pass."""
    # their bars cannot be switched off after import
    with contextlib.ExitStack() as after, contextlib.redirect_stderr(io.StringIO()):
        for name in ("lm_eval", "lm-eval", "datasets"):
            logger = logging.getLogger(name)
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's catalogue, as much of it as is needed."""
    from lm_eval import tasks as catalogue  # optional, and slow to import

    if all(name in PAPER for name in names):
        root = Path(catalogue.__file__).parent
        folders = sorted({str(root / PAPER[name][1]) for name in names})
        return catalogue.TaskManager(include_defaults=False, include_path=folders or None)
    manager = catalogue.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise unknown("task", name, dict.fromkeys([*near, *SETS, *EMBEDDED, *PAPER]), where="eval.tasks")
    return manager


def _embedded(found: Tasks, name: str) -> None:
    """A task of this package: text, so it suits every tokenizer."""
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((assets.task_dir() / f"{name}.yaml").read_text())
    file = assets.task_dir() / config.pop("dataset_kwargs")["data_files"]["test"]
    config["custom_dataset"] = functools.partial(_dataset, {config["test_split"]: read_rows(file)})
    _add(found, name, {config["task"]: ConfigurableTask(config=config)}, 0)


def _catalogued(found: Tasks, name: str, config: EvalConfig, manager: Any) -> None:
    """A task or group of lm-eval's catalogue."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    shots = PAPER[name][0] if config.shots is None and name in PAPER else config.shots
    tasks: dict[str, Any] = {}
    for leaf, own in _leaves(name, manager.task_index):
        made = {**manager.task_index[leaf].cfg, **own}
        of = int(made.get("num_fewshot") or 0) if shots is None else shots
        override = {**own, "num_fewshot": of}
        if config.task_files is not None:
            override |= _local(leaf, name, made, of, Path(config.task_files))
        try:
            # a group is how lm-eval overrides parts of a definition
            task = manager.load({"group": "jointnas", "task": [{"task": leaf, **override}]})["tasks"][leaf]
            if config.task_files is not None:
                _check_answers(task)
        except Exception as error:  # definitions are programs: their exceptions have no common base
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if config.task_files is None:
                raise JointNASError(
                    f"task {leaf!r}: its data set {made.get('dataset_path')!r} cannot be loaded ({reason}); without "
                    "network, give its files: eval.task_files"
                ) from None
            held, where = override["custom_dataset"].args
            raise JointNASError(
                f"task {leaf!r}: the rows of {where}, with columns {', '.join(next(iter(held.values()))[0])}, are not "
                f"those of {made.get('dataset_path')!r} ({type(error).__name__}: {reason})"
            ) from None
        tasks[leaf] = task
    group = manager.task_index[name].cfg or {}
    if "aggregate_metric_list" in group:
        whole = Group.from_config(GroupConfig(group=name, aggregate_metric_list=group["aggregate_metric_list"]))
        for task in tasks.values():
            whole.add(task)
        found.groups[name] = whole
        _add(found, name, tasks, of)
    else:
        for leaf, task in tasks.items():
            _add(found, leaf, {leaf: task}, int(task.config.num_fewshot or 0))


def _add(found: Tasks, name: str, tasks: dict[str, Any], shots: int) -> None:
    """Records tasks under the name that is reported, after the first prompt of each was made."""
    for key, task in tasks.items():
        try:
            prompt = task.fewshot_context(task.eval_docs[0], shots)
        except (AssertionError, ValueError) as error:
            raise JointNASError(f"task {key!r}: too few examples for {shots} shots ({error})") from None
        found.longest = max(found.longest, str(prompt), key=len)
    found.tasks |= tasks
    found.rows[name] = name if name in found.groups else next(iter(tasks))
    found.shots[name] = shots


def _leaves(name: str, index: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, what its group overrides) of a task, tag or group, nested ones included."""
    entry = index[name]
    members = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task") if "group" in entry.cfg else None
    if members is None:
        yield name, {}
    for member in members or ():
        item = {"task": member} if isinstance(member, str) else dict(member)
        child = item.pop("task", None) or item.pop("group", None)
        if not isinstance(child, str) or child not in index:
            raise JointNASError(f"task group {name!r} defines its tasks in place; name them one by one")
        for leaf, own in _leaves(child, index):
            yield leaf, {**own, **item}


# ---- local files ----------------------------------------------------------------------------------------------------


def _local(leaf: str, name: str, config: dict[str, Any], shots: int, root: Path) -> dict[str, Any]:
    """What makes lm-eval's definition of a task read local files."""
    if "class" in config:
        raise JointNASError(f"task {leaf!r} is a program of lm-eval and takes no files; leave eval.task_files out")
    kinds = ("test_split", "validation_split", "training_split")
    scored = config.get("test_split") or config.get("validation_split") or config["training_split"]
    examples = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or scored
    own = any((root / f"{leaf}{end}").exists() for end in ("", *ENDINGS))
    where, subject = (leaf, None) if own or leaf == name else (name, config.get("dataset_name"))
    splits = {split: read_split(root, where, split, split == scored) for split in {scored, examples}}
    if splits[scored] is None or (shots > 0 and splits[examples] is None):
        missing = scored if splits[scored] is None else examples
        wanted = " or ".join(str(root / where / f"{missing}{end}") for end in ENDINGS)
        why = "the questions" if missing == scored else f"the {shots} few-shot examples"
        raise JointNASError(f"task {leaf!r}: {wanted} is missing ({why}: {config.get('dataset_path')})")
    held = {split: rows for split, rows in splits.items() if rows is not None}
    if subject is not None:
        held = {split: [r for r in rows if r.get("subject") == subject] for split, rows in held.items()}
    for split, rows in held.items():
        if not rows:
            of = "" if subject is None else f" with subject {subject!r}"
            raise JointNASError(f"task {leaf!r}: {root / where} has no rows{of} in its split {split!r}")
    override = {kind: config[kind] if config.get(kind) in held else None for kind in kinds}
    override["fewshot_split"] = config.get("fewshot_split") if config.get("fewshot_split") in held else None
    return {**override, "dataset_kwargs": None, "custom_dataset": functools.partial(_dataset, held, root / where)}


def _dataset(splits: dict[str, Rows], where: Path | None = None, **_: Any) -> dict[str, Any]:
    """What lm-eval takes for a data set; it passes its metadata, too."""
    import datasets  # optional

    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}


def read_split(root: Path, name: str, split: str, scored: bool) -> Rows | None:
    """Rows of one split of a task; None if it has no file."""
    files = [f for end in ENDINGS for f in sorted((root / name).glob(f"*{end}"))]
    files = [f for f in files if f.stem == split or f.stem.startswith(f"{split}-")]
    if not files and scored:
        files = [f for f in (root / f"{name}{end}" for end in ENDINGS) if f.is_file()]
    return [row for f in files for row in read_rows(f)] if files else None


@functools.lru_cache(maxsize=8)  # one file holds all subjects of mmlu
def read_rows(file: Path) -> Rows:
    """Rows of a JSON lines or Parquet file, all with the columns of the first.

    Raises:
        JointNASError: it cannot be read, or its rows differ in columns.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet  # optional: comes with datasets

        try:
            return list(pyarrow.parquet.read_table(file).to_pylist())
        except (OSError, ValueError) as error:
            raise JointNASError(f"{file} is no Parquet file ({' '.join(str(error).split())[:200]})") from None
    rows: Rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise JointNASError(f"{file} is not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise JointNASError(f"{file}:{number} is not JSON ({error})") from None
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            columns = ", ".join(rows[0]) if rows else "an object per line"
            raise JointNASError(f"{file}:{number} does not have the columns of the first line: {columns}")
        rows.append(row)
    return rows


def _check_answers(task: Any) -> None:
    """Raises where a question's answer is none of its choices: lm-eval would count it as wrong, silently."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(task.eval_docs):
        # tasks that fill several prompts have the answer's number where others have the prompt
        answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = task.doc_to_choice(doc)
        for one in answer if isinstance(answer, list) else [answer]:
            if not (one in choices if isinstance(one, str) else 0 <= one < len(choices)):
                raise ValueError(f"answer {one!r} of row {number} is none of its {len(choices)} choices")
