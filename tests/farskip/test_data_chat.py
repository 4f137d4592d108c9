"""Conversations: exactly the assistant's words and the token that ends its turns are trained on."""

from typing import Any

import pytest
import tokenizers
import transformers

from farskip.data_chat import encode_conversation

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = LOOP + "{{ m.content }}<|im_end|>\n" + PROMPT
MARKED = (
    LOOP
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    + PROMPT
)
MARKED_WITHOUT_END = (
    LOOP
    + "{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}{%- endgeneration -%}"
    + "{% else %}{{ m.content }}{% endif %}"
    + "<|im_end|>\n"
    + PROMPT
)
MARKED_NOTHING = LOOP + "{{ m.content }}<|im_end|>\n{% generation %}{% endgeneration %}" + PROMPT
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    + "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETS_THINKING = (
    LOOP + "{% if loop.last and m.role == 'assistant' %}{{ m.thinking }}{% endif %}{{ m.content }}<|im_end|>\n" + PROMPT
)
PROMPTS_OTHERWISE = PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
IGNORES_MIDDLE = (
    "{% for m in messages %}{% if loop.first or loop.last %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be  kind"},
    {"role": "user", "content": "wie spät?"},
    {"role": "assistant", "content": "späte 漢字 Zeit"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "two\nlines "},
]


def tokenizer_with(template: str | None) -> Any:
    """Bytes as tokens and a few merges that reach over a turn's edge if nothing keeps them apart."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["assistant user system two lines late time", "assistant user two time"], trainer=trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])
    tokenizer.chat_template = template
    return tokenizer


def trained_texts(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """The text of each unbroken stretch of trained tokens."""
    ids, trained = encode_conversation(tokenizer, messages, "test")
    assert len(ids) == len(trained)
    stretches: list[list[int]] = [[]]
    for index, flag in zip(ids, trained, strict=True):
        if flag:
            stretches[-1].append(index)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize(
    "template", [PLAIN, MARKED, MARKED_WITHOUT_END], ids=["by prefixes", "marked", "marked, no end"]
)
def test_the_assistants_turns_and_their_ends_are_trained_on(template: str) -> None:
    tokenizer = tokenizer_with(template)
    assert trained_texts(tokenizer, TALK) == ["späte 漢字 Zeit<|im_end|>", "two\nlines <|im_end|>"]
    assert trained_texts(tokenizer, TALK[:4]) == ["späte 漢字 Zeit<|im_end|>"]
    assert trained_texts(tokenizer, TALK[:2]) == []
    assert trained_texts(tokenizer, TALK[2:3]) in (
        ["späte 漢字 Zeit<|im_end|>"],
        ["<|im_start|>assistant\nspäte 漢字 Zeit<|im_end|>"],  # nothing comes before: no prompt to leave out
    )


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_ids_are_those_of_the_template(template: str) -> None:
    tokenizer = tokenizer_with(template)
    ids, _ = encode_conversation(tokenizer, TALK, "test")
    assert ids == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]


def test_a_template_without_an_end_gets_the_end_of_document() -> None:
    tokenizer = tokenizer_with(NO_END)
    ids, trained = encode_conversation(tokenizer, TALK, "test")
    assert ids[-1] == tokenizer.eos_token_id and trained[-1]
    # The prompt ends in a space and " two" is one token, which is trained on.
    assert trained_texts(tokenizer, TALK)[-1] == " two\nlines \n<|endoftext|>"
    ids, trained = encode_conversation(tokenizer, TALK[:4], "test")
    assert ids[-1] == tokenizer.eos_token_id and not trained[-1]


@pytest.mark.parametrize(
    "template",
    [FORGETS_THINKING, PROMPTS_OTHERWISE, IGNORES_MIDDLE],
    ids=["forgets thinking", "prompts otherwise", "ignores the middle"],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(template: str) -> None:
    messages = [{**turn, "thinking": f"thought {i}. "} for i, turn in enumerate(TALK)]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: .*before message 2 differently once more follow") as error:
        encode_conversation(tokenizer_with(template), messages, "a.jsonl, line 3")
    assert "\n" not in str(error.value)


def test_other_unusable_templates_are_refused() -> None:
    with pytest.raises(ValueError, match="line 1: a conversation, but the tokenizer has no chat template"):
        encode_conversation(tokenizer_with(None), TALK, "line 1")
    with pytest.raises(ValueError, match="marks no token of the assistant's turns"):
        encode_conversation(tokenizer_with(MARKED_NOTHING), TALK, "line 1")
    with pytest.raises(
        ValueError, match=r"line 1: the chat template refuses the conversation \(roles must alternate\)"
    ):
        encode_conversation(tokenizer_with(STRICT), TALK, "line 1")
