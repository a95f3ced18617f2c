"""Sources of text as documents: what is in a file or data set, and which part of it is trained on.

A record's kind shows in its columns; of several that fit, the first is taken:

    text          `data.text_column`, if it was set to another name than `text`
    chat          `messages` [{role, content}, …] or `conversations` [{from, value}, …]
    Alpaca        `instruction`, `output` and perhaps `input`
    prompt        `prompt`, `completion`: one behind the other, nothing added
    text          `data.text_column`

Of chat, Alpaca and prompt records the loss is on the answers alone, and on the token that ends each.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointnas import assets
from jointnas.config import DataConfig
from jointnas_kernels.errors import JointNASError, unknown

log = logging.getLogger(__name__)
BLOCK = 1 << 20  # characters of a text file that are tokenized as one; a longer file is cut at line ends
Record = tuple[str, dict[str, Any]]  # where it stands, and what

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# chat template of tokenizers that have none
PLAIN = (
    "{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
)
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
KINDS = "{}; prompt, completion; instruction, output (and input); messages; conversations"


@dataclass(frozen=True)
class Document:
    """A text. `counted`: its spans of characters whose tokens are learned (None: all); `begins`, `ends`: whether it has
    its first and last characters, so that BOS and EOS belong there."""

    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    begins: bool = True
    ends: bool = True


def embedded(split: assets.Split, seed: int = 0) -> Iterator[Document]:
    """The package's own text, in the order of its token stream."""
    found = assets.documents(split)
    return (Document(found[i]) for i in assets.order(len(found), seed))


def documents(config: DataConfig, tokenizer: Any) -> tuple[Any, Callable[[], Iterator[Document]]]:
    """What a source is at this moment, as plain values that differ when it changes, and a way to read it.

    Raises:
        JointNASError: it does not exist, or is of a kind that is not read.
    """
    if config.source.startswith("hf:"):
        identity, records = _hub(config)
        return identity, lambda: _converted(records(), config, tokenizer)
    files = _files(config.source)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read() -> Iterator[Document]:
        for file in files:
            if file.suffix == ".txt":
                yield from _text(file)
            else:
                yield from _converted(READERS[file.suffix](file), config, tokenizer)

    return stats, read


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    known = (".txt", *READERS)
    if path.is_dir():
        inside = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        files = [f for f in inside if f.suffix in known]
        if not files:
            raise JointNASError(f"data folder {source!r} has no {', '.join(known)} files")
        if left := [f.name for f in inside if f not in files]:
            log.info("data folder %s: only %s are read, not %s", source, ", ".join(known), ", ".join(left))
        return files
    if not path.is_file():
        raise JointNASError(
            f"data source {source!r} does not exist; allowed: 'embedded', a file or folder of {', '.join(known)}, "
            "'hf:NAME' for a Hugging Face data set"
        )
    if path.suffix not in known:
        raise unknown("extension", path.suffix, known, where=f"data source {source!r}")
    return [path]


