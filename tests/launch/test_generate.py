"""`farskip generate`: the wired model's own continuation, as it comes, and one line for whatever is wrong."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import farskip
from farskip.launch.generate import parser
from farskip.models.testing_models import tiny_config

Call = Callable[[list[str]], tuple[int, str, str]]
PROMPT = "the cat sees a stone"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A farskip-wired Qwen3-MoE with a byte-level tokenizer. To be read only."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("generate") / "model"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([PROMPT] * 4, trainer=trainer)
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", vocab_size=len(backend.get_vocab()), eos_token_id=0, max_position_embeddings=64)
    farskip.save(farskip.rewire(Qwen3MoeForCausalLM(config).eval(), "farskip"), folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    return folder


def expected(checkpoint: Path, text: str = PROMPT, *, wiring: Any = None, tokens: int = 12, **sampling: Any) -> str:
    """The same by hand: what `farskip.load` and the tokenizer give."""
    from transformers import AutoTokenizer

    # Without asking whether to run the checkpoint's own code, which it does to read its type.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    model = farskip.load(checkpoint, wiring)
    inputs = tokenizer(text, return_tensors="pt")
    settings = {"do_sample": False, **sampling}
    ids = model.generate(**inputs, max_new_tokens=tokens, **settings)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def run(checkpoint: Path, call: Call, *words: str, prompt: str = PROMPT) -> str:
    code, out, error = call(["generate", str(checkpoint), prompt, "--max-new-tokens", "12", "--device", "cpu", *words])
    assert (code, error) == (0, "")
    return out


def test_options_are_frozen() -> None:
    """A new option is a decision: it is added here, in docs/convert.md and in the changelog."""
    options = {option for action in parser()._actions for option in action.option_strings}
    assert options == {
        *("-h", "--help", "--max-new-tokens", "--temperature", "--seed", "--wiring", "--layers", "--dtype"),
        *("--device", "--chat"),
    }


def test_the_continuation_of_the_wired_model(checkpoint: Path, farskip_command: Call) -> None:
    farskip_out = run(checkpoint, farskip_command)
    assert farskip_out == expected(checkpoint) and len(farskip_out) > 12
    ordinary = run(checkpoint, farskip_command, "--wiring", "ordinary")
    assert ordinary == expected(checkpoint, wiring="ordinary") != farskip_out
    part = run(checkpoint, farskip_command, "--wiring=ladder", "--layers=3")
    assert part not in (ordinary, farskip_out)


def test_the_prompt_from_standard_input(
    checkpoint: Path, farskip_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert run(checkpoint, farskip_command, prompt="-") == expected(checkpoint)


def test_sampling_follows_temperature_and_seed(checkpoint: Path, farskip_command: Call) -> None:
    outs = [run(checkpoint, farskip_command, "--temperature", "2", "--seed", seed) for seed in ("1", "1", "2")]
    assert outs[0] == outs[1] != outs[2]
    torch.manual_seed(1)
    assert outs[0] == expected(checkpoint, do_sample=True, temperature=2.0, top_k=0, top_p=1.0)
    assert run(checkpoint, farskip_command, "--temperature", "1e-4") == expected(checkpoint)


def test_dtype(checkpoint: Path, farskip_command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from farskip.models import pretrained

    seen, load = [], pretrained.load

    def noted(*arguments: Any, **named: Any) -> Any:
        seen.append(load(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(pretrained, "load", noted)
    run(checkpoint, farskip_command, "--dtype", "bfloat16")
    run(checkpoint, farskip_command)
    assert [next(model.parameters()).dtype for model in seen] == [torch.bfloat16, torch.float32]


def test_words_are_printed_as_they_come(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also, the checkpoint's own generation settings hold: here they allow only tokens that begin a word."""
    from farskip.launch.generate import main

    folder = shutil.copytree(checkpoint, tmp_path / "words")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    inner = [number for token, number in vocabulary.items() if not token.startswith("\u0120") or len(token) == 1]
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": inner}))

    class Terminal(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.writes: list[str] = []

        def flush(self) -> None:
            self.writes.append(self.getvalue())

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    main([str(folder), PROMPT, "--max-new-tokens", "8", "--temperature", "1", "--device", "cpu"])
    assert len(set(terminal.writes)) >= 5, "not everything at the end"
    assert all(word[0].isalpha() for word in terminal.getvalue().split())


def with_template(checkpoint: Path, folder: Path, template: str) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_a_chat(checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    folder = with_template(checkpoint, tmp_path / "chat", TEMPLATE)
    assert run(folder, farskip_command, "--chat", prompt="cat") == expected(checkpoint, "<user>cat<a>")


def bad(words: list[str], says: str, call: Call) -> None:
    code, out, error = call(["generate", *words])
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert error.startswith("farskip generate: ") and says in error


def test_bad_input_is_one_line(
    checkpoint: Path, tmp_path: Path, farskip_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(checkpoint)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for prompt in ("", " \n", "-"):
        bad([model, prompt], "the prompt is empty", farskip_command)
    bad([str(tmp_path / "absent"), "x"], "no config.json there", farskip_command)
    bad([model, "x", "--max-new-tokens", "0"], "--max-new-tokens 0 is too small", farskip_command)
    for value in ("-1", "nan", "inf"):
        bad([model, "x", "--temperature", value], "makes no sense; use 0 or more", farskip_command)
    bad([model, "x", "--device", "gpu"], "--device gpu is no device", farskip_command)
    bad([model, "x", "--device", "cuda:99"], "CUDA devices here", farskip_command)
    bad([model, "x", "--wiring", "farskp", "--device", "cpu"], "did you mean 'farskip'", farskip_command)
    bad([model, "x", "--chat"], "its tokenizer has no chat template", farskip_command)
    bad([model, "the " * 40, "--max-new-tokens", "50", "--device", "cpu"], "beyond the 64 positions", farskip_command)


def test_bad_checkpoints_are_one_line(checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("token*", "special*"))
    bad([str(bare), "x"], "no tokenizer there (tokenizer.json); copy the one", farskip_command)
    torn = tmp_path / "torn"
    shutil.copytree(checkpoint, torn)
    (torn / "tokenizer.json").write_text('{"version": "1.0", "mod')
    bad([str(torn), "x"], "its tokenizer cannot be loaded", farskip_command)
    unknown = tmp_path / "unknown"
    shutil.copytree(checkpoint, unknown)
    config = json.loads((unknown / "config.json").read_text())
    del config["farskip"]
    (unknown / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3MoEForCausalLM"]}))
    bad([str(unknown), "x", "--device", "cpu"], "is not supported; closest: Qwen3MoeForCausalLM", farskip_command)
    file = unknown / "model.safetensors"
    shutil.copy(checkpoint / "config.json", unknown / "config.json")
    file.write_bytes(file.read_bytes()[:-5])
    bad([str(unknown), "x", "--device", "cpu"], "incomplete or damaged", farskip_command)
    refuses = with_template(checkpoint, tmp_path / "refuses", "{{ raise_exception('no users here') }}")
    bad([str(refuses), "x", "--chat"], "the chat template refuses the prompt (no users here)", farskip_command)


@pytest.mark.parametrize("words", [["--dtype", "int8"], ["--max-new-tokens", "many"], ["--top-k", "3"]], ids=str)
def test_a_wrong_option_is_exit_code_2(words: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from farskip.launch.main import main

    with pytest.raises(SystemExit) as ended:
        main(["generate", str(checkpoint), "x", *words])
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err
