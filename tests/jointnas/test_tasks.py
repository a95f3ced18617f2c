"""The paper's seven tasks from local files in the data sets' own columns, few-shot, without network; bad files."""

from __future__ import annotations

import json
import math
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from lm_eval import tasks as catalogue
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas import assets
from jointnas.config import EvalConfig
from jointnas.evaluation import accuracy
from jointnas.tasks import PAPER, Tasks, load_tasks
from jointnas_kernels.errors import JointNASError

Rows = list[dict[str, Any]]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "by", "our", "old", "red", "house"]
SHOTS = {"winogrande": 5, "hellaswag": 10, "arc_challenge": 25, "mmlu": 5, "boolq": 0, "piqa": 0, "arc_easy": 0}
QUESTIONS = 3


def subjects() -> list[str]:
    folder = Path(catalogue.__file__).parent / "mmlu" / "default"
    return [yaml.safe_load(f.read_text())["dataset_name"] for f in sorted(folder.glob("mmlu_*.yaml"))]


def text(rng: random.Random, words: int = 4) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def winogrande(rng: random.Random, i: int) -> dict[str, Any]:
    return {"sentence": f"{text(rng)} because the _ {text(rng)}.", "option1": "cat", "option2": "dog",
            "answer": str(1 + i % 2)}  # fmt: skip


def hellaswag(rng: random.Random, i: int) -> dict[str, Any]:
    return {"ind": i, "activity_label": "Running a dog", "ctx_a": text(rng).capitalize() + ".", "ctx_b": "the man",
            "ctx": "", "endings": [f"{text(rng)} [step] {text(rng, 2)}." for _ in range(4)], "source_id": "x~1",
            "split": "val", "split_type": "indomain", "label": str(i % 4)}  # fmt: skip


def arc(rng: random.Random, i: int) -> dict[str, Any]:
    labels = ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3"]  # both kinds are in the data set
    return {"id": f"Mercury_{i}", "question": f"Which {text(rng)}?", "answerKey": labels[i % 3],
            "choices": {"text": [text(rng, 2) for _ in labels], "label": labels}}  # fmt: skip


def boolq(rng: random.Random, i: int) -> dict[str, Any]:
    return {"question": f"is {text(rng)}", "passage": f"{text(rng, 12)}.", "idx": i, "label": i % 2}


def piqa(rng: random.Random, i: int) -> dict[str, Any]:
    return {"goal": f"To {text(rng)}", "sol1": text(rng), "sol2": text(rng), "label": i % 2}


def mmlu(rng: random.Random, i: int) -> dict[str, Any]:
    return {"question": f"{text(rng)}?", "subject": "", "choices": [text(rng, 2) for _ in range(4)], "answer": i % 4}


def jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven data sets, small, in their own columns; JSON lines and Parquet, folders and a single file."""
    root, rng = tmp_path_factory.mktemp("task files"), random.Random(0)

    def rows(make: Any, count: int = QUESTIONS) -> Rows:
        return [make(rng, i) for i in range(count)]

    jsonl(root / "winogrande" / "train.jsonl", rows(winogrande, 8))
    jsonl(root / "winogrande" / "validation.jsonl", rows(winogrande))
    jsonl(root / "hellaswag" / "train-00000-of-00002.jsonl", rows(hellaswag, 6))
    jsonl(root / "hellaswag" / "train-00001-of-00002.jsonl", rows(hellaswag, 6))
    jsonl(root / "hellaswag" / "validation.jsonl", rows(hellaswag))
    (root / "arc_challenge").mkdir()
    for split, count in (("train", 27), ("test", QUESTIONS)):
        table = pyarrow.Table.from_pylist(rows(arc, count))
        pyarrow.parquet.write_table(table, root / "arc_challenge" / f"{split}-00000-of-00001.parquet")
    of = subjects()
    jsonl(root / "mmlu" / "dev.jsonl", [{**row, "subject": s} for s in of for row in rows(mmlu, 5)])
    jsonl(root / "mmlu" / "test.jsonl", [{**row, "subject": s} for s in of for row in rows(mmlu, 2)])
    jsonl(root / "boolq" / "validation.jsonl", rows(boolq))
    jsonl(root / "piqa.jsonl", rows(piqa))
    jsonl(root / "arc_easy" / "test.jsonl", rows(arc))
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        pytest.fail(f"network was used: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        vocab_size=4096, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def direct(model: LlamaForCausalLM, prompts: list[tuple[str, str]]) -> list[float]:
    """Log-likelihood of each continuation of a context, one sequence at a time."""
    tokenizer, scores = assets.load_tokenizer(), []
    for context, continuation in prompts:
        start = len(tokenizer(context).input_ids)
        ids = torch.tensor([tokenizer(context + continuation).input_ids])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(float(logp.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
    return scores


def test_the_papers_seven_tasks_offline(files: Path, model: LlamaForCausalLM) -> None:
    assert {name: shots for name, (shots, _) in PAPER.items()} == SHOTS
    tasks = load_tasks(EvalConfig(tasks=["paper"], task_files=str(files)))
    # ARC-c's 25 examples: the longest prompt
    assert tasks.longest.count("Question: ") == 26
    results = accuracy(model, assets.load_tokenizer(), tasks)
    assert list(results) == [*SHOTS, "mean"]
    for name, shots in SHOTS.items():
        row, count = results[name], 2 * 57 if name == "mmlu" else QUESTIONS
        assert (row["shots"], row["items"]) == (shots, count)
        assert ("acc_norm" in row) == (name not in ("winogrande", "mmlu", "boolq"))
        assert row["acc"] * count == pytest.approx(round(row["acc"] * count))
        assert "acc_stderr" in row
        if name != "mmlu":  # sqrt(p (1 - p) / (n - 1)); of a group, lm-eval pools its tasks
            assert row["acc_stderr"] == pytest.approx(math.sqrt(row["acc"] * (1 - row["acc"]) / (count - 1)))
    assert results["mean"]["acc"] == pytest.approx(sum(results[n]["acc"] for n in SHOTS) / 7)


def test_scores_are_those_of_the_definition(files: Path, model: LlamaForCausalLM) -> None:
    """PIQA, zero-shot: the question's template and both scores, computed directly."""
    results = accuracy(model, assets.load_tokenizer(), load_tasks(EvalConfig(tasks=["piqa"], task_files=str(files))))
    right = norm = 0
    for line in (files / "piqa.jsonl").read_text().splitlines():
        row = json.loads(line)
        choices = [row["sol1"], row["sol2"]]
        scores = direct(model, [(f"Question: {row['goal']}\nAnswer:", f" {c}") for c in choices])
        right += scores.index(max(scores)) == row["label"]
        per = [s / len(c) for s, c in zip(scores, choices, strict=True)]
        norm += per.index(max(per)) == row["label"]
    assert results["piqa"]["acc"] == pytest.approx(right / QUESTIONS)
    assert results["piqa"]["acc_norm"] == pytest.approx(norm / QUESTIONS)


def test_every_model_sees_the_same_examples(files: Path, model: LlamaForCausalLM) -> None:
    tasks = load_tasks(EvalConfig(tasks=["winogrande"], task_files=str(files)))
    asked = []
    for _ in range(2):
        accuracy(model, assets.load_tokenizer(), tasks)
        asked.append([instance.args for instance in tasks.tasks["winogrande"].instances])
    assert len(asked[0]) == 2 * QUESTIONS
    assert asked[0] == asked[1]
    assert len({prompt for prompt, _ in asked[0]}) > 1


def test_shots_can_be_set(files: Path) -> None:
    tasks = load_tasks(EvalConfig(tasks=["arc_challenge", "gloss"], task_files=str(files), shots=2))
    assert tasks.shots == {"arc_challenge": 2, "gloss": 0}  # the embedded tasks have no examples
    assert tasks.longest.count("Question: ") == 3


