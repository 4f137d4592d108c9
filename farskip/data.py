"""The data pipeline's front door: a configuration in, batches of packed text out.

    path -> documents -> tokens -> packed sequences on disk -> Batch

data_sources.py reads, data_tokenizer.py and data_chat.py make tokens, data_packing.py packs, data_loader.py orders.
Rank 0 reads, tokenizes and packs; the other ranks wait and map the same files. The core starts no process group:
the caller passes rank, world_size and a barrier.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from farskip.batch import Batch
from farskip.data_config import NO_HELDOUT, DataConfig
from farskip.data_loader import PackedSequences, ShuffledBatches, TrainBatches, heldout_rows
from farskip.data_packing import PackedText, pack_text, read_packed
from farskip.data_tokenizer import build_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataConfig", "TextData", "TrainBatches", "build_data", "build_tokenizer"]


_NOT_PACKED = ("seed", "batch_size", "cache_dir")
"""Settings that say nothing about what a packed text holds."""


class TextData:
    """Packed text of one job, as one rank sees it.

    Attributes:
        num_train_tokens: tokens of the training documents, over all ranks.
        num_heldout_tokens: tokens of the held-out documents, over all ranks.
    """

    def __init__(self, packed: PackedText, config: DataConfig, *, rank: int, world_size: int) -> None:
        """Prefer build_data, which checks the configuration and lets only rank 0 do the work."""
        self._packed = packed
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self.num_train_tokens = packed.train.num_tokens
        self.num_heldout_tokens = packed.heldout.num_tokens

    def train_batches(self) -> TrainBatches:
        """A new endless loader at the start of epoch 0.

        Raises:
            ValueError: the training split does not fill one batch on every rank.
        """
        config, num_sequences = self._config, self._packed.train.num_sequences
        self._check_size(num_sequences, "training")
        sequences = PackedSequences(self._packed.folder, "train", num_sequences, config.sequence_length)
        sampler = ShuffledBatches(num_sequences, config.batch_size, config.seed, self._rank, self._world_size)
        identity = {
            "packed text": self._packed.folder.name,
            "data.seed": config.seed,
            "data.batch_size * ranks": config.batch_size * self._world_size,
        }
        settings = {f"data.{name}": value for name, value in asdict(config).items() if name not in _NOT_PACKED}
        return TrainBatches(sequences, sampler, identity, packed_by=settings)

    def heldout_batches(self, num_batches: int) -> list[Batch]:
        """The same batches at every call, not shuffled, spread evenly over the held-out text.

        Args:
            num_batches: at most this many per rank; fewer where the held-out text is too short.

        Returns:
            Equally many batches on every rank.

        Raises:
            ValueError: there is no held-out text, or it does not fill one batch on every rank.
        """
        config, num_sequences = self._config, self._packed.heldout.num_sequences
        if num_batches < 1:
            raise ValueError(f"{num_batches} held-out batches were asked for; ask for at least 1")
        if num_sequences == 0:
            raise ValueError(NO_HELDOUT)
        self._check_size(num_sequences, "held-out")
        sequences = PackedSequences(self._packed.folder, "heldout", num_sequences, config.sequence_length)
        rows = heldout_rows(num_sequences, num_batches, config.batch_size, self._rank, self._world_size)
        return [sequences.__getitems__(batch) for batch in rows]

    def describe(self) -> str:
        """One line: what was read, what was skipped, how much there is."""
        packed, config = self._packed, self._config
        skipped = [
            f"{count} {reason}"
            for count, reason in (
                (packed.num_excluded, "files excluded"),
                (packed.num_not_utf8, "files not UTF-8"),
                (packed.num_empty, "documents empty"),
            )
            if count
        ]
        parts = [
            f"{config.path} ({packed.kind}): {packed.train.num_documents} training documents, "
            f"{packed.train.num_tokens} tokens in {packed.train.num_sequences} sequences of {config.sequence_length}",
            f"{packed.heldout.num_documents} held-out documents, {packed.heldout.num_tokens} tokens",
            f"skipped: {', '.join(skipped) or 'nothing'}",
        ]
        return "; ".join(parts)

    def _check_size(self, num_sequences: int, split: str) -> None:
        needed = self._config.batch_size * self._world_size
        if num_sequences < needed:
            raise ValueError(
                f"the {split} text fills {num_sequences} sequences of {self._config.sequence_length} tokens, but one "
                f"batch on {self._world_size} rank(s) needs {needed}; give more text or lower data.batch_size or "
                "data.sequence_length"
            )


def build_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    rank: int,
    world_size: int,
    barrier: Callable[[], object],
    packs: bool | None = None,
) -> TextData:
    """Read, tokenize and pack the text, or find it packed from an earlier run.

    Args:
        config: where the text is and how to cut it; equal on every rank.
        tokenizer: from build_tokenizer; equal on every rank.
        rank: this rank among those that split the data, 0 <= rank < world_size.
        world_size: number of those ranks.
        barrier: called exactly once by every process, also when packing fails; returns when the one that packs has
            called it. Packing may take longer than a collective waits.
        packs: whether this process does the work; None: if its rank is 0. Several processes of one rank, which see the
            same data, have one that does.

    Returns:
        This rank's view of the data.

    Raises:
        ValueError: the configuration or the text cannot be used; the same reason on every rank.
    """
    config.check()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be at least 0 and below world_size={world_size}")
    notice = _notice_path(config, tokenizer)
    if packs if packs is not None else rank == 0:
        try:
            packed = pack_text(config, tokenizer)
            _announce(notice, {"folder": packed.folder.name})
        except Exception as error:
            # The others wait: tell them why and let them go, instead of leaving them to a timeout.
            try:
                _announce(notice, {"error": str(error)})
            finally:
                barrier()
            raise
        barrier()
    else:
        barrier()
        packed = read_packed(notice.parent / _read_notice(notice, rank), config.sequence_length)
    return TextData(packed, config, rank=rank, world_size=world_size)


def _notice_path(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Path:
    """Where rank 0 says which folder it packed: only rank 0 reads the text, whose hash is in that folder's name."""
    settings = json.dumps([asdict(config), tokenizer_fingerprint(tokenizer)], sort_keys=True)
    name = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    return Path(config.cache_dir).expanduser() / f"notice-{name}.json"


def _announce(notice: Path, content: dict[str, str]) -> None:
    notice.parent.mkdir(parents=True, exist_ok=True)
    temporary = notice.with_name(f"{notice.name}.tmp-{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(notice)


def _read_notice(notice: Path, rank: int) -> str:
    if not notice.is_file():
        raise ValueError(
            f"rank {rank} does not see what rank 0 wrote to data.cache_dir={notice.parent}; "
            "give a folder on a file system that all hosts share"
        )
    content: dict[str, str] = json.loads(notice.read_text(encoding="utf-8"))
    if "error" in content:
        raise ValueError(f"rank {rank}: rank 0 could not prepare the text: {content['error']}")
    return content["folder"]