# ---- readers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[Any]:
    """A text file without its byte order mark, lines ended by \\n."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise JointNASError(f"data source '{path}' is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise JointNASError(f"data source '{path}' cannot be read: {error.strerror}") from None


def _text(path: Path) -> Iterator[Document]:
    with _utf8(path) as file:
        block, begins = file.read(BLOCK), True
        while block:
            block += file.readline(BLOCK)
            after = file.read(BLOCK)
            yield Document(block, begins=begins, ends=not after)
            block, begins = after, False


def _json(path: Path) -> Iterator[Record]:
    """A list of records (held in memory), or lines of them."""
    with _utf8(path) as file:
        listed = next((c for c in iter(lambda: file.read(1), "") if not c.isspace()), "") == "["
    if not listed:
        yield from _jsonl(path)
        return
    with _utf8(path) as file:
        values = _parsed(file.read(), str(path))
    for number, value in enumerate(values, 1):
        yield f"{path}: record {number}", value


def _jsonl(path: Path) -> Iterator[Record]:
    with _utf8(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}: line {number}", _parsed(line, f"{path}: line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise JointNASError(
            f"{where} is not JSON ({error.msg}{line}); a .jsonl file holds one record a line, a .json file so, too, or "
            "a list of records"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise JointNASError(f"{where} cannot be read as JSON ({str(error).splitlines()[0]})") from None


def _parquet(path: Path) -> Iterator[Record]:
    load = _datasets(f"data source '{path}'").load_dataset
    with _foreign(f"data source '{path}'"):
        rows = load("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    for number, row in enumerate(_guarded(rows, f"data source '{path}'"), 1):
        yield f"{path}: row {number}", row


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def _hub(config: DataConfig) -> tuple[str, Callable[[], Iterator[Record]]]:
    name, _, subset = config.source.removeprefix("hf:").partition("/config=")
    what = f"data set {name!r}"
    with _foreign(what):
        builder = _datasets(what).load_dataset_builder(name, subset or None)

    def read() -> Iterator[Record]:
        with _foreign(what):
            rows = builder.as_streaming_dataset(split="train")
        for number, row in enumerate(_guarded(rows, what), 1):
            yield f"{what}: record {number}", row

    return str(builder.cache_dir), read  # it names version, configuration and commit


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise JointNASError(f"{what} needs the `datasets` package: pip install 'jointnas-kernels[search]'") from None
    return datasets


@contextlib.contextmanager
def _foreign(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of datasets, pyarrow, fsspec and the hub have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JointNASError(f"{what} cannot be loaded: {reason}") from None


def _guarded(rows: Iterable[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    with _foreign(what):
        iterator = iter(rows)
    end: dict[str, Any] = {}
    while True:
        with _foreign(what):
            row = next(iterator, end)
        if row is end:
            return
        yield row


# ---- records --------------------------------------------------------------------------------------------------------


def _converted(records: Iterable[Record], config: DataConfig, tokenizer: Any) -> Iterator[Document]:
    """Documents of the records that have something to learn; how many have not goes to the log."""
    empty, where = 0, ""
    for where, record in records:
        document = of_record(record, where, config.text_column, tokenizer)
        if document is None:
            empty += 1
        else:
            yield document
    if empty:
        log.info("%s: %d records with nothing to learn are left out", where.rpartition(":")[0], empty)


def of_record(record: Any, where: str, text_column: str, tokenizer: Any) -> Document | None:
    """The document of one record; None where it has no text or no answer.

    Raises:
        JointNASError: columns of no known kind, or values that are not text.
    """
    if not isinstance(record, dict):
        raise JointNASError(f"{where} is {type(record).__name__}, not a record of named columns")

    def value(column: str) -> str:
        return _string(record.get(column), f"{where}: column {column!r}")

    if text_column in record and text_column != "text":
        return Document(value(text_column)) if value(text_column) else None
    for column in ("messages", "conversations"):
        if column in record:
            return _chat(_messages(record[column], f"{where}: column {column!r}"), tokenizer, where)
    if {"instruction", "output"} <= record.keys():
        template = ALPACA_WITH_INPUT if value("input") else ALPACA
        prompt, answer = template.format(instruction=value("instruction"), input=value("input")), value("output")
    elif {"prompt", "completion"} <= record.keys():
        prompt, answer = value("prompt"), value("completion")
    elif text_column in record:
        return Document(value(text_column)) if value(text_column) else None
    else:
        found = ", ".join(map(str, record)) or "none"
        raise JointNASError(f"{where} has the columns {found}; allowed: {KINDS.format(text_column)}")
    return Document(prompt + answer, ((len(prompt), len(prompt + answer)),)) if answer else None


def _string(value: Any, where: str) -> str:
    """Text; None is the empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise JointNASError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise JointNASError(f"{where} holds half of a surrogate pair, which is no text") from None
    return value


def _messages(values: Any, where: str) -> list[dict[str, str]]:
    """[{role, content}, …] up to the last answer."""
    found: list[dict[str, str]] = []
    if not isinstance(values, (list, type(None))):
        raise JointNASError(f"{where} holds {type(values).__name__}, not a list of messages")
    for i, message in enumerate(values or [], 1):
        named = message if isinstance(message, dict) else {}
        keys = next((k for k in (("role", "content"), ("from", "value")) if k[0] in named), None)
        if keys is None:
            raise JointNASError(f"{where}: message {i} has neither role and content nor from and value")
        role, content = (_string(named.get(key), f"{where}: message {i}: {key}") for key in keys)
        found.append({"role": ROLES.get(role, role), "content": content})
    while found and (found[-1]["role"] != "assistant" or not found[-1]["content"]):
        found.pop()
    return found


def _chat(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Document | None:
    """A conversation as the tokenizer's chat template (or `PLAIN`) writes it.

    To find the answers in that text, it is also rendered with marks in their place. What counts is an answer, and the
    special token behind it that ends the turn."""
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        return None
    marks = [f"\ue000{i}\ue001" for i in range(len(answers))]
    between, rest = [], _rendered(messages, marks, tokenizer, where)
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise JointNASError(f"{where}: the tokenizer's chat template leaves out an answer of the assistant")
        between.append(before)
    between.append(rest)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | {*tokenizer.all_special_tokens}
    closing = re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(special)))})") if special else None
    for contents in (answers, [a.strip() for a in answers]):  # some templates strip
        text, spans, closed = "", [], None
        for before, content, after in zip(between, contents, between[1:], strict=False):
            text += before
            closed = closing and closing.match(after)
            spans.append((len(text), len(text) + len(content) + (closed.end() if closed else 0)))
            text += content
        if text + rest == _rendered(messages, contents, tokenizer, where):
            return Document(text + rest if closed else text, tuple(spans), ends=not closed)
    raise JointNASError(f"{where}: the tokenizer's chat template rewrites the assistant's answers")


def _rendered(messages: list[dict[str, str]], answers: list[str], tokenizer: Any, where: str) -> str:
    contents = iter(answers)
    filled = [{**m, "content": next(contents)} if m["role"] == "assistant" else m for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            filled, tokenize=False, chat_template=None if tokenizer.chat_template else PLAIN
        )
    except Exception as error:  # a template is a program of the tokenizer's author
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JointNASError(f"{where}: the tokenizer's chat template refuses the messages: {reason}") from None
    return text
