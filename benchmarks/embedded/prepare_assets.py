"""Build the embedded assets from the source texts: ``python benchmarks/embedded/prepare_assets.py corpus SOURCE_DIR``
(then ``tokenizer``, ``tasks``). Deterministic; the results are committed, so only a change of the assets needs this.

Source texts: ``austen``, ``web_bible``, ``jargon``, ``wordnet`` as ``NAME.txt.gz``, one paragraph (or one
"words is gloss") per line; ``NOTICE.md`` says where they come from.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jointnas import assets

# consecutive paragraphs per document (so that the split is by document, not by paragraph): about 1-4 kB each
PARAGRAPHS = {"austen": 12, "web_bible": 2, "jargon": 8, "wordnet": 1}
WORDNET_XZ_BYTES = 1_450_000  # size limit of the assets: prose is kept whole, the glosses are sampled
VOCAB_SIZE = 4096
ITEMS = 256  # per task: a standard error of about 3 points
PROSE = ("austen", "web_bible", "jargon")
END = "<|endoftext|>"
QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u00a0": " ", "\u2013": "-"})


def _clean(line: str) -> str:
    with contextlib.suppress(UnicodeError):  # the Jargon File's source was UTF-8 read as Latin-1
        line = line.encode("latin-1").decode("utf-8")
    line = line.translate(QUOTES).replace("\u2014", "--")
    return re.sub(r"\s+", " ", "".join(c for c in line if c.isprintable())).strip()


def _xz(text: str) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    return lzma.compress(text.encode(), format=lzma.FORMAT_XZ, filters=filters)


def _keep_gloss(line: str) -> bool:
    """Glosses of ordinary lower-case words; names of people, places and taxa are left out."""
    words, _, gloss = line.partition(" is ")
    return bool(re.fullmatch(r"[a-z][a-z' -]*(, [a-z][a-z' -]*)*", words)) and 20 <= len(gloss) <= 300


def corpus(source_dir: Path) -> None:
    """Clean, de-duplicate, group into documents, compress."""
    out, seen, record = assets.corpus_dir(), set[str](), {}
    out.mkdir(exist_ok=True)
    for name in assets.SOURCES:
        raw = gzip.decompress((source_dir / f"{name}.txt.gz").read_bytes())
        lines = []
        for line in map(_clean, raw.decode().split("\n")):
            key = re.sub(r"\W+", " ", line.lower()).strip()
            if line and key not in seen and (name != "wordnet" or _keep_gloss(line)):
                seen.add(key)
                lines.append(line)
        if name == "wordnet":  # a fixed pseudo-random sample, as many as fit; corpus order compresses better
            rank = sorted(range(len(lines)), key=lambda i: hashlib.sha256(b"sample" + lines[i].encode()).digest())
            size = len(_xz("\n\n".join(lines)))
            keep = set(rank[: int(len(lines) * (WORDNET_XZ_BYTES / size) ** 1.05)])
            lines = [line for i, line in enumerate(lines) if i in keep]
        step = PARAGRAPHS[name]
        documents = ["\n".join(lines[i : i + step]) for i in range(0, len(lines), step)]
        text = "\n\n".join(documents)
        packed, suffix = (_xz(text), "xz") if name == "wordnet" else (bz2.compress(text.encode(), 9), "bz2")
        (out / f"{name}.txt.{suffix}").write_bytes(packed)
        record[name] = {
            "documents": len(documents), "paragraphs": len(lines), "bytes": len(text.encode()), "packed": len(packed),
            "source_sha256": hashlib.sha256(raw).hexdigest(), "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }  # fmt: skip
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def tokenizer() -> None:
    """Byte-level BPE learnt on the training split only."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator(assets.documents("train"), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False,
        model_max_length=256,
    )  # fmt: skip
    fast.save_pretrained(assets.model_dir())
    tok.save(str(assets.model_dir() / "tokenizer.json"), pretty=False)  # half the size of the indented form


# ---- tasks: four choices each, all text from the test split ----

Item = dict[str, object]


def _item(rng: random.Random, query: str, right: str, wrong: list[str]) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "answer": choices.index(right)}


