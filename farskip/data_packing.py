"""From documents to packed sequences on disk, once per text, tokenizer and settings.

Documents are written one after another into one long row of tokens, which is cut every ``sequence_length`` tokens. A
document that a cut divides goes on in the next sequence as a piece of its own, because attention does not reach across
sequences. Every token is used exactly once; only the last sequence is filled up, with a piece that is not trained on.

A split is two flat files: tokens (int32) and flags (one byte per token: START, TRAINED). Labels and position ids follow
from them (data_loader.py). A folder appears under its final name only when it is complete.
"""

import array
import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from farskip.data_chat import encode_conversation
from farskip.data_config import DataConfig
from farskip.data_sources import Document, Source, find_source, read_documents
from farskip.data_tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
START = 1
"""Flag of a token that begins a document or a piece of one."""
TRAINED = 2
"""Flag of a token that the model has to predict (from the token before it, unless this one is a START)."""
CHARS_PER_BATCH = 1 << 20
"""Characters given to the tokenizer at once: enough to keep its threads busy, little enough to stay in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSplit:
    """One split on disk.

    Attributes:
        num_sequences: packed sequences.
        num_tokens: tokens of documents, without the filling of the last sequence.
        num_labels: tokens that are predicted somewhere.
        num_documents: documents.
    """

    num_sequences: int
    num_tokens: int
    num_labels: int
    num_documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedText:
    """A complete folder of packed sequences and what was counted while it was made.

    Attributes:
        folder: holds train.tokens, train.flags, heldout.tokens, heldout.flags, packed.json.
        train: the training split.
        heldout: the held-out split; may hold nothing.
        kind: text, jsonl, parquet or saved.
        num_excluded: files that data.exclude hid.
        num_not_utf8: text files skipped because they are not UTF-8.
        num_empty: documents skipped because they hold no text.
    """

    folder: Path
    train: PackedSplit
    heldout: PackedSplit
    kind: str
    num_excluded: int
    num_not_utf8: int
    num_empty: int


def pack_text(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> PackedText:
    """Find the packed sequences for this text, tokenizer and settings, or make them.

    Args:
        config: checked configuration.
        tokenizer: has a Rust backend and an end-of-document token.

    Returns:
        The complete folder under config.cache_dir.

    Raises:
        ValueError: nothing to read, something that cannot be read, or no text in one of the splits.
    """
    source = find_source(config.path, config)
    heldout_source = None
    if config.heldout_path is not None:
        heldout_source = find_source(config.heldout_path, config, key="data.heldout_path")
    cache_dir = Path(config.cache_dir).expanduser()
    folder = cache_dir / f"packed-{_key(config, tokenizer, source, heldout_source)}"
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")  # process numbers repeat on other hosts
        temporary.mkdir()
        try:
            _write(temporary, config, tokenizer, source, heldout_source)
            try:
                temporary.rename(folder)
            except OSError:
                # Another job was faster. The name is a hash of everything that goes in, so its folder holds the same.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read_packed(folder, config.sequence_length)


def read_packed(folder: Path, sequence_length: int) -> PackedText:
    """Read the description of a packed folder and check that its files have the size it states.

    Raises:
        ValueError: the folder is damaged.
    """
    try:
        described = json.loads((folder / "packed.json").read_text(encoding="utf-8"))
        train, heldout = (PackedSplit(**described.pop(name)) for name in ("train", "heldout"))
        for name, split in (("train", train), ("heldout", heldout)):
            num_positions = split.num_sequences * sequence_length
            for suffix, size in (("tokens", 4), ("flags", 1)):
                found = (folder / f"{name}.{suffix}").stat().st_size
                if found != num_positions * size:
                    raise ValueError(f"{name}.{suffix} has {found} bytes, not {num_positions * size}")
        return PackedText(folder=folder, train=train, heldout=heldout, **described)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged cache of packed text ({error}); delete the folder and run again") from None


def _key(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", source: Source, heldout_source: Source | None
) -> str:
    contents = [
        *(FORMAT_VERSION, source.fingerprint(), heldout_source.fingerprint() if heldout_source else None),
        *(tokenizer_fingerprint(tokenizer), config.sequence_length, config.text_field, config.messages_field),
        *(None if heldout_source else config.heldout_fraction, config.max_documents, source.num_excluded),
    ]
    return hashlib.blake2b(json.dumps(contents).encode(), digest_size=16).hexdigest()


def _write(
    folder: Path,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    source: Source,
    heldout_source: Source | None,
) -> None:
    counts: Counter[str] = Counter()
    end_id = int(tokenizer.eos_token_id)
    fraction = 0.0 if heldout_source else config.heldout_fraction
    with (
        _Writer(folder, "train", config.sequence_length) as train,
        _Writer(folder, "heldout", config.sequence_length) as heldout,
    ):
        for document, ids, trained in _encode(tokenizer, read_documents(source, config, counts)):
            (heldout if document.is_heldout(fraction) else train).add(ids, trained)
        if train.num_documents + heldout.num_documents == 0:
            raise ValueError(
                f"data.path={config.path} holds no text ({_skipped(counts)}); check the path and its files"
            )
        if train.num_documents == 0:
            raise ValueError(f"data.path={config.path} leaves no document to train on; lower data.heldout_fraction")
        if heldout_source:
            for _, ids, trained in _encode(tokenizer, read_documents(heldout_source, config, counts)):
                heldout.add(ids, trained)
        if heldout.num_documents == 0 and (heldout_source or fraction > 0):
            wanted = (
                f"data.heldout_path={config.heldout_path} holds no text; check the path"
                if heldout_source
                else f"data.heldout_fraction={fraction} of {train.num_documents} documents is none; raise it, "
                "give data.heldout_path, or set it to 0"
            )
            raise ValueError(wanted)
        splits = {"train": train.close(end_id), "heldout": heldout.close(end_id)}
    for name, split in splits.items():
        if split.num_documents and not split.num_labels:
            raise ValueError(
                f"data.path={config.path}: none of the {split.num_tokens} {name} tokens can be trained on; "
                "conversations need assistant turns, and sequences more than one token"
            )
    described: dict[str, Any] = dict(
        {name: asdict(split) for name, split in splits.items()},
        kind=source.kind,
        num_excluded=source.num_excluded,
        num_not_utf8=counts["not_utf8"],
        num_empty=counts["empty"],
    )
    (folder / "packed.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def _skipped(counts: Counter[str]) -> str:
    return f"{counts['empty']} empty, {counts['not_utf8']} not UTF-8"


def _encode(
    tokenizer: "PreTrainedTokenizerBase", documents: Iterable[Document]
) -> Iterator[tuple[Document, list[int], list[bool] | None]]:
    """Documents with their ids and, for conversations, which tokens are trained on (None: all)."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        if document.messages is not None:
            yield document, *encode_conversation(tokenizer, document.messages, document.where)
            continue
        batch.append(document)
        num_chars += len(document.text or "")
        if num_chars >= CHARS_PER_BATCH:
            yield from _encode_plain(tokenizer, batch)
            batch, num_chars = [], 0
    yield from _encode_plain(tokenizer, batch)


