"""What a user can say about the text: one flat structured configuration, checked in one place.

A plain dataclass (neither frozen nor slotted), because Hydra's structured configurations need class-level defaults.
It refuses values that no later step could use, in one line each, before any file is opened.
"""

from dataclasses import dataclass, field

FORMATS = ("auto", "text", "jsonl", "parquet", "saved")
DEFAULT_END_OF_DOCUMENT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""256 byte symbols and the end-of-document token: the smallest byte-level vocabulary that can spell any text."""
NO_HELDOUT = "there is no held-out text; set data.heldout_fraction above 0 or give data.heldout_path"


@dataclass(kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes batches."""

    path: str = ""
    """Training text: a folder of text, JSONL or Parquet files, one such file, or a folder written by save_to_disk."""
    format: str = "auto"
    """auto (look at the files), text, jsonl, parquet or saved (a folder written by datasets' save_to_disk)."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """File name patterns that count as text files in a folder; subfolders are searched too."""
    exclude: list[str] = field(default_factory=lambda: [".*", "__pycache__"])
    """Folder or file name patterns left out at any depth below the path; what they hide is counted and reported."""
    text_field: str | None = "text"
    """Column or key with a plain document, for JSONL, Parquet and saved data; null: never look for one."""
    messages_field: str | None = "messages"
    """Column or key with a conversation, a list of {role, content}; null: never look for one."""
    tokenizer: str | None = None
    """A tokenizer.json or a folder with one (a model's folder will do); null: train a byte-level BPE on the text."""
    vocab_size: int = 4096
    """Entries of the vocabulary to train, at least 257 (a small text gives fewer); not used with a given tokenizer."""
    end_of_document: str | None = None
    """Token put after each plain document; null: the tokenizer's own, or <|endoftext|> for a trained one."""
    sequence_length: int = 512
    """Tokens in each packed sequence."""
    batch_size: int = 8
    """Packed sequences per rank and micro-batch."""
    heldout_fraction: float = 0.05
    """Share of the documents kept out of training, chosen by a hash of each document's content; 0: none."""
    heldout_path: str | None = None
    """Text to evaluate on, in the same format, instead of a fraction of the training documents."""
    seed: int = 0
    """Seed of the order in which an epoch visits the packed sequences; it does not move the held-out split."""
    max_documents: int | None = None
    """Read only this many documents of the path (and as many of heldout_path); null: all."""
    cache_dir: str = "~/.cache/farskip"
    """Folder for packed tokens and trained tokenizers; every rank of a job must see the same one."""

    def check_heldout(self) -> None:
        """Refuse to measure where no text is kept for it.

        Raises:
            ValueError: neither a share of the documents nor a path of its own.
        """
        if self.heldout_path is None and self.heldout_fraction == 0:
            raise ValueError(NO_HELDOUT)

    def check(self) -> None:
        """Refuse values that no later step can use.

        Raises:
            ValueError: one line with the key, its value, the bound and the remedy.
        """
        if not self.path:
            raise ValueError("data.path is empty; give a folder or file with text, e.g. data.path=/home/me/corpus")
        if self.format not in FORMATS:
            raise ValueError(f"data.format={self.format!r} is not known; choose one of {', '.join(FORMATS)}")
        if not self.patterns and self.format in ("auto", "text"):
            raise ValueError("data.patterns is empty, so no text file can match; give at least one, e.g. ['*.txt']")
        if self.text_field is None and self.messages_field is None:
            raise ValueError("data.text_field and data.messages_field are both null; name the column that holds text")
        for name, low in (("sequence_length", 2), ("batch_size", 1), ("max_documents", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"data.{name}={value} is too small; it must be at least {low}")
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"data.vocab_size={self.vocab_size} cannot hold the 256 bytes and the end-of-document token; "
                f"give at least {MIN_VOCAB_SIZE}"
            )
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"data.heldout_fraction={self.heldout_fraction} must be at least 0 and below 1")
