"""Sources of every kind as streams of tokens: what a model sees, what it learns, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from jointnas import assets, data, records, tokens
from jointnas.config import DataConfig
from jointnas_kernels.errors import JointNASError
from tests.jointnas.tiny_tokenizers import BRACKETS, CHATML, of_bytes, of_words

LONG = "The quick brown fox.\n" * 40


def streams(source: Path | str, tokenizer: Any, cache: Path, **options: Any) -> data.Streams:
    values = {"seq_len": 8, "batch_size": 2, **options}
    return data.load(DataConfig(source=str(source), cache=str(cache), **values), tokenizer, vocabulary=300)


def whole(found: data.Streams) -> torch.Tensor:
    """A source's stream before it was divided."""
    return torch.cat((found.all, found.held_out))


def text(found: data.Streams, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(data.decode(whole(found)).ids)


def learned(found: data.Streams, tokenizer: PreTrainedTokenizerFast) -> str:
    labels = data.decode(whole(found)).labels
    return tokenizer.decode(labels[labels != data.IGNORE])


def jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return path


# ---- text -----------------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, tuple[dict[str, Any], str, str]] = {  # options, what is before a document, and behind it
    "bos-eos": ({}, "<s>", "</s>"),
    "bos": ({"eos": None}, "<s>", ""),
    "eos": ({"bos": None}, "", "</s>"),
    "none": ({"bos": None, "eos": None}, "", ""),
    "pad": ({"pad": "<pad>"}, "<s>", "</s>"),
    "bos-not-by-default": ({"adds": False}, "", "</s>"),
    "bos-is-eos": ({"bos": "</s>"}, "", "</s>"),  # it separates documents
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_stand_around_documents(name: str, tmp_path: Path) -> None:
    options, before, behind = TOKENIZERS[name]
    tokenizer = of_bytes(**options)
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"{i} {LONG}")
    found = streams(tmp_path, tokenizer, tmp_path / "cache")
    assert text(found, tokenizer) == f"{before}0 {LONG}{behind}{before}1 {LONG}{behind}"
    assert learned(found, tokenizer) == f"0 {LONG}{behind}1 {LONG}{behind}"  # BOS is given
    assert found.bos == (tokenizer.bos_token_id if before else None)
    assert found.all.dtype == torch.int32


TEXTS: dict[str, tuple[str, bytes, str]] = {  # file, its bytes, the text
    "crlf": ("a.txt", LONG.replace("\n", "\r\n").encode(), LONG),
    "bom": ("a.txt", b"\xef\xbb\xbf" + LONG.encode(), LONG),
    "one-line": ("a.txt", LONG.replace("\n", " ").encode(), LONG.replace("\n", " ")),
    "spaces": ("with some spaces.txt", LONG.encode(), LONG),
    "unicode-name": ("größe 数据 [1]*.txt", LONG.encode(), LONG),
    "unicode": ("a.txt", ("žluťoučký 🦊\n" * 30).encode(), "žluťoučký 🦊\n" * 30),
    "special-inside": ("a.txt", (LONG + "</s>" + LONG).encode(), LONG + "</s>" + LONG),
    "jsonl-crlf": ("a.jsonl", (json.dumps({"text": LONG}) + "\r\n\r\n").encode(), LONG),
    "jsonl-bom": ("a.jsonl", b"\xef\xbb\xbf" + json.dumps({"text": LONG}).encode(), LONG),
    "jsonl-null": ("a.jsonl", f'{{"text": null}}\n{{"text": ""}}\n{json.dumps({"text": LONG})}'.encode(), LONG),
    "jsonl-extra": ("a.jsonl", json.dumps({"id": 7, "text": LONG, "meta": {"x": [1, "y"]}}).encode(), LONG),
    "json-list": ("a.json", json.dumps([{"text": LONG}], indent=1).encode(), LONG),
    "json-bom": ("a.json", b"\xef\xbb\xbf \n" + json.dumps([{"text": LONG}]).encode(), LONG),
    "json-lines": ("a.json", (json.dumps({"text": LONG}) + "\n").encode(), LONG),
    "json-escapes": ("a.jsonl", ('{"text": "' + "\\u00fc\\ud83e\\udd8a\\n" * 60 + '"}').encode(), "ü🦊\n" * 60),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, tmp_path: Path) -> None:
    file, content, expected = TEXTS[name]
    (tmp_path / "in put").mkdir()
    (tmp_path / "in put" / file).write_bytes(content)
    tokenizer = of_bytes(bos=None)
    for source in (tmp_path / "in put" / file, tmp_path / "in put"):
        assert text(streams(source, tokenizer, tmp_path), tokenizer) == expected + "</s>"