def _encode_plain(
    tokenizer: "PreTrainedTokenizerBase", batch: list[Document]
) -> Iterator[tuple[Document, list[int], list[bool] | None]]:
    if not batch:
        return
    end_id = int(tokenizer.eos_token_id)
    encoded: Any = tokenizer([document.text or "" for document in batch], return_attention_mask=False, verbose=False)
    for document, ids in zip(batch, encoded["input_ids"], strict=True):
        # Some tokenizers add the token themselves.
        yield document, (ids if ids and ids[-1] == end_id else [*ids, end_id]), None


class _Writer:
    """Appends documents to the two files of a split and marks where pieces start."""

    def __init__(self, folder: Path, name: str, sequence_length: int) -> None:
        self._tokens: BinaryIO = (folder / f"{name}.tokens").open("wb")
        self._flags: BinaryIO = (folder / f"{name}.flags").open("wb")
        self._sequence_length = sequence_length
        self._position = 0
        self.num_documents = 0
        self._num_labels = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._flags.close()

    def add(self, ids: list[int], trained: list[bool] | None) -> None:
        """Append one document; trained None means every token."""
        self.num_documents += 1
        self._append(ids, bytearray(bytes([TRAINED]) * len(ids) if trained is None else map(TRAINED.__mul__, trained)))

    def close(self, end_id: int) -> PackedSplit:
        """Fill the last sequence, which is no part of any document, and count."""
        num_tokens = self._position
        num_fill = -num_tokens % self._sequence_length
        self._append([end_id] * num_fill, bytearray(num_fill))
        return PackedSplit(
            num_sequences=self._position // self._sequence_length,
            num_tokens=num_tokens,
            num_labels=self._num_labels,
            num_documents=self.num_documents,
        )

    def _append(self, ids: list[int], flags: bytearray) -> None:
        if not ids:
            return
        flags[0] |= START
        for cut in range(-self._position % self._sequence_length, len(ids), self._sequence_length):
            flags[cut] |= START
        self._num_labels += flags.count(TRAINED)  # TRAINED and not START
        array.array("i", ids).tofile(self._tokens)
        self._flags.write(flags)
        self._position += len(ids)
