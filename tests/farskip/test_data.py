"""The front door: configuration, real text, ranks that share one cache, and errors that reach every rank."""

import ast
import itertools
import sysconfig
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from farskip import data, data_config
from farskip.data import DataConfig, TextData, build_data, build_tokenizer

STDLIB_JSON = Path(sysconfig.get_path("stdlib")) / "json"


def no_barrier() -> None:
    return None


def config_for(tmp_path: Path, **settings: Any) -> DataConfig:
    defaults: dict[str, Any] = {
        "path": str(STDLIB_JSON),
        "patterns": ["*.py"],
        "vocab_size": 300,
        "sequence_length": 64,
        "batch_size": 2,
        "heldout_fraction": 0.0,
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**{**defaults, **settings})


def run_ranks(config: DataConfig, world_size: int) -> list[TextData | str]:
    """What build_data returns or says on each of several ranks that run at once."""
    tokenizer = build_tokenizer(config, config.cache_dir)
    barrier = threading.Barrier(world_size, timeout=20)
    results: list[TextData | str] = [""] * world_size

    def one_rank(rank: int) -> None:
        try:
            results[rank] = build_data(
                config, tokenizer, rank=rank, world_size=world_size, barrier=lambda: (barrier.wait(), None)[1]
            )
        except ValueError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_config_is_a_structured_config_and_every_field_is_documented() -> None:
    assert OmegaConf.to_object(OmegaConf.structured(DataConfig)) == DataConfig()
    tree = ast.parse(Path(data_config.__file__).read_text())
    (node,) = (item for item in tree.body if isinstance(item, ast.ClassDef))
    documented = {
        first.target.id
        for first, second in zip(node.body, node.body[1:], strict=False)
        if isinstance(first, ast.AnnAssign)
        and isinstance(first.target, ast.Name)
        and isinstance(second, ast.Expr)
        and isinstance(second.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(DataConfig)}


@pytest.mark.parametrize(
    "change",
    [
        {"path": ""},
        {"format": "csv"},
        {"patterns": []},
        {"text_field": None, "messages_field": None},
        {"sequence_length": 1},
        {"batch_size": 0},
        {"max_documents": 0},
        {"seed": -1},
        {"vocab_size": 256},
        {"heldout_fraction": 1.0},
        {"heldout_fraction": -0.1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    config = config_for(tmp_path, **change)
    with pytest.raises(ValueError, match=f"data.{next(iter(change))}") as error:
        build_tokenizer(config, tmp_path)
    assert "\n" not in str(error.value)
    config_for(tmp_path).check()


def test_real_text_makes_the_round_trip(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    tokenizer = build_tokenizer(config, config.cache_dir)
    text = build_data(config, tokenizer, rank=0, world_size=1, barrier=no_barrier)
    sources = [file.read_text() for file in sorted(STDLIB_JSON.glob("*.py"))]
    assert text.num_train_tokens == sum(len(ids) + 1 for ids in tokenizer(sources)["input_ids"])
    assert text.num_heldout_tokens == 0
    loader = text.train_batches()
    pieces: list[str] = []
    for batch in itertools.islice(loader, text.num_train_tokens // (2 * 64)):
        assert batch.input_ids_BS.shape == batch.labels_BS.shape == batch.position_ids_BS.shape == (2, 64)
        assert batch.input_ids_BS.dtype == batch.labels_BS.dtype == batch.position_ids_BS.dtype == torch.int64
        pieces += tokenizer.batch_decode(batch.input_ids_BS)
    assert loader.epoch == 0
    whole = "<|endoftext|>".join(sources) + "<|endoftext|>"
    assert all(piece in whole + "<|endoftext|>" * 64 for piece in pieces)


def test_description_counts_what_was_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / "test").mkdir(parents=True)
    for name, content in (("a.txt", b"a" * 300), ("b.txt", b"\xff"), ("c.txt", b""), ("test/d.txt", b"d")):
        (folder / name).write_bytes(content)
    config = config_for(tmp_path, path=str(folder), patterns=["*.txt"], exclude=["test"])
    tokenizer = build_tokenizer(config, config.cache_dir)
    for _ in range(2):  # the second time from the cache
        line = build_data(config, tokenizer, rank=0, world_size=1, barrier=no_barrier).describe()
        assert "skipped: 1 files excluded, 1 files not UTF-8, 1 documents empty" in line
        assert "1 training documents" in line and "\n" not in line


def test_ranks_share_what_rank_0_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pack_text = data.pack_text

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return pack_text(*arguments)

    monkeypatch.setattr(data, "pack_text", counted)
    config = config_for(tmp_path, heldout_path=str(STDLIB_JSON))
    ranks = run_ranks(config, 3)
    assert len(calls) == 1
    views = [rank for rank in ranks if isinstance(rank, TextData)]
    assert len(views) == 3 and len({view.num_train_tokens for view in views}) == 1
    one = config_for(tmp_path, heldout_path=str(STDLIB_JSON), batch_size=6)
    (alone,) = run_ranks(one, 1)
    assert isinstance(alone, TextData)
    batches = [next(view.train_batches()).input_ids_BS for view in views]
    assert torch.equal(torch.cat(batches), next(alone.train_batches()).input_ids_BS)
    heldout = [view.heldout_batches(2) for view in views]
    for number, batch in enumerate(alone.heldout_batches(2)):
        assert torch.equal(torch.cat([part[number].labels_BS for part in heldout]), batch.labels_BS)


def test_every_rank_learns_why_rank_0_failed(tmp_path: Path) -> None:
    config = config_for(tmp_path, tokenizer=None)
    build_tokenizer(config, config.cache_dir)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{"text": \n')
    good = build_tokenizer(config, config.cache_dir).name_or_path
    results = run_ranks(config_for(tmp_path, path=str(file), tokenizer=good), 3)
    assert all(isinstance(result, str) and f"{file}, line 2" in result for result in results)
    assert str(results[2]).startswith("rank 2: rank 0 could not prepare the text")
    file.write_text('{"text": "' + "good " * 1000 + '"}\n')  # the old reason does not outlive its cause
    assert all(
        isinstance(result, TextData) for result in run_ranks(config_for(tmp_path, path=str(file), tokenizer=good), 3)
    )


def test_a_cache_that_is_not_shared_is_named(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    tokenizer = build_tokenizer(config, config.cache_dir)
    with pytest.raises(ValueError, match=r"rank 1 does not see .* all hosts share"):
        build_data(config, tokenizer, rank=1, world_size=2, barrier=no_barrier)
    with pytest.raises(ValueError, match="rank=2 must be at least 0 and below world_size=2"):
        build_data(config, tokenizer, rank=2, world_size=2, barrier=no_barrier)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    config = config_for(tmp_path, max_documents=1, sequence_length=4096, batch_size=4)
    text = build_data(config, build_tokenizer(config, config.cache_dir), rank=0, world_size=1, barrier=no_barrier)
    with pytest.raises(ValueError, match=r"the training text fills \d sequences of 4096 tokens, but .* needs 4"):
        text.train_batches()
    with pytest.raises(ValueError, match="there is no held-out text"):
        text.heldout_batches(1)
    with pytest.raises(ValueError, match="ask for at least 1"):
        text.heldout_batches(0)


def test_a_position_in_another_text_is_refused(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    tokenizer = build_tokenizer(config, config.cache_dir)
    loader = build_data(config, tokenizer, rank=0, world_size=1, barrier=no_barrier).train_batches()
    other = config_for(tmp_path, max_documents=2)
    text = build_data(other, tokenizer, rank=0, world_size=1, barrier=no_barrier)
    says = "saved position in the data is for data.max_documents=None, but this run has data.max_documents=2; restore"
    with pytest.raises(ValueError, match=says):
        text.train_batches().load_state_dict(loader.state_dict())
    shorter = config_for(tmp_path, sequence_length=config.sequence_length // 2)
    text = build_data(shorter, tokenizer, rank=0, world_size=1, barrier=no_barrier)
    says = f"data.sequence_length={config.sequence_length}, but this run has data.sequence_length="
    with pytest.raises(ValueError, match=says):
        text.train_batches().load_state_dict(loader.state_dict())
    older = {name: value for name, value in loader.state_dict().items() if name != "packed_by"}
    with pytest.raises(ValueError, match="saved position in the data is for packed text=packed-"):
        text.train_batches().load_state_dict(older)