def test_a_folder_of_mixed_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "0.txt").write_text("")
    (tmp_path / "1.txt").write_text("one " * 100)
    jsonl(tmp_path / "2.jsonl", {"text": "two " * 100}, {"prompt": "three ", "completion": "four " * 100})
    (tmp_path / "3.json").write_text(json.dumps([{"text": "five"}]))
    Dataset.from_list([{"text": "six"}, {"text": None}]).to_parquet(tmp_path / "4 [x].parquet")
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    tokenizer = of_bytes(bos=None)
    with caplog.at_level("INFO"):
        found = text(streams(tmp_path, tokenizer, tmp_path / "cache"), tokenizer)
    texts = ["one " * 100, "two " * 100, "three " + "four " * 100, "five", "six"]
    assert found == "".join(f"{t}</s>" for t in texts)
    assert "not notes.md" in caplog.text
    assert "1 records with nothing to learn are left out" in caplog.text


def test_a_file_of_any_size_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the tokenizer sees more than a few blocks, and the tokens are those of the whole file."""
    tokenizer, sizes = of_bytes(), []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            sizes.append(sum(map(len, texts)))
            return tokenizer(texts, **options)

    (tmp_path / "a.txt").write_text(LONG * 20 + "x" * 9000)
    jsonl(tmp_path / "b.jsonl", *({"text": LONG} for _ in range(20)))
    monkeypatch.setattr("jointnas.records.BLOCK", 1000)
    monkeypatch.setattr("jointnas.tokens.BLOCK", 1000)
    found = streams(tmp_path, Watched(), tmp_path / "cache")
    assert max(sizes) <= 4000
    assert text(found, tokenizer) == f"<s>{LONG * 20}{'x' * 9000}</s>" + f"<s>{LONG}</s>" * 20


# ---- records with answers -------------------------------------------------------------------------------------------

PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd the numbers.\n\n### Input:\n2, 3\n\n### Response:\n"
)
SHORT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hi.\n\n### Response:\n"
)


def test_alpaca_token_by_token(tmp_path: Path) -> None:
    tokenizer = of_words(PROMPT, SHORT, "It is 5. hi", bos="<s>")
    path = jsonl(
        tmp_path / "a.jsonl",
        {"instruction": "Add the numbers.", "input": "2, 3", "output": "It is 5."},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say hi.", "input": None, "output": None},  # nothing to learn
        {"instruction": "Say hi.", "output": "hi"},
    )
    ids, labels = data.decode(whole(streams(path, tokenizer, tmp_path, arch_fraction=0.4)))
    count = 1 + len(tokenizer(PROMPT, add_special_tokens=False).input_ids)
    assert tokenizer.convert_ids_to_tokens(ids[:count]) == [
        "<s>", "Below", " ", "is", " ", "an", " ", "instruction", " ", "that", " ", "describes", " ", "a", " ", "task",
        ",", " ", "paired", " ", "with", " ", "an", " ", "input", " ", "that", " ", "provides", " ", "further", " ",
        "context", ".", " ", "Write", " ", "a", " ", "response", " ", "that", " ", "appropriately", " ", "completes",
        " ", "the", " ", "request", ".", "\n", "\n", "#", "#", "#", " ", "Instruction", ":", "\n", "Add", " ", "the",
        " ", "numbers", ".", "\n", "\n", "#", "#", "#", " ", "Input", ":", "\n", "2", ",", " ", "3", "\n", "\n", "#",
        "#", "#", " ", "Response", ":", "\n",
    ]  # fmt: skip
    assert labels[:count].eq(data.IGNORE).all()
    answer = ["It", " ", "is", " ", "5", ".", "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids[count : count + 7]) == answer
    assert tokenizer.convert_ids_to_tokens(labels[count : count + 7]) == answer
    once = [tokenizer.bos_token_id, *tokenizer(SHORT, add_special_tokens=False).input_ids]
    end = tokenizer.convert_tokens_to_ids(["hi", "</s>"])
    assert ids[count + 7 :].tolist() == 2 * (once + end)
    assert labels[count + 7 :].tolist() == 2 * ([data.IGNORE] * len(once) + end)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": " Hi. "},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "never answered"},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in TALK
]
IM = "<|im_start|>{}\n{}<|im_end|>\n"
CHATS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # tokenizer, record, text, what is learned of it
    "chatml": (
        {"bos": None, "template": CHATML}, {"messages": TALK},
        "".join(IM.format(m["role"], m["content"]) for m in TALK[:5]), " Hi. <|im_end|>a<|im_end|>",
    ),
    "shared": (
        {"bos": None, "template": CHATML}, {"conversations": SHARED},
        "".join(IM.format(m["role"], m["content"]) for m in TALK[:5]), " Hi. <|im_end|>a<|im_end|>",
    ),
    "template-with-bos": (
        {"template": BRACKETS}, {"messages": TALK},
        "<s>[INST] <<Be brief.>> Hi? [/INST] Hi. </s><s>[INST] a [/INST] a </s>", "Hi. </s>a </s>",
    ),
    "no-template": (
        {}, {"messages": TALK},
        "<s>### System:\nBe brief.\n\n### User:\nHi?\n\n### Assistant:\n Hi. </s>\n\n### User:\na\n\n### Assistant:\n"
        "a</s>\n\n", " Hi. </s>a</s>",
    ),
    "no-template-no-eos": (
        {"eos": None, "bos": None}, {"messages": TALK[1:3]}, "### User:\nHi?\n\n### Assistant:\n Hi. ", " Hi. ",
    ),
    "prompt": ({}, {"prompt": "1 + 1 = ", "completion": "2"}, "<s>1 + 1 = 2</s>", "2</s>"),
    "prompt-before-text": ({}, {"prompt": "1", "completion": "2", "text": "12"}, "<s>12</s>", "2</s>"),
    "chat-before-prompt": (
        {"bos": None, "template": CHATML}, {"prompt": "Hi?", "completion": "no", "messages": TALK[1:3]},
        IM.format("user", "Hi?") + IM.format("assistant", " Hi. "), " Hi. <|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_learned_and_nothing_else(name: str, tmp_path: Path) -> None:
    options, record, expected, answers = CHATS[name]
    tokenizer = of_bytes(**options)
    empty = {k: [] if isinstance(v, list) else None for k, v in record.items()}
    found = streams(jsonl(tmp_path / "a.jsonl", *[record, empty] * 20), tokenizer, tmp_path, arch_fraction=0.4)
    assert text(found, tokenizer) == expected * 20
    assert learned(found, tokenizer) == answers * 20


def test_a_chosen_text_column_comes_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b", "body": LONG})
    tokenizer = of_bytes()
    assert learned(streams(path, tokenizer, tmp_path, text_column="body"), tokenizer) == LONG + "</s>"


def test_merged_tokens_at_the_border_of_an_answer() -> None:
    """Byte-level tokens carry the space before a word: `trim_offsets` places it, and lone spaces, on the right side."""
    tokenizer = assets.load_tokenizer()
    for prompt, answer in (("Q: why? A:", " because  of it \n"), ("Q: ", "x  "), ("Q \n\n", "\n\nx"), ("", "all")):
        document = records.Document(prompt + answer, ((len(prompt), len(prompt + answer)),))
        stored = data.decode(torch.from_numpy(tokens.encode([document], tokenizer, None)))
        of_answer = stored.labels[stored.labels != data.IGNORE]
        assert tokenizer.decode(stored.ids) == prompt + answer + "<|endoftext|>"
        assert tokenizer.decode(of_answer).lstrip() == f"{answer}<|endoftext|>".lstrip()


# ---- what is refused ------------------------------------------------------------------------------------------------


def talk(*messages: Any, **options: Any) -> tuple[Callable[[Path], Path], Any]:
    return lambda f: jsonl(f / "a.jsonl", {"messages": list(messages)}), of_bytes(**options)


def bytes_in(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
DROPS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
REWRITES = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
REFUSES = "{{ raise_exception('roles must alternate') }}"
LINE = json.dumps({"text": LONG}).encode() + b"\n"
BAD: dict[str, tuple[Callable[[Path], Path], Any, str]] = {
    "nowhere": (lambda f: f / "none.txt", of_bytes(), "does not exist; allowed: 'embedded', a file or folder of .txt"),
    "csv": (bytes_in("a.csv", b"a,b"), of_bytes(), "unknown extension '.csv'.*Allowed: .txt, .jsonl, .json, .parquet"),
    "extension": (bytes_in("a.jsonn", b""), of_bytes(), "Did you mean '.json"),
    "no-extension": (bytes_in("data", b"text"), of_bytes(), "unknown extension ''"),
    "folder": (lambda f: f, of_bytes(), "has no .txt, .jsonl, .json, .parquet files"),
    "empty-text": (bytes_in("a.txt", b""), of_bytes(), "has no text"),
    "empty-jsonl": (bytes_in("a.jsonl", b"\n"), of_bytes(), "has no text"),
    "empty-json": (bytes_in("a.json", b"[]"), of_bytes(), "has no text"),
    "only-bom": (bytes_in("a.txt", b"\xef\xbb\xbf"), of_bytes(), "has no text"),
    "short": (bytes_in("a.txt", b"abc"), of_bytes(), "1 and 2 training tokens, for .* are too few"),
    "few-held-out": (bytes_in("a.txt", b"abcdefgh" * 5), of_bytes(), "2 held-out tokens have nothing to evaluate"),
    "latin": (bytes_in("a.txt", b"\xff\xfe\xfa" * 100), of_bytes(), "a.txt' is not UTF-8 text"),
    "latin-jsonl": (bytes_in("a.jsonl", LINE + b'{"text": "\xe9"}'), of_bytes(), "a.jsonl' is not UTF-8 text"),
    "malformed": (bytes_in("a.jsonl", LINE + b'{"text": "x"\n' + LINE), of_bytes(), "a.jsonl: line 2 is not JSON"),
    "malformed-list": (bytes_in("a.json", b'[{"text": "a"},\n{]'), of_bytes(), "a.json is not JSON .* line 2"),
    "pretty": (bytes_in("a.json", b'{\n"data": []}'), of_bytes(), "line 1 is not JSON .* or a list of records"),
    "nested": (bytes_in("a.jsonl", b"[" * 200_000), of_bytes(), "line 1 "),
    "number": (bytes_in("a.jsonl", b"12\n"), of_bytes(), "line 1 is int, not a record"),
    "columns": (bytes_in("a.jsonl", LINE + b'{"question": "a", "answer": "b"}'), of_bytes(),
                "line 2 has the columns question, answer; allowed: text; prompt, completion; instruction, output"),
    "no-columns": (bytes_in("a.jsonl", b"{}"), of_bytes(), "line 1 has the columns none"),
    "not-text": (bytes_in("a.jsonl", b'{"text": 7}'), of_bytes(), "line 1: column 'text' holds int, not text"),
    "surrogate": (bytes_in("a.jsonl", b'{"text": "\\ud800"}'), of_bytes(), "half of a surrogate pair"),
    "parquet": (bytes_in("a.parquet", b"PAR1 no"), of_bytes(), "a.parquet' cannot be loaded"),
    "image": (*talk(USER, {**ANSWER, "content": [{"type": "image"}]}), "message 2: content holds list, not text"),
    "no-role": (*talk({"speaker": "me"}), "message 1 has neither role and content nor from and value"),
    "message-text": (*talk("hello"), "message 1 has neither"),
    "drops": (*talk(USER, ANSWER, template=DROPS), "leaves out an answer"),
    "rewrites": (*talk(USER, ANSWER, template=REWRITES), "rewrites the assistant's answers"),
    "refuses": (*talk(USER, ANSWER, template=REFUSES), "refuses the messages: roles must alternate"),
    "syntax": (*talk(USER, ANSWER, template="{% for"), "refuses the messages"),
    "no-tokenizer": (bytes_in("a.txt", LONG.encode()), None, "'embedded' has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_error(name: str, tmp_path: Path) -> None:
    make, tokenizer, message = BAD[name]
    (tmp_path / "in").mkdir()
    with pytest.raises(JointNASError, match=message):
        streams(make(tmp_path / "in"), tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json")) or "few" in name or name.startswith(("short", "empty", "only"))


def test_a_vocabulary_too_small_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / "cache"), seq_len=8, batch_size=2)
    for _ in range(2):
        with pytest.raises(JointNASError, match="gives the token id 257, but the model's vocabulary ends at 256"):
            data.load(config, of_bytes(), vocabulary=257)
    data.load(config, of_bytes(), vocabulary=258)
    with pytest.raises(JointNASError, match="vocabulary ends at 99"):  # from the file that is there now, too
        data.load(config, of_bytes(), vocabulary=100)
