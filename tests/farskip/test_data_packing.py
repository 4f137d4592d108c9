"""Packing: every token used once, nothing predicted across a boundary; the cache is complete or not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farskip import data_packing
from farskip.batch import IGNORED_LABEL
from farskip.data_config import DataConfig
from farskip.data_loader import PackedSequences
from farskip.data_packing import PackedSplit, PackedText, _Writer, pack_text

END = 0
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = special + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])
    tokenizer.chat_template = template
    return tokenizer


def config_for(tmp_path: Path, **settings: Any) -> DataConfig:
    defaults = {"path": str(tmp_path / "text"), "cache_dir": str(tmp_path / "cache"), "heldout_fraction": 0.0}
    return DataConfig(**{**defaults, "sequence_length": 16, **settings})


def write_text(folder: Path, *documents: str) -> None:
    folder.mkdir(exist_ok=True)
    for i, document in enumerate(documents):
        (folder / f"{i:03}.txt").write_text(document)


def expected_rows(documents: list[tuple[list[int], list[bool]]], length: int) -> list[tuple[list[int], ...]]:
    """Input ids, labels and positions of each sequence, written down token by token."""
    stream = [
        (token, flag, number)
        for number, (ids, trained) in enumerate(documents)
        for token, flag in zip(ids, trained, strict=True)
    ]
    stream += [(END, False, -1)] * (-len(stream) % length)
    rows: list[tuple[list[int], ...]] = []
    for first in range(0, len(stream), length):
        row = stream[first : first + length]
        labels: list[int] = []
        positions: list[int] = []
        for s, (_, _, document) in enumerate(row):
            following = row[s + 1] if s + 1 < length else None
            is_label = following is not None and following[2] == document and following[1]
            labels.append(following[0] if is_label and following else IGNORED_LABEL)
            positions.append(positions[-1] + 1 if s and row[s - 1][2] == document else 0)
        rows.append(([token for token, *_ in row], labels, positions))
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=8
    ),
    length=st.integers(2, 7),
)
def test_packing_equals_its_definition(tmp_path: Path, documents: list[list[tuple[int, bool]]], length: int) -> None:
    split_documents = [([token for token, _ in document], [flag for _, flag in document]) for document in documents]
    with _Writer(tmp_path, "train", length) as writer:
        for ids, trained in split_documents:
            writer.add(ids, trained)
        split = writer.close(END)
    batch = PackedSequences(tmp_path, "train", split.num_sequences, length).__getitems__(
        list(range(split.num_sequences))
    )
    rows = zip(batch.input_ids_BS.tolist(), batch.labels_BS.tolist(), batch.position_ids_BS.tolist(), strict=True)
    assert list(rows) == expected_rows(split_documents, length)
    assert split.num_tokens == sum(map(len, documents)) and split.num_documents == len(documents)
    assert split.num_labels == batch.num_labels()


def all_rows(packed: PackedText, split: str = "train", length: int = 16) -> Any:
    described: PackedSplit = getattr(packed, split)
    sequences = PackedSequences(packed.folder, split, described.num_sequences, length)
    return sequences.__getitems__(list(range(described.num_sequences)))


def test_text_comes_back_whole(tmp_path: Path) -> None:
    documents = ["short", "a document that is longer than a sequence of sixteen bytes — ünïcode", "x"]
    write_text(tmp_path / "text", *documents)
    tokenizer = byte_tokenizer()
    packed = pack_text(config_for(tmp_path), tokenizer)
    batch = all_rows(packed)
    stream = batch.input_ids_BS.flatten().tolist()
    assert tokenizer.decode(stream[: packed.train.num_tokens]) == "".join(text + "<|endoftext|>" for text in documents)
    assert set(stream[packed.train.num_tokens :]) <= {tokenizer.eos_token_id}
    # All that is in a document but at the head of a piece is predicted, the end of each document too.
    num_pieces = int((batch.position_ids_BS == 0).sum()) - (packed.train.num_tokens % 16 > 0)
    assert packed.train.num_labels == packed.train.num_tokens - num_pieces


def test_a_tokenizer_that_ends_documents_itself_is_not_doubled(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "abc")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    packed = pack_text(config_for(tmp_path), tokenizer)
    assert (
        tokenizer.decode(all_rows(packed).input_ids_BS[0, : packed.train.num_tokens]) == "<|im_start|>abc<|endoftext|>"
    )


def test_conversations_are_packed_with_the_users_words_ignored(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": talk}) + "\n")
    tokenizer = byte_tokenizer(CHATML)
    packed = pack_text(config_for(tmp_path, path=str(tmp_path / "a.jsonl"), sequence_length=256), tokenizer)
    labels = all_rows(packed, length=256).labels_BS.flatten()
    assert tokenizer.decode(labels[labels != IGNORED_LABEL]) == "answer<|im_end|>" * 2
    for messages, reason in ((talk[:1], "none of the .* train tokens can be trained on"), ([], "holds no text")):
        (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        with pytest.raises(ValueError, match=reason):
            pack_text(config_for(tmp_path, path=str(tmp_path / "b.jsonl")), tokenizer)


def test_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    documents = [f"document number {i}" for i in range(60)]
    write_text(tmp_path / "text", *documents)
    tokenizer = byte_tokenizer()
    packed = pack_text(config_for(tmp_path, heldout_fraction=0.2), tokenizer)
    found = {
        name: set(tokenizer.decode(all_rows(packed, name).input_ids_BS.flatten()).split("<|endoftext|>")) - {""}
        for name in ("train", "heldout")
    }
    assert found["train"] | found["heldout"] == set(documents) and not found["train"] & found["heldout"]
    assert len(found["train"]) == packed.train.num_documents and len(found["heldout"]) == packed.heldout.num_documents

    write_text(tmp_path / "other", "held out text")
    packed = pack_text(config_for(tmp_path, heldout_path=str(tmp_path / "other")), tokenizer)
    assert (packed.train.num_documents, packed.heldout.num_documents) == (60, 1)


def test_a_second_run_reads_the_cache_and_a_changed_input_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Path] = []
    write = data_packing._write

    def counted(folder: Path, *rest: Any) -> None:
        writes.append(folder)
        write(folder, *rest)

    monkeypatch.setattr(data_packing, "_write", counted)
    write_text(tmp_path / "text", "one", "two")
    tokenizer = byte_tokenizer()
    first = pack_text(config_for(tmp_path), tokenizer)
    assert pack_text(config_for(tmp_path, seed=5, batch_size=1), tokenizer) == first and len(writes) == 1

    other_end = byte_tokenizer()
    other_end.eos_token = "<|im_end|>"
    changes: list[tuple[DataConfig, Any]] = [
        (config_for(tmp_path, sequence_length=8), tokenizer),
        (config_for(tmp_path, max_documents=1), tokenizer),
        (config_for(tmp_path), other_end),
        (config_for(tmp_path), byte_tokenizer(CHATML)),
    ]
    for number, (config, other) in enumerate(changes, start=2):
        assert pack_text(config, other).folder != first.folder
        assert len(writes) == number
    (tmp_path / "text" / "000.txt").write_text("ONE")
    assert pack_text(config_for(tmp_path), tokenizer).folder != first.folder
    assert [path for path in (tmp_path / "cache").iterdir() if "tmp" in path.name] == []


def test_an_interrupted_run_leaves_nothing_and_a_faster_job_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text", "one", "two")
    tokenizer, write = byte_tokenizer(), data_packing._write

    def interrupted(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(data_packing, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_text(config_for(tmp_path), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []

    def overtaken(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        winner = folder.with_name(folder.name.partition(".tmp-")[0])
        winner.mkdir()
        write(winner, *rest)

    monkeypatch.setattr(data_packing, "_write", overtaken)
    packed = pack_text(config_for(tmp_path), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == [packed.folder]


@pytest.mark.parametrize("damage", ["cut", "gone", "not JSON", "other keys"])
def test_a_damaged_cache_is_refused(tmp_path: Path, damage: str) -> None:
    write_text(tmp_path / "text", "one", "two")
    folder = pack_text(config_for(tmp_path), byte_tokenizer()).folder
    if damage == "cut":
        (folder / "train.tokens").write_bytes((folder / "train.tokens").read_bytes()[:-1])
    elif damage == "gone":
        (folder / "heldout.flags").unlink()
    else:
        (folder / "packed.json").write_text("{" if damage == "not JSON" else "{}")
    with pytest.raises(ValueError, match=r"damaged cache of packed text .* delete the folder and run again") as error:
        pack_text(config_for(tmp_path), byte_tokenizer())
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_splits_without_text_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "", " \n")
    with pytest.raises(ValueError, match=r"holds no text \(2 empty, 0 not UTF-8\)"):
        pack_text(config_for(tmp_path), byte_tokenizer())
    write_text(tmp_path / "text", "one", "two")
    with pytest.raises(ValueError, match=r"data\.heldout_fraction=1e-09 of 2 documents is none; raise it"):
        pack_text(config_for(tmp_path, heldout_fraction=1e-9), byte_tokenizer())
    with pytest.raises(ValueError, match="leaves no document to train on"):
        pack_text(config_for(tmp_path, heldout_fraction=1 - 1e-9), byte_tokenizer())
    write_text(tmp_path / "other", "\n")
    with pytest.raises(ValueError, match=r"data\.heldout_path=.*other holds no text"):
        pack_text(config_for(tmp_path, heldout_path=str(tmp_path / "other")), byte_tokenizer())
    with pytest.raises(ValueError, match=r"data\.heldout_path=.*nowhere does not exist"):
        pack_text(config_for(tmp_path, heldout_path=str(tmp_path / "nowhere")), byte_tokenizer())
    assert not any((tmp_path / "cache").iterdir())
