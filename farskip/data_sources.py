"""Where text comes from: finds out what a path holds and reads it as a stream of documents.

It decides the kind of data by looking at the files, the order of the documents (by file name, so that two machines
agree), and which documents are held out (by a hash of the content alone). It refuses what it cannot read completely: a
broken line, a missing column, a mixture of kinds. Only two things are skipped, counted and reported: text files that
are not UTF-8, and documents without any text.

Parquet and saved data sets are read by ``datasets``. Text and JSONL are read here, because ``datasets`` 5.2 expands
brackets in a file name as a pattern and then reads nothing, refuses a JSONL whose later lines bring a new key,
and reports a broken line without its number.
"""

import fnmatch
import glob
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farskip.data_config import DataConfig

Message = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: a plain text or a conversation.

    Attributes:
        text: the plain text, or None.
        messages: the turns of a conversation, or None. Exactly one of the two is given.
        where: file and line or row, for error messages.
    """

    text: str | None
    messages: list[Message] | None
    where: str

    def is_heldout(self, fraction: float) -> bool:
        """Whether the document belongs to the held-out split: a property of its content and of nothing else."""
        content = self.text if self.text is not None else json.dumps(self.messages, sort_keys=True)
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Files of one kind, in the order in which they are read.

    Attributes:
        kind: text, jsonl, parquet or saved.
        root: the path that the user gave.
        files: the files to read; for saved data, all files of the folder.
        num_excluded: files that matched but that ``data.exclude`` hides.
    """

    kind: str
    root: Path
    files: tuple[Path, ...]
    num_excluded: int

    def fingerprint(self) -> str:
        """Hash of the names and the content of all files. Note: reads every byte once."""
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for file in self.files:
            name = file.relative_to(self.root).as_posix() if file != self.root else file.name
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            digest.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find_source(path: str, config: DataConfig, key: str = "data.path") -> Source:
    """Find out what a path holds.

    Args:
        path: a file or a folder.
        config: format, patterns and exclude are used.
        key: name of the configuration key, for error messages.

    Raises:
        ValueError: nothing there, nothing that matches, or several kinds of data.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"{key}={path} does not exist; give a folder or file with text")
    if root.is_file():
        kind = config.format if config.format != "auto" else _kind_of_file(root)
        if kind == "saved":
            raise ValueError(f"{key}={path} is a file, but data.format=saved needs a folder from save_to_disk")
        return Source(kind=kind, root=root, files=(root,), num_excluded=0)
    if (root / "dataset_dict.json").is_file() and config.format in ("auto", "saved"):
        splits = json.loads((root / "dataset_dict.json").read_text()).get("splits", [])
        raise ValueError(
            f"{key}={path} holds the splits {', '.join(splits)}; give one of them, e.g. {path}/{splits[0]}"
        )
    if config.format == "saved" or (config.format == "auto" and _is_saved(root)):
        if not _is_saved(root):
            raise ValueError(
                f"{key}={path} was not written by save_to_disk: it has no dataset_info.json and state.json"
            )
        files = tuple(sorted(file for file in root.rglob("*") if file.is_file() and not file.name.startswith("cache-")))
        return Source(kind="saved", root=root, files=files, num_excluded=0)
    return _source_of_folder(root, config, key)


def read_documents(source: Source, config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Read the documents one by one, in a fixed order.

    Args:
        source: what find_source returned.
        config: text_field, messages_field and max_documents are used.
        counts: gains "empty" and "not_utf8" as files and documents are skipped; its other entries stay.

    Raises:
        ValueError: a broken line, a missing column, a value of the wrong type; names file and line or row.
    """
    if source.kind == "text":
        documents = _read_text_files(source.files, counts)
    else:
        documents = _documents_of_rows(_read_rows(source, config), config, counts)
    yield from itertools.islice(documents, config.max_documents)


def _is_saved(root: Path) -> bool:
    return (root / "dataset_info.json").is_file() and (root / "state.json").is_file()


def _kind_of_file(file: Path) -> str:
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(file.suffix.lower(), "text")


