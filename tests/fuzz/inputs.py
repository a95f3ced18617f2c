"""Files that users bring, changed at random, read as the commands read them:
``python -m tests.fuzz.inputs --cases 10000 --seed 0``.

Each case changes a valid configuration, latency table, checkpoint or run folder, model folder or file, or data file.
It may be read, or refused with one JointNASError; anything else (another exception, more than 10 s of a processor) is a
failure. Failures are told apart by where they were raised. ``--only model --case 17`` repeats one case.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from jointnas import catalogue, cli, data, exporting, loading, preparation, run_folder
from jointnas.config import DataConfig, ModelConfig, RunConfig, build, dump, load
from jointnas.convergence import sentences
from jointnas.initialise.store import Store
from jointnas.metrics import read_metrics
from jointnas.pipeline import finish
from jointnas.run_folder import Run
from jointnas.tokens import encode
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import feasible_space
from jointnas_kernels.hf.gguf.write import write
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice, SearchSpace
from tests.fuzz.mutations import lines_of, octets, safetensors_of, text_of, yaml_of
from tests.hf.small_tokenizers import byte_tokenizer
from tests.jointnas import tiny
from tests.jointnas.tiny_tokenizers import of_bytes
from tests.latency.tables import CONFIG, synthetic

SECONDS = 10.0  # of a processor that a case may take
MEMORY = 12 << 30
LINE = "The quick brown fox jumps over the lazy dog.\n"


class Hang(BaseException):
    """A case took too long."""


class Inputs:
    """Valid files below a folder, and a method per kind that changes and reads one."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root, self.given = root, root / "given"
        self.work = root / "work"
        self.given.mkdir(parents=True)
        self.config = tiny.config(self.given / "run", resume="auto", tensorboard=False)
        self.space = self.config.space.build()
        self.table = synthetic(self.space)
        self.table.save(self.given / "table.jsonl")
        self.run, _ = tiny.search(self.config)
        shutil.rmtree(self.given / "run" / "quantizers")
        (self.given / "run" / "eval.json").write_text("[]")
        self.optimizers = {
            "weight_optimizer": torch.optim.AdamW(self.run.supernet.lora_parameters()),
            "arch_optimizer": torch.optim.Adam(self.run.supernet.arch_parameters()),
        }
        self._models()
        self._data()

    def _models(self) -> None:
        self.models: list[Path] = []
        for family, shard in (("llama", "1GB"), ("qwen3", "60KB")):
            folder = self.given / family
            values = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            torch.manual_seed(0)
            changed = {**vars(CONFIG), **values, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
            made: Any = tiny.build_model(tiny.AutoConfig.for_model(family, **changed, max_position_embeddings=64))
            made.save_pretrained(folder, max_shard_size=shard)
            of_bytes().save_pretrained(folder)
            self.models.append(folder)
        write(self.models[0], self.given / "model.gguf", byte_tokenizer())

        finish(self.run)
        self.packed = self.given / "packed"
        shutil.move(self.given / "run" / "final", self.packed)
        self.supernet = self.given / "supernet"
        self.run.supernet.relax().save_pretrained(self.supernet)

    def _data(self) -> None:
        records: list[Any] = [
            {"text": LINE * 3}, {"prompt": "1 + 1 =", "completion": " 2" * 20},
            {"instruction": "Say it.", "output": LINE},
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": LINE}]},
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": LINE}]},
        ]  # fmt: skip
        self.records = records * 6
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [LINE * 3] * 20}), self.given / "rows.parquet")
        self.tokenizer = of_bytes()

    # ---- kinds ------------------------------------------------------------------------------------------------------

    def configuration(self, generator: random.Random) -> None:
        """A configuration, its space, and what is asked of both before anything expensive."""
        values = yaml.safe_load(dump(self.config))
        values |= {"target_latency_ms": 0.9, "model": {"source": "embedded", "device": "cpu", "dtype": "float32"}}
        values["search"] |= {"budget_max": 0.9, "budget_min": 0.01}
        path = self.work / generator.choice(("c.yaml", "c.json"))
        path.write_bytes(yaml_of(values, generator) if path.suffix == ".yaml" else text_of(values, generator))
        if generator.random() < 0.04:
            cli.parse("search", [f"--config={path}"])
            return
        config = load(path)
        space, _ = feasible_space(self.run.model_config, config.space.build())
        loading.check_lengths(self.run.model_config, data_seq_len=config.data.seq_len)
        preparation.check_limits(config, self.run.model_config, self.table, self.table.restrict(space)[0])
        build(RunConfig, yaml.safe_load(dump(config)))

    def space_file(self, generator: random.Random) -> None:
        """A search space in a file."""
        path = self.work / "space.yaml"
        path.write_bytes(yaml_of(self.space.to_dict(), generator))
        space, _ = feasible_space(self.run.model_config, SearchSpace.from_yaml(path))
        space.structures()

    def latency_table(self, generator: random.Random) -> None:
        """A latency table, and everything that a search asks of it."""
        rows = [json.loads(line) for line in (self.given / "table.jsonl").read_text().splitlines()]
        content = lines_of(rows, generator)
        if generator.random() < 0.85:  # a true end line, so that what is changed is looked at
            body = b"".join(line + b"\n" for line in content.splitlines()[:-1])
            count = body.count(b'"row"')
            digest = hashlib.sha256(body).hexdigest()
            content = body + json.dumps({"kind": "end", "rows": count, "sha256": digest}).encode() + b"\n"
        path = self.work / "table.jsonl"
        path.write_bytes(content)
        table = LatencyTable.load(path, "cpu")
        config = self.config.model_copy(
            update={"latency": self.config.latency.model_copy(update={"table": str(path), "force": True})}
        )
        preparation.load_table(config, self.space, self.run.model_config)
        restricted, _ = table.restrict(self.space)
        preparation.check_limits(config, self.run.model_config, table, restricted)
        table.bind(restricted, self.run.supernet.block_rank).original()

    def manifest(self, generator: random.Random) -> None:
        """A run folder: checkpoints with a true manifest or not, and its other files."""
        folder = self.work / "run"
        shutil.copytree(self.given / "run", folder)
        name = generator.choice((
            "state.json", "state.json", "manifest.json", "COMPLETE", "supernet.safetensors", "rng.safetensors",
            "arch_optimizer.safetensors", "choice.json", "convergence.json", "metrics.jsonl", "config.yaml",
            "settings.json",
        ))  # fmt: skip
        newest = folder / "checkpoints" / "step-12"
        places = [p / name for p in (newest, folder, folder / "quantizers")]
        path = next((p for p in places if p.is_file()), places[-1])
        if name == "settings.json":
            path.parent.mkdir()
            path.write_text(json.dumps({"method": "clip", "samples": 4}))
        changed(path, generator)
        if path.parent == newest and generator.random() < 0.7:  # as if it had been written so
            if name != "manifest.json":
                listed = {p.name: p for p in newest.iterdir() if p.name not in ("manifest.json", "COMPLETE")}
                digests = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in listed.items()}
                (newest / "manifest.json").write_text(json.dumps(digests))
            (newest / "COMPLETE").write_text(hashlib.sha256((newest / "manifest.json").read_bytes()).hexdigest())
        config = run_folder.read_config(folder)
        config = self.run.config.model_copy(update={"out": str(folder), "seed": config.seed})
        run = Run(
            config, folder, self.run.supernet, self.run.streams, self.run.table, self.run.space, self.run.removed
        )
        run_folder.found_choice(folder)
        run_folder.restore(run, self.optimizers)
        read_metrics(folder)
        sentences(folder)
        Store(folder / "quantizers", {"method": "clip", "samples": 4})

    def model(self, generator: random.Random) -> None:
        """A model folder: its configuration, weights, index of shards and tokenizer."""
        folder = self.work / "model"
        shutil.copytree(generator.choice(self.models), folder)
        path = generator.choice(sorted(folder.iterdir()))
        changed(path, generator)
        source = ModelConfig(source=str(folder), device="cpu")
        loading.model_config(source)
        loading.licence(source)
        if "token" in path.name or generator.random() < 0.1:
            tokenizer = loading.load_tokenizer(source)
            encode([data.records.Document(LINE)], tokenizer, data.bos_of(tokenizer))
        if "token" not in path.name or generator.random() < 0.1:
            loading.load_model(source)

    def packed_model(self, generator: random.Random) -> None:
        """An exported model on the low-bit kernels, or a saved supernet."""
        folder, given = self.work / "model", generator.choice((self.packed, self.packed, self.supernet))
        shutil.copytree(given, folder)
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
        changed(generator.choice(files), generator)
        if given == self.supernet:
            hf.Supernet.from_pretrained(folder)
            return
        hf.load(folder)
        if generator.random() < 0.2:
            exporting.reload(folder)
        catalogue.caveat(str(folder))

    def gguf(self, generator: random.Random) -> None:
        """A model of llama.cpp."""
        path = self.work / "model.gguf"
        content = (self.given / "model.gguf").read_bytes()
        path.write_bytes(octets(content, generator) if generator.random() < 0.5 else octets(content[:2000], generator)
                         + content[2000:])  # fmt: skip
        source = ModelConfig(source=str(path), device="cpu")
        loading.load_model(source)
        if generator.random() < 0.2:
            loading.load_tokenizer(source)

    def data_file(self, generator: random.Random) -> None:
        """A file of text or records."""
        suffix = generator.choice((".jsonl", ".json", ".txt", ".parquet", ".jsonl"))
        path = self.work / f"data{suffix}"
        if suffix == ".jsonl":
            path.write_bytes(lines_of(self.records, generator))
        elif suffix == ".json":
            path.write_bytes(text_of(self.records, generator))
        elif suffix == ".txt":
            path.write_bytes(octets((LINE * 40).encode(), generator))
        else:
            path.write_bytes(octets((self.given / "rows.parquet").read_bytes(), generator))
        config = DataConfig(source=str(path), seq_len=16, batch_size=2, cache=str(self.work / "cache"))
        streams = data.load(config, self.tokenizer, 0, model="m", vocabulary=300)
        data.Batches(streams.weight, 2, 16, 0, streams.bos).at(0)

    def export(self, generator: random.Random) -> None:
        """The files beside an exported model that say what it is."""
        path = self.work / "choice.json"
        path.write_bytes(text_of(json.loads((self.given / "run" / "choice.json").read_text())["choice"], generator))
        try:
            value = json.loads(path.read_text())
        except (ValueError, RecursionError):
            return
        choice = Choice.from_dict(value, where=str(path))
        self.space.check(choice)
        hf.extract(self.run.supernet, choice)


