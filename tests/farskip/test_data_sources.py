"""Documents: found, read in a fixed order, split by their content; what cannot be read is refused in one line."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from farskip.data_config import DataConfig
from farskip.data_sources import Document, find_source, read_documents

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def config_for(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **settings)


def read(path: Path, counts: Counter[str] | None = None, **settings: Any) -> list[Document]:
    config = config_for(path, **settings)
    return list(read_documents(find_source(config.path, config), config, Counter() if counts is None else counts))


def texts(path: Path, **settings: Any) -> list[str | None]:
    return [document.text for document in read(path, **settings)]


def write_json_lines(file: Path, *rows: object) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_text_folder_is_read_by_name_through_subfolders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("second\r\nline\n", newline="")
    (tmp_path / "a [1] {x}.txt").write_text("first")  # brackets in a name are not a pattern
    (tmp_path / "sub" / "c.py").write_bytes(b"\xef\xbb\xbfthird = 'n\xc3\xb6'")  # with a byte order mark
    (tmp_path / "d.bin").write_text("not matched")
    assert texts(tmp_path) == ["first", "second\r\nline\n", "third = 'nö'"]
    assert texts(tmp_path, patterns=["*.bin"]) == ["not matched"]
    assert texts(tmp_path / "d.bin") == ["not matched"]
    assert texts(tmp_path, max_documents=2) == ["first", "second\r\nline\n"]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/3.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    walk = os.walk

    def shuffled(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, subfolders, names in walk(root):
            for entries in (subfolders, names):
                entries.sort(reverse=True)
            yield folder, subfolders, names

    monkeypatch.setattr(os, "walk", shuffled)
    assert texts(tmp_path) == ["c.txt", "a/3.txt", "b/1.txt", "b/2.txt"]


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    for name in ("test", ".git", "keep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(name)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    counts: Counter[str] = Counter()
    found = read(tmp_path, counts, exclude=["test", ".*"])
    assert [document.text for document in found] == ["keep"]
    assert counts == {"not_utf8": 1, "empty": 1}
    config = config_for(tmp_path, exclude=["test", ".*"])
    assert find_source(config.path, config).num_excluded == 2


def test_json_lines_with_keys_that_appear_late(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_json_lines(file, {"text": "one"}, {"text": None}, {"text": "two", "new": 1}, {"new": [], "text": "three"})
    counts: Counter[str] = Counter()
    assert [document.text for document in read(tmp_path, counts)] == ["one", "two", "three"]
    assert counts == {"empty": 1}
    write_json_lines(file, {"body": "one"})
    assert texts(file, text_field="body") == ["one"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("column", ["text", "messages"])
def test_every_kind_gives_the_same_documents(
    tmp_path: Path, kind: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["one", "two"] if column == "text" else [CONVERSATION, [*CONVERSATION, {"role": "user", "content": "x"}]]
    rows = [{"id": i, column: value} for i, value in enumerate(values)]
    path = tmp_path / "in [1]"
    path.mkdir()
    if kind == "jsonl":
        write_json_lines(path / "x.jsonl", *rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path / "x[0].parquet"))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    documents = read(path)
    assert [document.text if column == "text" else document.messages for document in documents] == values
    assert read(path, format=kind) == documents
    assert "1" in documents[0].where


def test_null_keys_of_a_column_store_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "x"}]},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    assert [document.messages for document in read(tmp_path)] == [row["messages"] for row in rows]


def test_split_depends_on_content_alone(tmp_path: Path) -> None:
    documents = [Document(text=f"document {i}", messages=None, where=str(i)) for i in range(2000)]
    heldout = {document.text for document in documents if document.is_heldout(0.1)}
    assert 150 < len(heldout) < 250  # five standard deviations of a fair draw are 67
    for name, chosen in (("all", documents), ("few", documents[::-7])):
        write_json_lines(tmp_path / f"{name}.jsonl", *({"text": document.text} for document in chosen))
        again = {document.text for document in read(tmp_path / f"{name}.jsonl") if document.is_heldout(0.1)}
        assert again == heldout & {document.text for document in chosen}
    assert not any(document.is_heldout(0.0) for document in documents)
    assert heldout < {document.text for document in documents if document.is_heldout(0.2)}


def test_fingerprint_follows_content_and_names(tmp_path: Path) -> None:
    def fingerprint() -> str:
        config = config_for(tmp_path)
        return find_source(config.path, config).fingerprint()

    (tmp_path / "a.txt").write_text("a")
    first = fingerprint()
    (tmp_path / "c.bin").write_text("not read")
    assert fingerprint() == first
    (tmp_path / "a.txt").write_text("b")
    assert fingerprint() != first
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert fingerprint() != first


def test_a_path_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist") as error:
        read(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_line(error)
    with pytest.raises(ValueError, match=r"no file named .*\*\.jsonl") as error:
        read(tmp_path)
    one_line(error)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("x")
    with pytest.raises(ValueError, match=r"1 are hidden by data\.exclude"):
        read(tmp_path, exclude=["test"])
    with pytest.raises(ValueError, match="not written by save_to_disk"):
        read(tmp_path, format="saved")


@pytest.mark.parametrize(
    ("kind", "advice"), [("jsonl", "data.format"), ("auto", "data.patterns"), ("text", "data.patterns")]
)
def test_a_folder_without_such_files(kind: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "notes.rst").write_text("about")
    with pytest.raises(ValueError, match=rf"has no file named .*; check the path or {advice}$") as error:
        read(tmp_path, format=kind)
    one_line(error)


def test_a_mixture_is_refused_until_the_format_is_given(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    write_json_lines(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(
        ValueError, match=r"1 text and 1 jsonl files; say which to read with data\.format=jsonl"
    ) as error:
        read(tmp_path)
    one_line(error)
    assert texts(tmp_path, format="jsonl") == ["one"]
    assert texts(tmp_path, format="text") == ["about"]


def test_a_dictionary_of_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"splits train, test; give one of them, e\.g\. .*d/train"):
        read(tmp_path / "d")
    assert texts(tmp_path / "d" / "test") == ["a"]


@pytest.mark.parametrize("line", [b'{"text": "b"', b"[1]", b'{"text": "\xe9"}'], ids=["cut", "list", "not UTF-8"])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(ValueError, match="line 3: ") as error:
        read(file)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_missing_column_names_those_that_are_there(tmp_path: Path, kind: str) -> None:
    rows = [{"body": "one", "title": "t"}]
    if kind == "jsonl":
        write_json_lines(tmp_path / "x.jsonl", *rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match="no column 'text' or 'messages'; there are body, title") as error:
        read(tmp_path)
    assert str(tmp_path) in one_line(error)
    with pytest.raises(ValueError, match="no column 'text'; there are"):
        read(tmp_path, messages_field=None)


def test_rows_that_disagree_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_json_lines(file, {"text": "a"}, {"other": "b"})
    with pytest.raises(ValueError, match="line 2: no column"):
        read(file)
    write_json_lines(file, {"text": "a"}, {"messages": CONVERSATION})
    with pytest.raises(ValueError, match="line 2: has 'messages' where earlier rows have 'text'"):
        read(file)
    write_json_lines(file, {"text": "a", "messages": CONVERSATION})
    with pytest.raises(ValueError, match="both 'text' and 'messages'"):
        read(file)
    assert read(file, text_field=None)[0].messages == CONVERSATION


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 5}, "'text' is int"),
        ({"messages": "hello"}, "must be a list of objects"),
        ({"messages": ["hello"]}, "must be a list of objects"),
        ({"messages": [{"from": "user", "value": "x"}]}, "message 0 of 'messages' has no role; it has from, value"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    write_json_lines(tmp_path / "a.jsonl", row)
    with pytest.raises(ValueError, match=f"line 1: .*{reason}") as error:
        read(tmp_path)
    one_line(error)


def test_damaged_parquet_and_saved_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"x\.parquet: not a readable Parquet file") as error:
        read(tmp_path)
    one_line(error)
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(saved))
    next(saved.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="not a readable saved data set") as error:
        read(saved)
    one_line(error)


def test_reading_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        pytest.fail("reading local files opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "x.parquet"))
    assert texts(tmp_path) == ["a"]
