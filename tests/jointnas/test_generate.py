"""`jointnas generate`: text as it comes, the speed behind it, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from jointnas import assets, cli, exporting
from jointnas.verbs.generate import generate
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import convert, extract
from jointnas_kernels.space import SearchSpace
from tests.jointnas.test_evaluate import model

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a quantized model, whose tokenizer has a chat template."""
    root = tmp_path_factory.mktemp("a model")
    tokenizer = assets.load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model().save_pretrained(root / "plain")
    space = SearchSpace((64,), (2,), (32,), (64,), (1,), (4,), (8,), group_size=32)
    choice = convert(plain := model(), space).space.full()
    supernet = convert(plain, space)
    exporting.export_model(extract(supernet, choice), root / "packed", choice, range(1), tokenizer=tokenizer)
    tokenizer.save_pretrained(root / "plain")
    return root


def test_text_comes_and_then_its_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plain", "packed"):
        assert cli.main(["generate", "--model", str(folder / name), "--prompt", "the ship", "--max-tokens", "5"]) == 0
        *text, speed, path = capsys.readouterr().out.splitlines()
        assert text
        assert re.fullmatch(r"\d+ tokens read, 5 written: prefill [\d.]+ tokens/s, decode [\d.]+ tokens/s", speed)
        assert path == "prompts: 1, decode steps: 4; the latest call was one of them"


def test_templates_are_used_where_there_are_some(folder: Path) -> None:
    source = str(folder / "plain")
    tokens = assets.load_tokenizer()
    plain, chat = (generate("the ship", source, 3, chat=c, stream=False) for c in (False, True))
    assert plain.prompt_tokens == len(tokens("the ship")["input_ids"])
    assert chat.prompt_tokens == len(tokens("<user> the ship\n<assistant>", add_special_tokens=False)["input_ids"])
    assert generate("the ship", source, 3, stream=False).prompt_tokens == chat.prompt_tokens
    with pytest.raises(JointNASError, match="'embedded' has no chat template"):
        generate("the ship", chat=True)


def test_draws_repeat_with_their_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [generate("it", temperature=1.5, seed=s, max_tokens=12, stream=False).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert not capsys.readouterr().out


def test_the_end_of_text_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does it: the token itself is not shown. Of one token there is no decode speed."""
    first = generate("the ship", max_tokens=1, stream=False)
    assert (first.new_tokens, first.decode_tokens_per_s) == (1, None)
    load = assets.load_model

    def ended(dtype: torch.dtype) -> Any:
        found: Any = load(dtype)
        ids = assets.load_tokenizer()("the ship", return_tensors="pt")["input_ids"]
        found.generation_config.eos_token_id = int(found(ids).logits[0, -1].argmax())
        return found

    monkeypatch.setattr(assets, "load_model", ended)
    assert generate("the ship", max_tokens=9, stream=False).new_tokens == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: above 0, at most 1"),
        ({"prompt": "ship " * 5000}, r"the prompt has \d+ tokens; this model takes 1 to"),
        ({"model": "/nowhere/at/all"}, "does not exist"),
        ({"dtype": "int3"}, "dtype"),
    ],
)
def test_bad_arguments(how: dict[str, Any], reason: str) -> None:
    with pytest.raises(JointNASError, match=reason):
        generate(**{"prompt": "the ship", "stream": False, **how})
