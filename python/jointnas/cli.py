"""The `jointnas` command. Every verb is a function of the package; bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import inspect
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jointnas
from jointnas_kernels import __version__
from jointnas_kernels.errors import JointNASError, refusal, unknown

VERBS = {
    "doctor": "environment, and which latency backends work here",
    "demo": "the whole mission on the embedded model, in minutes",
    "bench": "benchmarks of the kernels (bench --help)",
    "profile": "measure the latency table of this machine",
    "table measure": "the same as profile",
    "table show": "what of a space a table holds and lacks",
    "table merge": "tables of one device and workload as one",
    "table diff": "what changed from one table to another",
    "table fill": "interpolate sizes between measured ones",
    "table draw": "speed-ups over 16 bit, as a picture",
    "tune": "measure which low-bit kernel plans are the fastest on this GPU",
    "fetch": "a small public model to work with: smollm2",
    "search": "search, prune, distil, export, evaluate, report",
    "quantize": "quantize a model after training, at one precision, and export it",
    "finetune": "distil the found choice of a run again",
    "export": "copy the finished model of a run, or write it for llama.cpp",
    "generate": "text from a model, and how fast it comes",
    "eval": "perplexity and tasks of a model, or of a run's models",
    "report": "draw a run, or a comparison, as plots and report.html",
    "compare": "the joint search against sequential pipelines and other baselines, at one budget",
}
PARALLEL = ("search", "finetune")  # verbs that torchrun's processes work on together
CONFIGURED = ("search", "compare")  # verbs that take a whole configuration
SHORT = {"--space": "--space.base", "--metric": "--latency.metric", "--processes": "--compare.processes"}
FLAGS = ("--resume", "--force", "--adapters", "--dry_run")  # may stand without a value
SECTION_FILES = (".yaml", ".yml", ".json")  # what may stand for a whole section
# arguments that need no option's name: how many, and what they are
POSITIONAL: dict[str, tuple[str | None, str]] = {
    **dict.fromkeys(("table", "first", "second"), (None, "latency table file")),
    "tables": ("+", "latency table files"), "name": (None, "model of the catalogue"),
    "source": (None, "run folder, model folder, .gguf file, hub name or 'embedded'"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code: 0, 2 for bad input, 130 after Ctrl-C, 141 after a closed pipe."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except JointNASError as error:
        print(f"jointnas: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing more can be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # of what is not written through `writing`: pictures, rows of other libraries
        if (reason := refusal(error)) is None:
            raise
        print(f"jointnas: error: {error.filename or 'a result'} cannot be written: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jointnas: interrupted", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    group = "table " if arguments[:1] == ["table"] else ""
    name, *rest = arguments[len(group.split()) :] or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: jointnas {group}VERB [options]     jointnas {group}VERB --help\n")
        print("\n".join(f"  {verb:<15} {text}" for verb, text in VERBS.items() if verb.startswith(group)))
        return 0
    if name in ("-V", "--version"):
        print(f"jointnas {__version__}")
        return 0
    verb = group + name
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    if verb == "bench":
        return int(function_of(verb)(rest))
    values = parse(verb, rest)
    if values is not None:
        run_verb(verb, values)
    return 0


def function_of(verb: str) -> Callable[..., Any]:
    """The function behind a verb."""
    where: Any = jointnas
    for name in verb.split():
        where = getattr(where, {"eval": "evaluate"}.get(name, name))
    function: Callable[..., Any] = where
    return function


def run_verb(verb: str, values: dict[str, Any]) -> None:
    """Calls a verb's function and prints what it returns, as its module's `text` says it."""
    from transformers.utils.logging import disable_progress_bar

    from jointnas.config import build

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and verb not in PARALLEL:
        raise JointNASError(
            f"{verb} is the work of one process, and torchrun started {ranks}; they share that of {', '.join(PARALLEL)}"
        )
    disable_progress_bar()  # one bar at a time: ours
    function = function_of(verb)
    on, gpus = (values.pop(name, None) for name in ("on", "gpus"))
    if values.pop("dry_run", False):
        plan = jointnas.dry_run(build(schema_of(verb), values), on or "here", 1 if gpus is None else gpus)
        print(sys.modules[jointnas.dry_run.__module__].text(plan))
        if not plan.fits:
            raise JointNASError("the search was planned, and does not fit (see above)")
        return
    for name, value in (("on", on), ("gpus", gpus)):
        if value is not None:
            raise JointNASError(f"search: --{name} is an option of a --dry-run")
    result = function(build(schema_of(verb), values)) if verb in CONFIGURED else function(**values)
    if ranks == 1 or os.environ.get("RANK") == "0":
        print(getattr(sys.modules[function.__module__], "text", str)(result))


def schema_of(verb: str) -> Any:
    """The configuration that a verb takes as a whole."""
    from jointnas.compare_config import CompareConfig
    from jointnas.config import RunConfig

    return CompareConfig if verb == "compare" else RunConfig


def parser_of(verb: str) -> Any:
    """The jsonargparse parser of one verb, made from its function's signature."""
    import jsonargparse

    function = function_of(verb)
    parser = jsonargparse.ArgumentParser(prog=f"jointnas {verb}", description=VERBS[verb], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; flags after it override it")
    if verb in CONFIGURED:
        parser.add_class_arguments(schema_of(verb), as_group=False)
        if verb == "search":
            what = "print what the search would need, and whether that fits, and end"
            parser.add_argument("--dry_run", type=bool, default=argparse.SUPPRESS, help=what)
            what = "the device of a dry run: a100, h100, h200 or rtx-4090; default: this machine's"
            parser.add_argument("--on", type=str, default=argparse.SUPPRESS, help=what)
            what = "how many of them in a dry run, which share the work as parallel.mode says"
            parser.add_argument("--gpus", type=int, default=argparse.SUPPRESS, help=what)
        return parser
    names = [name for name in POSITIONAL if name in inspect.signature(function).parameters]
    for name in names:
        nargs, what = POSITIONAL[name]
        parser.add_argument(name, type=str, nargs=nargs, help=what)
    parser.add_function_arguments(function, as_group=False, skip=set(names))
    described = descriptions(function)
    for action in parser._actions:
        if action.dest in described and not action.help:
            action.help = described[action.dest]
    return parser


def descriptions(function: Callable[..., Any]) -> dict[str, str]:
    """What a function's docstring says of its parameters."""
    part = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", part, re.M)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in found}


def parse(verb: str, arguments: list[str]) -> dict[str, Any] | None:
    """Values of a verb's arguments; None if --help or --print_config was all that was asked for."""
    parser = parser_of(verb)
    arguments = normalise(arguments, "auto" if verb in CONFIGURED else "true")
    check_options(parser, verb, arguments)
    try:
        namespace = parser.parse_args(arguments)
    except SystemExit as stop:  # --help and --print_config
        if stop.code:
            raise JointNASError(f"{verb}: the arguments cannot be parsed") from None
        return None
    except (argparse.ArgumentError, ValueError, TypeError) as error:  # without pydantic's pointer to its documentation
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        raise JointNASError(f"{verb}: {' '.join(line for line in lines if line)}") from None
    if verb in CONFIGURED:
        values: dict[str, Any] = namespace.as_dict()
    else:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
        values = dict(vars(instantiate(namespace)))
    values.pop("config", None)
    return values


def normalise(arguments: list[str], resume: str = "true") -> list[str]:
    """Dashes in names are underscores, names of SHORT stand for longer ones, a FLAG alone is true, and `--resume` alone
    is what the verb calls that; `~` is the home folder behind `=`, too."""
    found: list[str] = []
    for argument, after in itertools.pairwise([*arguments, "--"]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            name = SHORT.get(name, name)
            if name in FLAGS and not equals and after.startswith("--"):
                equals, value = "=", resume if name == "--resume" else "true"
            argument = name + equals + os.path.expanduser(value)
        found.append(os.path.expanduser(argument))
    return found


def check_options(parser: Any, verb: str, arguments: list[str]) -> None:
    """Unknown options and unknown keys of configuration files, with the nearest known one."""
    from jointnas.config import build
    from jointnas_kernels.space import read_yaml

    known = [o for o in parser._option_string_actions if o.startswith("--")]
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name not in known:
            section = name.rpartition(".")[0]  # list the options of the section that was meant, not all hundred
            near = [o for o in known if o.rpartition(".")[0] == section] or [o for o in known if "." not in o]
            raise unknown("option", name, near, where=f"jointnas {verb}")
        following = value if equals else "".join(arguments[i + 1 : i + 2])
        if name == "--config" and verb in CONFIGURED and following:
            build(schema_of(verb), read_yaml(following, "configuration file"), where=following)
        inside = [o for o in known if o.startswith(f"{name}.")]
        if inside and following and not following.startswith("{") and Path(following).suffix not in SECTION_FILES:
            raise JointNASError(f"jointnas {verb}: {name} is a section; set its parts: {', '.join(inside)}")


if __name__ == "__main__":
    sys.exit(main())
