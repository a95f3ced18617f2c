"""Build the embedded assets from the source texts: ``python -m jointnas.assets.prepare corpus SOURCE_DIR`` (then
``tokenizer``, ``tasks``). Deterministic; the results are committed, so only a change of the assets needs this.

Source texts: ``austen``, ``web_bible``, ``jargon``, ``wordnet`` as ``NAME.txt.gz``, one paragraph (or one
"words is gloss") per line; ``corpus/NOTICE.md`` says where they come from.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import re
from pathlib import Path

from jointnas import assets

# consecutive paragraphs per document (so that the split is by document, not by paragraph): about 1-4 kB each
PARAGRAPHS = {"austen": 12, "web_bible": 2, "jargon": 8, "wordnet": 1}
WORDNET_XZ_BYTES = 1_450_000  # size limit of the assets: prose is kept whole, the glosses are sampled
VOCAB_SIZE = 4096
END = "<|endoftext|>"
QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u00a0": " ", "\u2013": "-"})


def _clean(line: str) -> str:
    try:  # the Jargon File's source was UTF-8 read as Latin-1
        line = line.encode("latin-1").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        pass
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator(assets.documents("train"), trainer)
    tok.post_processor = processors.TemplateProcessing(single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False,
        model_max_length=256,
    )  # fmt: skip
    fast.save_pretrained(assets.model_dir())
    tok.save(str(assets.model_dir() / "tokenizer.json"), pretty=False)  # half the size of the indented form


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("corpus", "tokenizer", "tasks"))
    parser.add_argument("source_dir", type=Path, nargs="?")
    args = parser.parse_args(argv)
    if args.what == "corpus":
        corpus(args.source_dir)
    elif args.what == "tokenizer":
        tokenizer()


if __name__ == "__main__":
    main()
