"""The tokenizer: loads one from disk, or trains a byte-level BPE on the training documents.

Only tokenizers with a Rust backend (a tokenizer.json) are accepted: packing needs their speed, chat data their
character offsets. Nothing is fetched over a network. A trained tokenizer is written as a folder that transformers'
AutoTokenizer loads, under a name that is a hash of text and settings, so that it is trained once.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farskip.data_config import DEFAULT_END_OF_DOCUMENT, DataConfig
from farskip.data_sources import find_source, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_PAIR_COUNT = 2
"""A pair of symbols that occurs once in the text is not worth an entry of the vocabulary."""


def build_tokenizer(config: DataConfig, cache_dir: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that the configuration names, or train one on the training split.

    Every rank may call this at the same time: a file lock lets one train while the others wait and then load.

    Args:
        config: tokenizer, vocab_size and end_of_document, and for training the text that config.path holds.
        cache_dir: folder under which a trained tokenizer is kept.

    Returns:
        A transformers tokenizer with a Rust backend and an ``eos_token``, the end-of-document token.

    Raises:
        ValueError: no tokenizer at the path, no end-of-document token, or no text to train on.
    """
    config.check()
    if config.tokenizer is not None:
        return _load_tokenizer(Path(config.tokenizer).expanduser(), config.end_of_document)
    return _load_tokenizer(_trained_folder(config, Path(cache_dir).expanduser()), None)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of everything that decides which ids a document becomes: rules, vocabulary, chat template, end token."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for call_state in ("truncation", "padding"):  # set anew by each call, so they may differ between ranks
        rules.pop(call_state, None)
    content = json.dumps([rules, tokenizer.chat_template, tokenizer.eos_token_id])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _load_tokenizer(path: Path, end_of_document: str | None) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not path.exists():
        raise ValueError(f"data.tokenizer={path} does not exist; give a tokenizer.json or a folder that holds one")
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        try:
            # A rewired checkpoint's folder names code for the model; without a word transformers would ask on stdin.
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"data.tokenizer={path} cannot be loaded ({reason}); save it again") from None
    elif not file.is_file():
        raise ValueError(
            f"data.tokenizer={path} has no tokenizer.json; give a tokenizer.json or a folder that holds one"
        )
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_read_backend(file), clean_up_tokenization_spaces=False)
    if not tokenizer.is_fast:
        raise ValueError(f"data.tokenizer={path} has no Rust backend; convert it to a tokenizer.json first")
    if end_of_document is not None:
        if end_of_document not in tokenizer.get_vocab():
            raise ValueError(
                f"data.end_of_document={end_of_document!r} is not in the vocabulary of {path}; "
                f"{_special_tokens(tokenizer)}"
            )
        tokenizer.eos_token = end_of_document
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.tokenizer={path} names no end-of-document token; set data.end_of_document; "
            f"{_special_tokens(tokenizer)}"
        )
    return tokenizer


def _read_backend(file: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"data.tokenizer={file} is not a readable tokenizer.json ({error}); save it again") from None


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> str:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return f"its special tokens are {', '.join(special[:8])}" if special else "it has no special tokens"


def _trained_folder(config: DataConfig, cache_dir: Path) -> Path:
    """The folder with the tokenizer for this text and these settings, trained now unless it is there."""
    import filelock

    source = find_source(config.path, config)
    heldout_fraction = 0.0 if config.heldout_path is not None else config.heldout_fraction
    settings = [
        *(source.fingerprint(), config.text_field, config.messages_field, config.vocab_size),
        *(config.end_of_document, heldout_fraction, config.max_documents, MIN_PAIR_COUNT),
    ]
    name = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    folder = cache_dir / f"tokenizer-{name}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(cache_dir / f"tokenizer-{name}.lock")):
        if not folder.is_dir():

            def texts() -> Iterator[str]:
                for document in read_documents(source, config, Counter()):
                    if document.text is None:
                        raise ValueError(
                            f"{document.where}: a conversation, but data.tokenizer is null and a trained tokenizer "
                            "has no chat template; give data.tokenizer one that has"
                        )
                    if not document.is_heldout(heldout_fraction):
                        yield document.text

            _train(texts(), config, folder)
    return folder


def _train(texts: Iterator[str], config: DataConfig, folder: Path) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    first = next(texts, None)
    if first is None:
        raise ValueError(f"data.path={config.path} holds no text to train a tokenizer on; check the path")

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    end_of_document = config.end_of_document or DEFAULT_END_OF_DOCUMENT
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=[end_of_document],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(all_texts(), trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end_of_document, clean_up_tokenization_spaces=False
    )
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    try:
        tokenizer.save_pretrained(str(temporary))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
