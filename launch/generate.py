"""``farskip generate``: loads a checkpoint, wired as its config says, and prints how it continues a prompt.

Exit codes: 0 done, 2 bad input.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farskip.launch.quiet import quiet_libraries

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="farskip generate",
        description="Print how a model continues a prompt. A rewired checkpoint is computed rewired.",
    )
    add = command.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of a checkpoint with its tokenizer")
    add("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token; else sample")
    add("--seed", type=int, default=0, metavar="S", help="of the sampling (default: 0)")
    add("--wiring", metavar="NAME", help="instead of what the checkpoint says: ordinary, farskip, ladder ...")
    add("--layers", metavar="LAYERS", help="with --wiring: all (default), last:3, first:3, 2:5, 3 or 0,4,5")
    add("--dtype", choices=DTYPES, help="of the parameters (default: the checkpoint's)")
    add("--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1 or auto (default): cuda if there is one")
    add("--chat", action="store_true", help="the prompt is a user's message: use the tokenizer's chat template")
    return command


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: the words after ``farskip generate``.

    Returns:
        The exit code.

    Raises:
        ValueError: bad input.
    """
    options = parser().parse_args(argv)
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens} is too small; use at least 1")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature {options.temperature} makes no sense; use 0 or more")
    prompt = _prompt(options.prompt)
    with quiet_libraries():
        # What can be wrong without the weights is found before they are read.
        device = _device(options.device)
        tokenizer = _tokenizer(options.model)
        inputs = _inputs(tokenizer, prompt, options.model, chat=options.chat)
        model = _load(options, device)
        _refuse_too_long(model, inputs["input_ids"].shape[1], options.max_new_tokens)
        _generate(model, tokenizer, inputs, options)
    return 0


def _prompt(word: str) -> str:
    text = sys.stdin.read().removesuffix("\n") if word == "-" else word
    if not text.strip():
        raise ValueError("the prompt is empty; give some text, or - and text on standard input")
    return text


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; use cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from farskip.models.checkpoint_config import ordinary_config, transformers_config

    # Given to it, so that it does not ask whether to run the checkpoint's own code only to read its type.
    family, _, settings = ordinary_config(folder)
    config = transformers_config(family, settings)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder}: no tokenizer there (tokenizer.json); copy the one that the model was trained with")
    try:
        return AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({reason}); copy it again") from None


def _inputs(tokenizer: Any, prompt: str, folder: Path, *, chat: bool) -> Mapping[str, Any]:
    """Token ids [1, S] and attention mask [1, S]."""
    if chat:
        import jinja2

        if tokenizer.chat_template is None:
            raise ValueError(f"{folder}: --chat, but its tokenizer has no chat template; leave --chat out")
        try:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{folder}: the chat template refuses the prompt ({error})") from None
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the tokenizer makes no token of the prompt; give more text")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _load(options: argparse.Namespace, device: Any) -> Any:
    import torch

    from farskip.models.pretrained import load

    dtype = getattr(torch, options.dtype) if options.dtype else None
    return load(options.model, options.wiring, options.layers, dtype=dtype, device=device)


def _refuse_too_long(model: Any, num_prompt_tokens: int, num_new_tokens: int) -> None:
    """Beyond its positions a model does not fail, it babbles."""
    bound = getattr(model.config, "max_position_embeddings", None)
    if bound is not None and num_prompt_tokens + num_new_tokens > bound:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, and with --max-new-tokens {num_new_tokens} that is beyond the "
            f"{bound} positions of the model; shorten either"
        )


def _generate(model: Any, tokenizer: Any, inputs: Mapping[str, Any], options: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(options.seed)
    model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        **sampling,
        max_new_tokens=options.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