def _pieces(context: int, piece: int) -> list[tuple[str, str, list[str], list[str]]]:
    """(source, paragraph, `context` words, the next `piece` words): disjoint stretches of held-out prose."""
    found = []
    for source in PROSE:
        for document in assets.documents("test", (source,)):
            for paragraph in document.split("\n"):
                words = paragraph.split()
                for i in range(0, len(words) - context - piece + 1, context + piece):
                    chunk = words[i : i + context + piece]
                    found.append((source, paragraph, chunk[:context], chunk[context:]))
    return found


def continuation_task(rng: random.Random) -> list[Item]:
    """24 words of prose; which 12 words come next: the true ones, or 12 from another paragraph of the same source?"""
    pieces = _pieces(24, 12)
    items = []
    for source, paragraph, before, after in pieces:
        others = [p for p in pieces if p[0] == source and p[1] != paragraph]
        wrong = [" ".join(p[3]) for p in rng.sample(others, 3)]
        items.append(_item(rng, " ".join(before), " ".join(after), wrong))
    return items


def word_task(rng: random.Random) -> list[Item]:
    """24 words of prose; which word comes next: the true one, or three about as frequent in the same source?"""
    plain = re.compile(r"[a-z]{4,}")
    ranked = {}
    for source in PROSE:
        counts = Counter(w for d in assets.documents("train", (source,)) for w in d.split() if plain.fullmatch(w))
        ranked[source] = [w for w, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if n >= 20]
    items = []
    for source, _, before, after in _pieces(24, 1):
        words = ranked[source]
        if after[0] in words:
            rank = words.index(after[0])
            near = [w for w in words[max(0, rank - 15) : rank + 16] if w != after[0] and w not in before]
            items.append(_item(rng, " ".join(before), after[0], rng.sample(near, 3)))
    return items


def order_task(rng: random.Random) -> list[Item]:
    """16 words of prose; which next 10 words are undisturbed? In the others one pair of neighbours is swapped."""
    items = []
    for _, _, before, after in _pieces(16, 10):
        swaps = [
            i for i in range(len(after) - 1)
            if after[i] != after[i + 1] and all(re.fullmatch("[a-z]+", w) for w in after[i : i + 2])
        ]  # fmt: skip
        if len(swaps) >= 3:
            wrong = []
            for i in rng.sample(swaps, 3):
                words = list(after)
                words[i], words[i + 1] = words[i + 1], words[i]
                wrong.append(" ".join(words))
            items.append(_item(rng, " ".join(before), " ".join(after), wrong))
    return items


def gloss_task(rng: random.Random) -> list[Item]:
    """A WordNet entry's words and "is"; which gloss is theirs? The others are other words' glosses of equal length."""
    entries = []
    for document in assets.documents("test", ("wordnet",)):
        words, _, gloss = document.partition(" is ")
        definition = re.split(r"[;(:]", gloss)[0].strip()
        if 4 <= len(definition.split()) <= 12:
            entries.append((words, definition))
    items = []
    for words, right in entries:
        near = [g for _, g in entries if g != right and abs(len(g) - len(right)) <= 4]
        items.append(_item(rng, f"{words} is", right, rng.sample(near, 3)))
    return items


TASKS = {"continuation": continuation_task, "word": word_task, "order": order_task, "gloss": gloss_task}
YAML = """\
task: jointnas_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl  # relative: run lm_eval in this folder
test_split: test
output_type: multiple_choice
num_fewshot: 0
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def tasks() -> None:
    """Write the JSONL and YAML files; items are in random order, so that any prefix is a fair sample."""
    out = assets.task_dir()
    out.mkdir(exist_ok=True)
    for name, make in TASKS.items():
        rng = random.Random(f"jointnas {name}")
        items = make(rng)
        rng.shuffle(items)
        lines = [json.dumps(item, ensure_ascii=False, separators=(",", ":")) + "\n" for item in items[:ITEMS]]
        (out / f"{name}.jsonl").write_text("".join(lines))
        (out / f"{name}.yaml").write_text(YAML.format(name=name))
        print(f"{name}: {len(lines)} of {len(items)} items, {sum(map(len, lines))} bytes")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("corpus", "tokenizer", "tasks"))
    parser.add_argument("source_dir", type=Path, nargs="?")
    args = parser.parse_args(argv)
    if args.what == "corpus":
        corpus(args.source_dir)
    elif args.what == "tokenizer":
        tokenizer()
    else:
        tasks()


if __name__ == "__main__":
    main()
