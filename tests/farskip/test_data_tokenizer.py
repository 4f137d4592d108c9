"""The tokenizer: trained on the training split alone, deterministic, loadable by transformers; bad ones are refused."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from farskip import data_tokenizer
from farskip.data_config import DataConfig
from farskip.data_sources import Document
from farskip.data_tokenizer import build_tokenizer, tokenizer_fingerprint

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.py").write_text(text)
    return folder


def config_for(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"vocab_size": 300, **settings})


def test_trained_tokenizer_spells_everything_and_loads_in_transformers(corpus: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(config_for(corpus, vocab_size=280), tmp_path / "cache")
    assert len(tokenizer) == 280
    assert tokenizer.eos_token == "<|endoftext|>"
    odd = "tab\t ünïcode 漢字 \U0001f600  two  spaces , . !\r\n\x00"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in folder.iterdir()}
    again = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_training_is_deterministic(corpus: Path, tmp_path: Path) -> None:
    first = build_tokenizer(config_for(corpus), tmp_path / "one")
    second = build_tokenizer(config_for(corpus), tmp_path / "two")
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def test_using_a_tokenizer_does_not_change_its_fingerprint(corpus: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(config_for(corpus), tmp_path / "cache")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) != before


def test_training_never_sees_the_heldout_split(corpus: Path, tmp_path: Path) -> None:
    heldout = next(
        f"{i}" for i in range(1000) if Document(text="zqx " * 50 + f"{i}", messages=None, where="").is_heldout(0.1)
    )
    (corpus / "heldout.txt").write_text("zqx " * 50 + heldout)
    vocab = build_tokenizer(config_for(corpus, heldout_fraction=0.1), tmp_path / "cache").get_vocab()
    assert not any("zq" in entry for entry in vocab)
    vocab = build_tokenizer(config_for(corpus, heldout_fraction=0.0), tmp_path / "cache").get_vocab()
    assert any("zqx" in entry for entry in vocab)


def test_ranks_train_once_and_agree(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[Path] = []
    train = data_tokenizer._train

    def counted(texts: Any, config: DataConfig, folder: Path) -> None:
        trainings.append(folder)
        train(texts, config, folder)

    monkeypatch.setattr(data_tokenizer, "_train", counted)
    found: list[str] = []
    ranks = [
        threading.Thread(
            target=lambda: found.append(tokenizer_fingerprint(build_tokenizer(config_for(corpus), tmp_path / "cache")))
        )
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(trainings) == 1
    build_tokenizer(config_for(corpus, vocab_size=301), tmp_path / "cache")
    assert len(trainings) == 2


def test_a_failed_training_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "tokenizer.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        build_tokenizer(config_for(corpus), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_bare_tokenizer_file_needs_an_end_of_document_token(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "<end>": 2}, unk_token="[UNK]"))
    backend.add_special_tokens(["<end>"])
    file = tmp_path / "tokenizer.json"
    backend.save(str(file))
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=r"set data\.end_of_document; its special tokens are <end>"):
            build_tokenizer(config_for(tmp_path, tokenizer=str(path)), tmp_path)
        tokenizer = build_tokenizer(config_for(tmp_path, tokenizer=str(path), end_of_document="<end>"), tmp_path)
        assert tokenizer.eos_token_id == 2
        with pytest.raises(ValueError, match=r"data\.end_of_document='</s>' is not in the vocabulary"):
            build_tokenizer(config_for(tmp_path, tokenizer=str(path), end_of_document="</s>"), tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "is not a readable tokenizer.json"),
        ({"tokenizer.json": "{", "tokenizer_config.json": "{}"}, "cannot be loaded"),
        ({"tokenizer_config.json": json.dumps({"tokenizer_class": "NoSuchTokenizer"})}, "cannot be loaded"),
        (None, "does not exist"),
    ],
    ids=["empty", "broken file", "broken folder", "unknown class", "missing"],
)
def test_a_bad_tokenizer_is_refused_in_one_line(tmp_path: Path, content: dict[str, str] | None, reason: str) -> None:
    folder = tmp_path / "tokenizer"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        build_tokenizer(config_for(tmp_path, tokenizer=str(folder)), tmp_path)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_training_on_nothing_or_on_conversations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text to train a tokenizer on"):
        build_tokenizer(config_for(tmp_path), tmp_path / "cache")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: a conversation, but data\.tokenizer is null"):
        build_tokenizer(config_for(file), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.vocab_size=256 cannot hold"):
        build_tokenizer(config_for(file, vocab_size=256), tmp_path / "cache")


def test_the_module_does_not_pull_in_heavy_libraries() -> None:
    script = (
        "import sys, farskip.data; "
        "print([name for name in ('transformers', 'datasets', 'tokenizers', 'torchdata', 'pyarrow', 'jinja2') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
