"""What `save` writes is read by transformers alone: a process without farskip computes the same bits."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farskip
from farskip.models import modeling_farskip
from farskip.models.attach import attachment_of
from farskip.models.export import ARCHITECTURE, AUTO_MAP, REMOTE_CODE, export_files, read_record
from farskip.models.family import families
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_families import CASES, FAMILIES, build, family_of
from farskip.models.testing_models import run_backward, token_ids
from farskip.parallel.tensor_parallel import TensorLayout
from farskip.residual import partial_base
from farskip.testing import assert_close, assert_equal_bits
from farskip.wiring import DENSE, MOE, MOE_SHARED, NAMED, LayerWiring, Wiring

all_cases = pytest.mark.parametrize("case", CASES)
all_families = pytest.mark.parametrize("case", FAMILIES)

WIRINGS = ("farskip", "attn_only", "parallel", "ladder")
LOGITS = {"max_error": 5e-5}
"""DESIGN.md 4: between files of another layout. Bits are equal for weights that lie alike in memory only, since some
products (one output per row) round by the alignment of their operands, and loaded weights lie as in their file."""
GRADIENTS = {"rel_norm": 1e-4}
"""DESIGN.md 4: the export adds gradients of the streams in another order than the executor."""
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)
DEEP = Wiring(
    (LayerWiring(attention=("previous.attention", "previous.mlp", "previous.shared", "previous.routed")),) * 4
)

READER = """
import sys

class NoFarskip:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "farskip":
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, NoFarskip())
import json, torch, traceback
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)

def forward(folder, ids):
    model, info = load(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not model.training
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        as_tuple = model(ids, output_hidden_states=True, return_dict=False)
        plain = model(ids)
    assert torch.equal(plain.logits, output.logits)
    states = [item for item in as_tuple if isinstance(item, tuple)][-1]
    assert all(torch.equal(a, b) for a, b in zip(states, output.hidden_states, strict=True))
    return {"logits": output.logits, "states": list(output.hidden_states), "state": dict(model.state_dict())}

def backward(folder, ids, checkpointing):
    model = load(folder).train()
    if checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        except TypeError:
            enable({"use_reentrant": checkpointing})
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
    logits = model(ids, use_cache=False).logits
    targets = ids[:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(targets.numel(), -1), targets).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "gradients": gradients}

def generate(folder, ids, mask, arguments):
    model = load(folder)
    options = {"attention_mask": mask, "eos_token_id": None, **arguments}
    recomputed = model.generate(ids, **{**options, "use_cache": False})
    return {"cached": model.generate(ids, **options), "recomputed": recomputed}

def resave(folder, target, ids):
    load(folder).save_pretrained(target, max_shard_size="40KB")
    return forward(target, ids)

def from_config(folder, ids):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    model.load_state_dict(load(folder).state_dict())
    with torch.no_grad():
        return {"logits": model(ids).logits, "model_type": config.model_type}

def without_head(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True)

def cut(folder, ids):
    model = load(folder)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model(ids).logits

def skipped(folder, ids):
    model = load(folder)
    model.model.layers[1].forward = lambda hidden_states, **arguments: hidden_states
    return model(ids).logits

sys.stdout.write("ready\\n")
sys.stdout.flush()
for line in sys.stdin:
    name, arguments, out = json.loads(line)
    arguments = [torch.load(a[1], weights_only=False) if isinstance(a, list) else a for a in arguments]
    try:
        torch.save(globals()[name](*arguments), out)
        answer = ""
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    assert not [name for name in sys.modules if name.partition(".")[0] == "farskip"]
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
"""


class Reader:
    """A process with transformers and without farskip. Called with the name of a function of `READER`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._errors = open(folder / "stderr.txt", "w")  # noqa: SIM115  as long as the process
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env={**os.environ, **environment},
        )
        assert self._line() == "ready\n"

    def __call__(self, name: str, *arguments: Any) -> Any:
        number = next(self._numbers)
        out, sent = self._folder / f"out{number}.pt", []
        for index, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor | dict):
                file = self._folder / f"in{number}.{index}.pt"
                torch.save(argument, file)
                sent.append(["file", str(file)])
            else:
                sent.append(str(argument) if isinstance(argument, Path) else argument)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, sent, str(out)]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        if answer:
            raise RuntimeError(answer)
        return torch.load(out, weights_only=False)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self._folder / "stderr.txt").read_text()[-3000:]
        return line


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    process = Reader(tmp_path_factory.mktemp("reader"))
    yield process
    process.close()


