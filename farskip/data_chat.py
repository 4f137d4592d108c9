"""Conversations: from a list of messages to token ids and the tokens that are trained on.

Only the assistant's turns are trained on, each including the token that ends it. Two ways lead there:

1. The tokenizer's chat template marks the assistant's turns itself (a ``{% generation %}`` block).
2. It does not: the conversation is rendered turn by turn, each rendering has to be the beginning of the next, and what
   an assistant turn adds after the prompt for it is trained on.

A template for which neither works (it rewrites earlier turns, or leaves things out of them) is refused: a wrong mask
would train the model on the user's words without anyone noticing.
"""

import itertools
import re
from typing import TYPE_CHECKING, Any

from farskip.data_sources import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], where: str
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each token whether it is trained on.

    The end-of-document token is added after the last turn if the template ends without a special token.

    Args:
        tokenizer: has a chat template and a Rust backend.
        messages: the turns, each with a role.
        where: where the conversation comes from, for error messages.

    Returns:
        ids and trained, of equal length.

    Raises:
        ValueError: no chat template, the template refuses the conversation, or the assistant's turns cannot be found.
    """
    import jinja2

    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: a conversation, but the tokenizer has no chat template; give data.tokenizer one that has"
        )
    try:
        if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
            ids, trained = _encode_marked(tokenizer, messages, where)
        else:
            ids, trained = _encode_by_prefixes(tokenizer, messages, where)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{where}: the chat template refuses the conversation ({error}); correct its messages"
        ) from None
    return _close(tokenizer, ids, trained, is_trained=messages[-1]["role"] == "assistant")


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _encode_marked(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], where: str
) -> tuple[list[int], list[bool]]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
    if not any(trained) and any(turn["role"] == "assistant" and turn.get("content") for turn in messages):
        raise ValueError(
            f"{where}: the chat template marks no token of the assistant's turns; correct its generation block"
        )
    # Some templates close the block before the token that ends the turn; a model must learn to write that one too.
    special = _special_ids(tokenizer)
    for start, end in _runs(trained):
        ends_itself = any(index in special for index in ids[start:end])
        if not ends_itself and end < len(ids) and ids[end] in special:
            trained[end] = True
    return ids, trained


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Half-open ranges of the True stretches."""
    runs, position = [], 0
    for flag, group in itertools.groupby(flags):
        length = len(list(group))
        if flag:
            runs.append((position, position + length))
        position += length
    return runs


def _encode_by_prefixes(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], where: str
) -> tuple[list[int], list[bool]]:
    def render(num_turns: int, with_prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(messages[:num_turns], tokenize=False, add_generation_prompt=with_prompt)
        )

    whole = render(len(messages))
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(turn, with_prompt=True) if turn else ""
        after = render(turn + 1)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"{where}: the chat template renders the turns before message {turn} differently once more follow, so "
                "the assistant's words cannot be told from the rest; give the template a {% generation %} block"
            )
        spans.append((len(before), len(after)))
    encoded: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    trained = [False] * len(ids)
    special = _special_ids(tokenizer)
    for first_char, end_char in spans:
        # A token that reaches over the first character belongs to the turn: else a one-word answer might have no label.
        inside = [i for i, (start, end) in enumerate(offsets) if start < end and first_char < end <= end_char]
        # What follows the token that ends the turn is only layout: nobody asks the model to write it.
        last_special = max((i for i in inside if ids[i] in special), default=None)
        if last_special is not None and not whole[offsets[last_special][1] : end_char].strip():
            inside = [i for i in inside if i <= last_special]
        for i in inside:
            trained[i] = True
    return ids, trained


def _close(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], trained: list[bool], is_trained: bool
) -> tuple[list[int], list[bool]]:
    """End the conversation with the end-of-document token, unless the template has ended it with a special token."""
    special = _special_ids(tokenizer)
    last_special = max((i for i, index in enumerate(ids) if index in special), default=-1)
    if last_special >= 0 and not str(tokenizer.decode(ids[last_special + 1 :])).strip():
        return ids, trained
    return [*ids, int(tokenizer.eos_token_id)], [*trained, is_trained]