def _source_of_folder(root: Path, config: DataConfig, key: str) -> Source:
    patterns = {"text": config.patterns, "jsonl": ["*.jsonl"], "parquet": ["*.parquet"]}
    if config.format != "auto":
        patterns = {config.format: patterns[config.format]}
    found: dict[str, list[Path]] = {kind: [] for kind in patterns}
    num_excluded: Counter[str] = Counter()
    for file in _walk(root):
        for kind in patterns:
            if _matches_any(file.name, patterns[kind]):
                if any(_matches_any(part, config.exclude) for part in file.relative_to(root).parts):
                    num_excluded[kind] += 1
                else:
                    found[kind].append(file)
    kinds = [kind for kind, files in found.items() if files]
    if not kinds:
        wanted = sorted(itertools.chain.from_iterable(patterns.values()))
        advice = "data.patterns" if "text" in patterns else "data.format"
        hidden = f" ({sum(num_excluded.values())} are hidden by data.exclude)" if num_excluded else ""
        raise ValueError(f"{key}={root} has no file named {', '.join(wanted)}{hidden}; check the path or {advice}")
    if len(kinds) > 1:
        there = " and ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise ValueError(f"{key}={root} holds {there} files; say which to read with data.format={kinds[-1]}")
    return Source(kind=kinds[0], root=root, files=tuple(found[kinds[0]]), num_excluded=num_excluded[kinds[0]])


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read_text_files(files: Iterable[Path], counts: Counter[str]) -> Iterator[Document]:
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            counts["not_utf8"] += 1
            continue
        if not text.strip():
            counts["empty"] += 1
            continue
        yield Document(text=text, messages=None, where=str(file))


def _read_rows(source: Source, config: DataConfig) -> Iterator[tuple[str, Row]]:
    if source.kind == "jsonl":
        for file in source.files:
            yield from _read_json_lines(file)
    elif source.kind == "parquet":
        for file in source.files:
            yield from _read_parquet(file, config)
    else:
        yield from _read_saved(source.root, config)


def _read_json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # also UnicodeDecodeError
                raise ValueError(
                    f"{file}, line {number}: not valid JSON ({error}); correct or delete the line"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: a JSON {type(row).__name__}, but each line must be an object")
            yield f"{file}, line {number}", row


def _read_parquet(file: Path, config: DataConfig) -> Iterator[tuple[str, Row]]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable Parquet file ({_first_line(error)}); write it again") from None
    column, _ = _choose_column(columns, config, str(file))
    # The reader expands brackets and stars in a name, so the name is escaped.
    rows = datasets.IterableDataset.from_parquet(glob.escape(str(file)), columns=[column])
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", row


def _read_saved(root: Path, config: DataConfig) -> Iterator[tuple[str, Row]]:
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"{root}: not a readable saved data set ({_first_line(error)}); save it again") from None
    column, _ = _choose_column(saved.column_names, config, str(root))
    for number, row in enumerate(saved.select_columns([column]), start=1):
        yield f"{root}, row {number}", row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _choose_column(columns: Iterable[str], config: DataConfig, where: str) -> tuple[str, bool]:
    """The column to read and whether it holds conversations."""
    there = [name for name in (config.text_field, config.messages_field) if name is not None and name in set(columns)]
    if not there:
        wanted = " or ".join(repr(name) for name in (config.text_field, config.messages_field) if name is not None)
        raise ValueError(
            f"{where}: no column {wanted}; there are {', '.join(columns) or 'none'}; "
            "name yours with data.text_field or data.messages_field"
        )
    if len(there) > 1:
        raise ValueError(
            f"{where}: has both {there[0]!r} and {there[1]!r}; set data.text_field=null or data.messages_field=null"
        )
    return there[0], there[0] == config.messages_field


def _documents_of_rows(rows: Iterator[tuple[str, Row]], config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    chosen: tuple[str, bool] | None = None
    for where, row in rows:
        if chosen is None or chosen[0] not in row:
            found = _choose_column(row, config, where)
            if chosen is not None and found != chosen:
                raise ValueError(f"{where}: has {found[0]!r} where earlier rows have {chosen[0]!r}; use one of them")
            chosen = found
        column, is_chat = chosen
        value = row[column]
        if value is None or (isinstance(value, str) and not value.strip()) or value == []:
            counts["empty"] += 1
        elif is_chat:
            yield Document(text=None, messages=_check_messages(value, column, where), where=where)
        elif isinstance(value, str):
            yield Document(text=value, messages=None, where=where)
        else:
            raise ValueError(f"{where}: {column!r} is {type(value).__name__}, but a document must be a string")


def _check_messages(value: object, column: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{where}: {column!r} must be a list of objects with the keys role and content")
    for number, turn in enumerate(value):
        if not isinstance(turn.get("role"), str):
            raise ValueError(
                f"{where}: message {number} of {column!r} has no role; it has {', '.join(turn) or 'nothing'}"
            )
    # A column store fills keys that other rows have with null; for a template an absent key and a null differ.
    return [{key: entry for key, entry in turn.items() if entry is not None} for turn in value]