def test_one_subject_of_mmlu(files: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (files / "mmlu" / "dev.jsonl").read_text().splitlines()][:5]
    for split in ("dev", "test"):
        jsonl(tmp_path / "mmlu_anatomy" / f"{split}.jsonl", rows)
    tasks = load_tasks(EvalConfig(tasks=["mmlu"], task_files=str(files)))
    assert len(tasks.members("mmlu")) == 57
    with pytest.raises(JointNASError, match=r"mmlu/test\.jsonl or .*mmlu/test\.parquet is missing"):
        load_tasks(EvalConfig(tasks=["mmlu"], task_files=str(tmp_path)))


def damaged(root: Path, case: str) -> None:
    """Makes one of the files bad."""
    path = root / "piqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if case == "missing":
        path.unlink()
    elif case == "examples":
        (root / "winogrande" / "train.jsonl").unlink()
    elif case == "too few":
        lines = (root / "winogrande" / "train.jsonl").read_text().splitlines()
        (root / "winogrande" / "train.jsonl").write_text("\n".join(lines[:3]))
    elif case == "columns":
        jsonl(path, [{"goal": r["goal"], "solution1": r["sol1"], "sol2": r["sol2"], "label": 0} for r in rows])
    elif case == "label":
        jsonl(path, [{k: v for k, v in r.items() if k != "label"} for r in rows])
    elif case == "hidden answers":
        jsonl(path, [{**r, "label": -1} for r in rows])
    elif case == "ragged":
        jsonl(path, [rows[0], {"goal": "x"}])
    elif case == "no json":
        path.write_text('{"goal": \n')
    elif case == "latin":
        path.write_bytes(b'{"goal": "caf\xe9"}\n')
    elif case == "empty":
        path.write_text("")
    elif case == "parquet":
        path.unlink()
        (root / "piqa.parquet").write_bytes(b"no parquet")
    elif case == "subject":
        lines = (root / "mmlu" / "test.jsonl").read_text().splitlines()
        (root / "mmlu" / "test.jsonl").write_text("\n".join(line for line in lines if '"virology"' not in line))


BAD = {
    "missing": "task 'piqa': {f}/piqa/validation.jsonl or {f}/piqa/validation.parquet is missing (the questions",
    "examples": "winogrande/train.jsonl or {f}/winogrande/train.parquet is missing (the 5 few-shot examples",
    "too few": "task 'winogrande': too few examples for 5 shots",
    "columns": "rows of {f}/piqa, with columns goal, solution1, sol2, label, are not those of 'baber/piqa' (",
    "label": "answer 'label' of row 0 is none of its 2 choices",
    "hidden answers": "answer -1 of row 0 is none of its 2 choices",
    "ragged": "{f}/piqa.jsonl:2 does not have the columns of the first line: goal, sol1, sol2, label",
    "no json": "{f}/piqa.jsonl:1 is not JSON",
    "latin": "{f}/piqa.jsonl is not UTF-8",
    "empty": "task 'piqa': {f}/piqa has no rows in its split 'validation'",
    "parquet": "{f}/piqa.parquet is no Parquet file",
    "subject": "task 'mmlu_virology': {f}/mmlu has no rows with subject 'virology' in its split 'test'",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_error(case: str, files: Path, tmp_path: Path) -> None:
    root = tmp_path / "files"
    shutil.copytree(files, root)
    damaged(root, case)
    name = {"examples": "winogrande", "too few": "winogrande", "subject": "mmlu"}.get(case, "piqa")
    with pytest.raises(JointNASError) as error:
        load_tasks(EvalConfig(tasks=[name], task_files=str(root)))
    assert BAD[case].replace("{f}", str(root)) in str(error.value)


def test_no_folder() -> None:
    with pytest.raises(JointNASError, match="folder 'nowhere' does not exist"):
        load_tasks(EvalConfig(tasks=["paper"], task_files="nowhere"))


def test_data_that_cannot_be_fetched_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(JointNASError, match=r"'piqa': its data set 'baber/piqa' cannot .* \(Couldn't reach.*give"):
        load_tasks(EvalConfig(tasks=["piqa"]))


@pytest.mark.slow
def test_unknown_task_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(JointNASError, match=r"Did you mean 'hellaswag'\?.*embedded, paper"):
        load_tasks(EvalConfig(tasks=["helaswag"]))


def test_no_tasks() -> None:
    assert load_tasks(EvalConfig(tasks=[])) == Tasks()