def saved(folder: Path, case: str, wiring: Any = "farskip", layers: Any = "all", **changes: Any) -> Any:
    """Save a rewired model, and load it again with farskip: what the export is compared with."""
    farskip.save(rewire(build(CASES[case], **changes).eval(), wiring, layers), folder)
    return farskip.load(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same(reader: Reader, folder: Path, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    seen = reader("forward", folder, ids)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    assert_equal_bits(seen["logits"], expected.logits)
    assert len(seen["states"]) == len(expected.hidden_states) == 5
    for mine, theirs in zip(seen["states"], expected.hidden_states, strict=True):
        assert_equal_bits(mine, theirs)
    return seen


# -- the function -----------------------------------------------------------------------------------------------------


@all_cases
def test_a_process_without_farskip_computes_the_same_bits(case: str, reader: Reader, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", case)
    seen = assert_same(reader, tmp_path / "model", model, token_ids(2, 9))
    assert_equal_bits(seen["state"], dict(model.state_dict()))


@pytest.mark.parametrize("wiring", [name for name in WIRINGS if name != "farskip"])
@all_families
def test_under_every_wiring(case: str, wiring: str, reader: Reader, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", case, wiring)
    assert_same(reader, tmp_path / "model", model, token_ids(2, 9))


@pytest.mark.slow
@pytest.mark.parametrize("wiring", WIRINGS)
@all_cases
def test_every_case_under_every_wiring(case: str, wiring: str, reader: Reader, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", case, wiring)
    assert_same(reader, tmp_path / "model", model, token_ids(2, 9))


@pytest.mark.parametrize(
    "wiring", [SC_MOE, DEEP, ("farskip", "last:3"), ("ladder", [0, 2]), ("parallel", "1:3")], ids=str
)
@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_moe", "llama4_text", "instella_moe", "llama"])
def test_other_wirings_and_layers(case: str, wiring: Any, reader: Reader, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", case, *(wiring if isinstance(wiring, tuple) else (wiring,)))
    assert_same(reader, tmp_path / "model", model, token_ids(2, 9))


@all_families
def test_bf16(case: str, reader: Reader, tmp_path: Path) -> None:
    farskip.save(rewire(build(CASES[case]).eval().to(torch.bfloat16), "farskip"), tmp_path / "model")
    model = farskip.load(tmp_path / "model")
    assert assert_same(reader, tmp_path / "model", model, token_ids(2, 9))["logits"].dtype is torch.bfloat16


MUTANTS = {
    "attention reads the full stream": ('n_BSD if plan.sources["attention"] == "n" else x_BSD', "x_BSD"),
    "the MLP side reads what attention added": ('{"x": x_BSD, "n"', '{"x": y_BSD, "n"'),
    "the partial stream lacks the shared expert": ("partial_BSD = y_BSD + shared_BSD", "partial_BSD = y_BSD"),
    "the streams are exchanged": ("torch.stack((full_BSD, partial_BSD))", "torch.stack((partial_BSD, full_BSD))"),
    "another bracketing": ("full_BSD = y_BSD + output_BSD", "full_BSD = x_BSD + (a_BSD + output_BSD)"),
    "the shared expert is forgotten": ("output_BSD = output_BSD + shared_BSD", "output_BSD = output_BSD"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_stream_is_seen(mutant: str, reader: Reader, tmp_path: Path) -> None:
    """The comparison has teeth: the same folder with one line of the file changed computes something else."""
    model = saved(tmp_path / "model", "deepseek_v3")
    file = tmp_path / "model" / REMOTE_CODE
    before, after = MUTANTS[mutant]
    assert file.read_text().count(before) == 1
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(AssertionError, match="differ"):
        assert_same(reader, tmp_path / "model", model, token_ids(2, 9))


@pytest.mark.parametrize("reentrant", [False, True])
@all_families
def test_gradients_and_recomputation(case: str, reentrant: bool, reader: Reader, tmp_path: Path) -> None:
    ids, model = token_ids(2, 9), saved(tmp_path / "model", case).train()
    logits, expected = run_backward(model, ids, use_cache=False)
    for checkpointing in (None, reentrant):
        seen = reader("backward", tmp_path / "model", ids, checkpointing)
        assert_equal_bits(seen["logits"], logits)
        assert_close(seen["gradients"], expected, **GRADIENTS)


def prompt(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, two of them padded on the left."""
    ids = token_ids(3, 6)
    ids[0, :3] = ids[1, :1] = model.config.pad_token_id
    return ids, (ids != model.config.pad_token_id).long()


@all_families
def test_sixteen_greedy_tokens_with_left_padding(case: str, reader: Reader, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", case)
    ids, mask = prompt(model)
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    seen = reader("generate", tmp_path / "model", ids, mask, options)
    assert expected.shape == (3, 22)
    assert torch.equal(seen["cached"], expected) and torch.equal(seen["recomputed"], expected)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_other_ways_to_generate(options: dict[str, Any], reader: Reader, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "deepseek_v3")
    ids, mask = prompt(model)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    expected = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    cached = reader("generate", tmp_path / "model", ids, mask, {**options, "use_cache": True})["cached"]
    assert torch.equal(cached, expected)


# -- the folder -------------------------------------------------------------------------------------------------------


@all_families
def test_saved_again_by_transformers_and_loaded_by_both(case: str, reader: Reader, tmp_path: Path) -> None:
    """In several shards; the wiring and the file go along, experts are written one by one as in the source."""
    model, ids = saved(tmp_path / "model", case, layers="last:3"), token_ids(2, 9)
    assert_close(reader("resave", tmp_path / "model", tmp_path / "again", ids)["logits"], model(ids).logits, **LOGITS)
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert (tmp_path / "again" / REMOTE_CODE).read_bytes() == (tmp_path / "model" / REMOTE_CODE).read_bytes()
    assert config_of(tmp_path / "again")["auto_map"] == AUTO_MAP
    loaded = farskip.load(tmp_path / "again")
    assert wiring_of(loaded) == wiring_of(model) and type(loaded).__name__ == type(model).__name__
    assert_equal_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    assert_same(reader, tmp_path / "again", loaded, ids)


def test_a_model_made_from_the_config(reader: Reader, tmp_path: Path) -> None:
    model, ids = saved(tmp_path / "model", "instella_moe"), token_ids(2, 9)
    seen = reader("from_config", tmp_path / "model", ids)
    assert seen["model_type"] == "farskip_deepseek_v3"
    assert_equal_bits(seen["logits"], model(ids).logits)


@all_families
def test_the_file_and_the_config_are_written(case: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", case)
    config, family = config_of(tmp_path / "model"), family_of(CASES[case])
    assert config["auto_map"] == AUTO_MAP
    code = (tmp_path / "model" / REMOTE_CODE).read_bytes()
    assert code == Path(modeling_farskip.__file__).read_bytes() and b"import farskip" not in code
    if family.wiring_keys is None:
        assert config["architectures"] == [ARCHITECTURE] and config["model_type"] == f"farskip_{family.model_type}"
        assert config["farskip"]["architecture"] == family.architecture
    else:
        assert config["architectures"] == [family.architecture] and config["farskip"] is True


def test_without_trust_nothing_is_loaded(tmp_path: Path) -> None:
    import transformers

    saved(tmp_path / "model", "qwen3_moe")
    for trust in ({}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **trust)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert not hasattr(transformers, ARCHITECTURE)  # nor anybody's who chooses by `architectures`


def test_a_model_without_its_head_is_refused(reader: Reader, tmp_path: Path) -> None:
    """auto_map names no such class, and the family's own would compute the ordinary function."""
    saved(tmp_path / "model", "qwen3_moe")
    with pytest.raises(RuntimeError, match=r"Unrecognized configuration class .*FarSkipConfig"):
        reader("without_head", tmp_path / "model")


@pytest.mark.parametrize(
    ("function", "reason"), [("cut", "model ended behind|wiring"), ("skipped", "3 dimensions|4 dimen")]
)
def test_layers_that_are_left_out_are_refused(function: str, reason: str, reader: Reader, tmp_path: Path) -> None:
    saved(tmp_path / "model", "deepseek_v3", "farskip", [2, 3])
    with pytest.raises(RuntimeError, match=reason):
        reader(function, tmp_path / "model", token_ids(1, 5))


def test_an_ordinary_model_gets_no_file(tmp_path: Path) -> None:
    saved(tmp_path / "model", "qwen3_moe", "farskip")
    farskip.save(rewire(farskip.load(tmp_path / "model"), "ordinary"), tmp_path / "model")
    assert not (tmp_path / "model" / REMOTE_CODE).exists()
    config = config_of(tmp_path / "model")
    assert "auto_map" not in config and "farskip" not in config
    assert config["model_type"] == "qwen3_moe" and config["architectures"] == ["Qwen3MoeForCausalLM"]


def test_a_damaged_record_is_refused_without_farskip(reader: Reader, tmp_path: Path) -> None:
    saved(tmp_path / "model", "qwen3_moe")
    good = config_of(tmp_path / "model")
    changes = {
        "records no wiring": {"farskip": 3},
        "the wiring has 3 layers, the model 4": {
            "farskip": {**good["farskip"], "wiring": Wiring.named("farskip", 3).to_dict()}
        },
    }
    for reason, change in changes.items():
        (tmp_path / "model" / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(RuntimeError, match=reason):
            reader("forward", tmp_path / "model", token_ids(1, 4))


def test_a_model_loaded_that_way_is_not_rewired(tmp_path: Path) -> None:
    model, ids = saved(tmp_path / "model", "qwen3_moe"), token_ids(2, 9)
    theirs = modeling_farskip.FarSkipForCausalLM.from_pretrained(tmp_path / "model")
    assert_equal_bits(theirs(ids).logits, model(ids).logits)
    for call in (rewire, wiring_of):
        with pytest.raises(ValueError, match=r"load the folder with farskip\.load"):
            call(theirs)


def test_a_transformers_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model", "qwen3_moe")
    for version in ("5.14.1", "5.9.0.dev0"):
        monkeypatch.setattr(modeling_farskip.transformers, "__version__", version)
        with pytest.raises(ImportError, match=f"transformers {version} would compute something else .* 5.15 or newer"):
            modeling_farskip.FarSkipConfig.from_pretrained(tmp_path / "model")


# -- the file against the core ----------------------------------------------------------------------------------------


def test_the_names_mean_the_same_in_the_file() -> None:
    fields = ("attention", "mlp", "shared", "routed")
    ours = {name: {field: getattr(layer, field) for field in fields} for name, layer in NAMED.items()}
    assert ours == modeling_farskip.NAMED


STACKS = {
    "shared": (DENSE, MOE_SHARED, MOE_SHARED, MOE_SHARED),
    "mixed": (MOE, DENSE, MOE_SHARED, MOE),
    "dense": (DENSE,) * 4,
    "moe": (MOE,) * 4,
}
TABLES = [
    *(Wiring.named(name, 4, layers) for name in NAMED for layers in ("all", "last:2", [0, 2])),
    SC_MOE,
    DEEP,
    Wiring((LayerWiring(shared=("attention",)), LayerWiring(attention=("previous.mlp",))) * 2),
    Wiring((LayerWiring(mlp=("attention", "previous.mlp", "previous.routed")),) * 4),
]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("wiring", TABLES, ids=lambda wiring: f"{wiring.name}-{wiring.rewired_layers}")
def test_the_file_resolves_a_wiring_as_the_core_does(wiring: Wiring, stack: str) -> None:
    blocks = STACKS[stack]
    try:
        expected = wiring.resolve(blocks)
    except ValueError:
        with pytest.raises(ValueError, match="more than two streams"):
            modeling_farskip.plans_of(wiring.to_dict(), blocks)
        return
    plans = modeling_farskip.plans_of(json.loads(json.dumps(wiring.to_dict())), blocks)
    for layer, (plan, inputs) in enumerate(zip(plans, expected, strict=True)):
        assert plan.sources == {block: str(inputs.source(block)) for block in inputs.blocks}
        assert plan.two_in == bool(inputs.left_out)
        later = expected[layer + 1].left_out if layer < 3 else ()
        assert plan.partial_out == (partial_base(inputs.blocks, later) if later else None)


def test_the_file_reads_both_names_of_parallel() -> None:
    record = Wiring.named("parallel", 4).to_dict()
    blocks = STACKS["mixed"]
    assert modeling_farskip.plans_of({**record, "name": "parallel"}, blocks) == modeling_farskip.plans_of(
        record, blocks
    )


# -- config without a model -------------------------------------------------------------------------------------------


@all_families
def test_the_config_alone_is_what_save_writes(case: str, tmp_path: Path) -> None:
    """`export_files` on the ordinary checkpoint's config: what a converter does that copies the tensors."""
    family = family_of(CASES[case])
    build(CASES[case]).save_pretrained(tmp_path / "plain")
    plain = (tmp_path / "plain" / "config.json").read_text()
    for wiring in ("farskip", "ladder", "ordinary"):
        farskip.save(rewire(build(CASES[case]), wiring), tmp_path / "saved")
        config = json.loads(plain)
        assert read_record(tmp_path, config)[0] is family
        untouched = json.dumps(config)
        export_files(config, family, Wiring.named(wiring, 4), tmp_path / "plain")
        assert json.dumps(config) == untouched
        assert config_of(tmp_path / "plain") == config_of(tmp_path / "saved")
        names = [(folder / REMOTE_CODE).exists() for folder in (tmp_path / "plain", tmp_path / "saved")]
        assert names[0] == names[1]
        config = config_of(tmp_path / "plain")
        again, recorded = read_record(tmp_path, config)
        assert again is family and (recorded or Wiring.named("ordinary", 4)) == Wiring.named(wiring, 4)


@pytest.mark.parametrize("wiring", ["farskip", "ordinary"])
def test_a_family_with_keys_of_its_own_can_be_written_without_them(wiring: str, reader: Reader, tmp_path: Path) -> None:
    model, ids = saved(tmp_path / "model", "instella_moe", wiring), token_ids(2, 9)
    config = config_of(tmp_path / "model")
    family, recorded = read_record(tmp_path, config)
    assert recorded is not None
    export_files(config, family, recorded, tmp_path / "model", own_keys=False)
    written = config_of(tmp_path / "model")
    assert written["model_type"] == "farskip_deepseek_v3" and written["architectures"] == [ARCHITECTURE]
    assert_same(reader, tmp_path / "model", model, ids)
    assert wiring_of(farskip.load(tmp_path / "model")) == recorded


def test_checkpoints_of_the_first_versions_are_read(tmp_path: Path) -> None:
    """They name the family's class in `architectures` and not in the record, and have no file beside them."""
    model = saved(tmp_path / "model", "qwen3_moe", "ladder")
    config = config_of(tmp_path / "model")
    config["architectures"] = [config["farskip"].pop("architecture")]
    del config["auto_map"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / REMOTE_CODE).unlink()
    assert wiring_of(farskip.load(tmp_path / "model")) == wiring_of(model)


# -- transformers' own save_pretrained on a rewired model -------------------------------------------------------------


@all_families
def test_save_pretrained_writes_the_wiring(case: str, reader: Reader, tmp_path: Path) -> None:
    """What a trainer of transformers calls: the same files as `farskip.save`."""
    model = saved(tmp_path / "model", case)
    model.save_pretrained(tmp_path / "theirs")
    assert config_of(tmp_path / "theirs") == config_of(tmp_path / "model")
    assert_same(reader, tmp_path / "theirs", model, token_ids(2, 9))
    rewire(model, "ladder").save_pretrained(tmp_path / "theirs")
    assert wiring_of(farskip.load(tmp_path / "theirs")).name in ("ladder", "mlp_only")


def test_save_pretrained_refuses_what_would_be_wrong(tmp_path: Path) -> None:
    model = rewire(build(CASES["qwen3_moe"]), "farskip")
    with pytest.raises(ValueError, match=r"push_to_hub=True would upload .* before its wiring"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    attachment = attachment_of(model)
    assert attachment is not None
    name = "model.layers.1.mlp.experts.down_proj"
    for attribute, value in (("sharded_experts", (name,)), ("tensor_layout", TensorLayout(sharded={name: 1}))):
        before = getattr(attachment, attribute)
        setattr(attachment, attribute, value)
        with pytest.raises(ValueError, match=r"this rank has a slice of it; use farskip\.save"):
            model.save_pretrained(tmp_path / "model")
        setattr(attachment, attribute, before)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "config.json").exists()


def test_every_family_is_compared() -> None:
    assert sorted(FAMILIES) == sorted(family.name for family in families())
