"""The `jointnas` command. Every verb is a function in `jointnas.verbs`; bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jointnas_kernels.errors import JointNASError, unknown

VERBS = {
    "doctor": "environment, and which latency backends work here",
    "demo": "the whole mission on the embedded model, in minutes",
    "bench": "benchmarks of the kernels (bench --help)",
    "profile": "measure the latency table of this machine",
    "search": "search, prune, distil, export, evaluate, report",
    "quantize": "quantize a model after training, at one precision, and export it",
    "finetune": "distil the found choice of a run again",
    "export": "copy the finished model of a run",
    "eval": "size, latency and quality of a run's models",
    "report": "draw a run's plots and report.html",
    "compare": "the found choice against random ones of its cost",
}


FILES = ("--compare", "--merge")  # options that take several files


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
    except KeyboardInterrupt:
        print("jointnas: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing more can be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jointnas VERB [options]     jointnas VERB --help\n")
        print("\n".join(f"  {name:<9} {text}" for name, text in VERBS.items()))
        return 0
    if arguments[0] in ("-V", "--version"):
        from jointnas_kernels import __version__

        print(f"jointnas {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    if verb == "bench":
        from jointnas import bench

        return bench.main(rest)
    values = parse(verb, rest)
    if values is not None:
        _OUTPUT[verb](run_verb(verb, values))
    return 0


def run_verb(verb: str, values: dict[str, Any]) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from jointnas import verbs
    from jointnas.config import RunConfig, build

    disable_progress_bar()  # one bar at a time: ours
    if verb == "search":
        return verbs.search(build(RunConfig, values))
    return getattr(verbs, _function(verb))(**values)


def _function(verb: str) -> str:
    return {"eval": "evaluate"}.get(verb, verb)


def parser_of(verb: str) -> Any:
    """The jsonargparse parser of one verb, made from its function's signature."""
    import jsonargparse

    from jointnas import verbs
    from jointnas.config import RunConfig

    parser = jsonargparse.ArgumentParser(prog=f"jointnas {verb}", description=VERBS[verb], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; flags after it override it")
    if verb == "search":
        parser.add_class_arguments(RunConfig, as_group=False)
    else:
        parser.add_function_arguments(getattr(verbs, _function(verb)), as_group=False)
    return parser


def parse(verb: str, arguments: list[str]) -> dict[str, Any] | None:
    """Values of a verb's arguments; None if --help or --print_config was all that was asked for."""
    parser = parser_of(verb)
    arguments = normalise(arguments)
    check_options(parser, verb, arguments)
    try:
        namespace = parser.parse_args(arguments)
    except SystemExit as stop:  # --help and --print_config
        if stop.code:
            raise JointNASError(f"{verb}: the arguments cannot be parsed") from None
        return None
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise JointNASError(f"{verb}: {_first_lines(error)}") from None
    if verb == "search":
        values: dict[str, Any] = namespace.as_dict()
    else:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
        values = dict(vars(instantiate(namespace)))
    values.pop("config", None)
    return values


def normalise(arguments: list[str]) -> list[str]:
    """Dashes in names are underscores, `--space NAME` is `--space.base NAME`, `--metric` is `--latency.metric`,
    `--resume` and `--force` alone are true, and the files after `--compare` and `--merge` become one list."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        if found and found[-1].startswith(FILES) and not argument.startswith("--"):
            name, _, files = found[-1].partition("=")
            found[-1] = f"{name}={json.dumps([*json.loads(files), argument])}"
            continue
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            name = {"--space": "--space.base", "--metric": "--latency.metric"}.get(name, name)
            argument = name + equals + value
            last = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
            if name in ("--resume", "--force") and not equals and last:
                argument = f"{name}=true"
            if name in FILES and not equals:
                argument = f"{name}=[]"
        found.append(argument)
    return found


def check_options(parser: Any, verb: str, arguments: list[str]) -> None:
    """Unknown options and unknown keys of configuration files, with the nearest known one."""
    from jointnas.config import RunConfig, check_keys, read_yaml

    known = [o for o in parser._option_string_actions if o.startswith("--")]
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name not in known:
            section = name.rpartition(".")[0]  # list the options of the section that was meant, not all hundred
            near = [o for o in known if o.rpartition(".")[0] == section] or [o for o in known if "." not in o]
            raise unknown("option", name, near, where=f"jointnas {verb}")
        if name == "--config" and verb == "search":
            path = value if equals else arguments[i + 1] if i + 1 < len(arguments) else ""
            check_keys(RunConfig, read_yaml(path), where=path)


def _first_lines(error: Exception) -> str:
    """The message without pydantic's pointer to its documentation."""
    lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
    return " ".join(line for line in lines if line)


# ---- what is printed ------------------------------------------------------------------------------------------------


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from jointnas.reporting import text_table

    print(text_table(rows))


def _print_doctor(found: dict[str, Any]) -> None:
    from jointnas.environment import text

    print(text(found))


def _print_table(table: Any) -> None:
    if isinstance(table, str):
        print(table)
        return
    print(f"{table.header.device}; {table.header.workload!s}")
    print(table.summary())
    if table.calibration is not None:
        print(
            f"whole models: error {table.calibration.mape:.1%}, {table.calibration.mape_before:.1%} before adding "
            f"{table.calibration.fixed:.3f} ms and {table.calibration.per_block:.3f} ms per block"
        )


def _print_search(folder: Path) -> None:
    _print_rows(json.loads((folder / "eval.json").read_text()))
    print(f"\nmodel: {folder / 'final'}\nreport: {folder / 'report.html'}")


def _print_compare(result: dict[str, Any]) -> None:
    print(
        f"found: {result['found']['ce']:.4f} nats per token; better than {result['better_than']} of "
        f"{len(result['random'])} random architectures of its cost (median {result['median_random']:.4f})"
    )


_OUTPUT: dict[str, Callable[[Any], None]] = {
    "doctor": _print_doctor,
    "demo": _print_rows,
    "profile": _print_table,
    "search": _print_search,
    "quantize": print,
    "finetune": print,
    "export": print,
    "eval": _print_rows,
    "report": print,
    "compare": _print_compare,
}

if __name__ == "__main__":
    sys.exit(main())