def changed(path: Path, generator: random.Random) -> None:
    """Changes a file as one of its kind."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = safetensors_of(content, generator)
    elif path.suffix == ".json":
        content = text_of(json.loads(content), generator)
    elif path.suffix == ".jsonl":
        content = lines_of([json.loads(line) for line in content.splitlines()], generator)
    elif path.suffix == ".yaml":
        content = yaml_of(yaml.safe_load(content), generator)
    else:
        content = octets(content, generator)
    path.write_bytes(content)


KINDS: dict[str, tuple[Callable[[Inputs, random.Random], None], int]] = {  # and of how many cases
    "configuration": (Inputs.configuration, 16), "space": (Inputs.space_file, 8), "table": (Inputs.latency_table, 20),
    "manifest": (Inputs.manifest, 20), "choice": (Inputs.export, 4), "model": (Inputs.model, 12),
    "packed": (Inputs.packed_model, 5), "gguf": (Inputs.gguf, 5), "data": (Inputs.data_file, 20),
}  # fmt: skip


@dataclass
class Tally:
    cases: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)  # where: what, of each case


def place(error: BaseException) -> str:
    """Where an exception comes from: the last line of this repository that is no test."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "jointnas" in f.filename and "/tests/" not in f.filename and "/lib/" not in f.filename]
    last = own[-1] if own else frames[-1]
    return f"{type(error).__name__} at {'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def one(inputs: Inputs, kind: str, case: int, tally: Tally) -> None:
    """Runs one case."""
    shutil.rmtree(inputs.work, ignore_errors=True)
    inputs.work.mkdir()
    began = time.process_time()
    tally.cases[kind] += 1
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        KINDS[kind][0](inputs, random.Random(f"{kind} {case}"))
    except JointNASError as error:
        tally.refused[kind] += 1
        if not str(error).strip():
            tally.failures.setdefault("a refusal without words", []).append(f"--only {kind} --case {case}")
    except (Exception, Hang) as error:
        what = f"--only {kind} --case {case}: {str(error)[:200]!r}"
        tally.failures.setdefault(place(error), []).append(what)
        print(f"{place(error)}: {what}", file=sys.stderr, flush=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    tally.slowest[kind] = max(tally.slowest.get(kind, 0.0), time.process_time() - began)


def campaign(root: Path, cases: int, seed: int, only: str | None = None) -> Tally:
    """So many cases, of all kinds or one."""

    def hang(*_: Any) -> None:
        raise Hang(f"more than {SECONDS:g} s")

    signal.signal(signal.SIGPROF, hang)
    inputs, tally = Inputs(root), Tally()
    shares = {kind: share for kind, (_, share) in KINDS.items() if only in (None, kind)}
    order = [kind for kind, share in shares.items() for _ in range(max(1, round(cases * share / sum(shares.values()))))]
    random.Random(seed).shuffle(order)
    said = time.monotonic()
    for number, kind in enumerate(order):
        one(inputs, kind, seed * 1_000_000 + number, tally)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"{number + 1} cases, {sum(map(len, tally.failures.values()))} failures", file=sys.stderr, flush=True)
    return tally


def report(tally: Tally) -> str:
    """What happened, a line a kind and a line a failure."""
    lines = [
        f"{kind:14s} {count:6d} cases, {tally.refused[kind]:6d} refused, slowest {tally.slowest[kind]:.1f} s"
        for kind, count in sorted(tally.cases.items())
    ]
    for where, what in sorted(tally.failures.items(), key=lambda entry: -len(entry[1])):
        lines.append(f"{len(what):5d} × {where}: {what[0]}")
    total = sum(map(len, tally.failures.values()))
    return "\n".join([*lines, f"{tally.cases.total()} cases, {total} failures in {len(tally.failures)} places"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.inputs", description=__doc__)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--case", type=int, help="repeat this case of the kind of --only, with its traceback")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory(prefix="inputs-") as folder:
        if arguments.case is not None:
            inputs = Inputs(Path(folder))
            inputs.work.mkdir()
            KINDS[arguments.only][0](inputs, random.Random(f"{arguments.only} {arguments.case}"))
            return 0
        tally = campaign(Path(folder), arguments.cases, arguments.seed, arguments.only)
    print(report(tally))
    return min(1, len(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
