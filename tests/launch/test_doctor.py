"""`farskip doctor`: what it finds on machines and in environments that the tests make up, and for checkpoints."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farskip.launch import doctor_machine, doctor_run
from farskip.launch.doctor import parser
from farskip.launch.doctor_environment import Job, job_of, network, settings, threads, torchrun
from farskip.launch.doctor_machine import Finding, Level, compare_versions, devices, extras, room
from farskip.models.folder_copy import size_text
from farskip.models.testing_models import tiny_model

Call = Callable[[list[str]], tuple[int, str, str]]

ALONE = Job(ranks=1, ranks_here=None)
TWO_HOSTS = Job(ranks=16, ranks_here=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen3-MoE of 8 experts. To be read only."""
    folder = tmp_path_factory.mktemp("doctor") / "model"
    tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests' own machine sets is no finding of theirs."""
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MASTER_", "LOCAL_", "GPU_MAX", "TRITON_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def levels(found: list[Finding]) -> list[tuple[str, str]]:
    return [(str(finding.level), finding.name) for finding in found]


def only(found: list[Finding], level: Level) -> Finding:
    """The one finding of a level; it reads as one line."""
    (finding,) = [each for each in found if each.level is level]
    assert "\n" not in finding.text
    return finding


def about(call: Call, checkpoint: Path, *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and name -> level and text, of a doctor on a checkpoint."""
    code, out, err = call(["doctor", "--json", "-", "--model", str(checkpoint), *words])
    assert err == ""
    return code, {each["name"]: (each["level"], each["text"]) for each in json.loads(out)["findings"]}


def test_options_are_frozen() -> None:
    """A new option is a decision: it is added here, in docs/doctor.md and in the changelog."""
    options = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    assert options == {
        "--help", "--model", "--wiring", "--layers", "--ep", "--tp", "--sequence-parallel", "--chunks", "--capacity",
        "--shard-optimizer", "--ranks", "--ranks-per-host", "--runs", "--strict", "--quiet", "--json",
    }  # fmt: skip


# --- exit codes and output ---------------------------------------------------------------------------------------


def test_a_good_machine(farskip_command: Call, tmp_path: Path) -> None:
    code, out, err = farskip_command(["doctor", "--runs", str(tmp_path)])
    assert (code, err) == (0, "")
    assert "python 3." in out
    assert "torch 2." in out
    assert " 0 errors" in out.splitlines()[-1]


def test_warnings_count_only_under_strict(
    farskip_command: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    words = ["doctor", "--quiet", "--runs", str(tmp_path)]
    assert farskip_command(words)[0] == 0
    code, out, _ = farskip_command([*words, "--strict"])
    assert code == 1
    assert out.startswith("warning  CUDA_DEVICE_MAX_CONNECTIONS  CUDA_DEVICE_MAX_CONNECTIONS=1 defeats overlap: all ")
    assert not any(line.startswith("ok") for line in out.splitlines())


def test_errors_are_two_with_and_without_strict(farskip_command: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words in ([], ["--strict"]):
        code, out, _ = farskip_command(["doctor", "--quiet", "--runs", str(tmp_path / "file" / "runs"), *words])
        assert code == 2
        assert "error    disk" in out
        assert "set run.folder to a place of yours" in out


def test_json(farskip_command: Call, tmp_path: Path) -> None:
    words = ["doctor", "--runs", str(tmp_path), "--ep", "3", "--ranks", "8", "--json"]
    code, out, _ = farskip_command([*words, "-"])
    assert code == 2
    document = json.loads(out)
    code, text, _ = farskip_command([*words, str(tmp_path / "found.json")])
    assert text.splitlines()[-1].endswith("1 errors, 0 warnings")
    assert json.loads((tmp_path / "found.json").read_text()) == document
    assert document["counts"]["error"] == 1
    assert {"level": "error", "name": "parallel", "text": "ep=3 does not divide 8 ranks: choose a divisor of 8"} in (
        document["findings"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0 is too small; use at least 1"),
        (["--ranks-per-host", "-1"], "--ranks-per-host -1 is too small"),
        (["--layers", "last:2"], "--layers last:2 goes with --wiring NAME; add it"),
    ],
)
def test_bad_flags_are_one_line(words: list[str], message: str, farskip_command: Call) -> None:
    code, out, err = farskip_command(["doctor", *words])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# --- the machine -------------------------------------------------------------------------------------------------


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch": "2.10.0+cu128", "numpy": "2.4.0", "transformers": None}
    monkeypatch.setattr(doctor_machine, "installed", here.get)
    found = compare_versions(
        ["torch>=2.11", "numpy>=2", "transformers<6,>=5.15", "megatron-core>=0.16; extra == 'megatron'",
         "triton>=3.6; platform_system == 'Elsewhere'"], ">=3.11",
    )  # fmt: skip
    assert levels(found) == [("error", "torch"), ("error", "transformers"), ("ok", "versions")]
    assert found[0].text == "version 2.10.0+cu128, farskip needs >=2.11; pip install 'torch>=2.11'"
    assert found[1].text.startswith("not installed, farskip needs <6,>=5.15; pip install 'transformers")
    assert "numpy 2.4.0" in found[2].text
    old = compare_versions([], ">=9")
    assert levels(old) == [("error", "python")]
    assert "farskip needs >=9" in old[0].text


def test_a_nightly_of_a_newer_version_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "installed", lambda name: "2.14.0.dev20261101+cu130")
    assert levels(compare_versions(["torch>=2.11"], None)) == [("ok", "versions")]


def test_extras_say_what_there_is_not_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.importlib.util, "find_spec", lambda name: None)
    assert {finding.level for finding in extras()} == {Level.ok}
    assert (
        "not installed: no GPTModel can be rewired, and farskip bench overlap leaves out megatron-core's variants"
        in extras()[0].text
    )


class FakeCuda:
    """As much of torch.cuda as is asked, of a machine with `count` devices, of which one pair is apart."""

    def __init__(self, count: int, *, apart: bool = False) -> None:
        self._count, self._apart = count, apart

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self._count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self._count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake")
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: not (self._apart and (i, j) == (0, 1)))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(4).install(monkeypatch)
    assert levels(devices(4)) == [("ok", "devices"), ("ok", "peer access")]
    assert devices(4)[0].text.startswith("4 of Fake; CUDA 13.0; ")
    assert "8 ranks on this host and 4 devices" in only(devices(8), Level.error).text
    FakeCuda(4, apart=True).install(monkeypatch)
    assert "1 of 6 pairs, as (0, 1), cannot read each other's memory" in only(devices(None), Level.warning).text
    FakeCuda(0).install(monkeypatch)
    assert "built for CUDA 13.0 and sees no device" in only(devices(None), Level.warning).text


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(total: int) -> Callable[[Any], Any]:
        return lambda path: shutil._ntuple_diskusage(total, 0, total)  # type: ignore[attr-defined]

    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage(64 << 20))
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda which: (1024, 4096))
    found = room(512, tmp_path / "runs" / "later", shm=tmp_path)
    assert levels(found) == [("warning", "shared memory"), ("warning", "open files"), ("warning", "disk")]
    assert found[0].text.startswith("67.1 MB; NCCL needs up to 1.1 GB; in a container start it with --shm-size")
    assert "limit 1024, a rank of 512 may need 8432; ulimit -n 8432 first (the system allows 4096)" in found[1].text
    assert "67.1 MB free" in found[2].text
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage(1 << 40))
    assert {level for level, _ in levels(room(8, tmp_path, shm=tmp_path))} == {"ok"}


# --- the environment ---------------------------------------------------------------------------------------------


def test_settings() -> None:
    assert levels(settings({}, ALONE)) == [("ok", "settings")]
    found = settings({"NCCL_P2P_DISABLE": "1", "GPU_MAX_HW_QUEUES": "1", "NCCL_SOCKET_IFNAME": "lo"}, ALONE)
    assert levels(found) == [("warning", "GPU_MAX_HW_QUEUES"), ("warning", "NCCL_P2P_DISABLE")]
    assert settings({"NCCL_SOCKET_IFNAME": "lo"}, TWO_HOSTS)[0].text.startswith("NCCL_SOCKET_IFNAME=lo: other hosts")
    assert levels(settings({"NCCL_P2P_DISABLE": "0", "TORCH_DISTRIBUTED_DEBUG": "info"}, ALONE)) == [("ok", "settings")]


def test_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(environment: dict[str, str], job: Job, *, over_gloo: bool = True) -> list[Finding]:
        return network(environment, job, over_gloo=over_gloo, interfaces=["lo", "eth0", "ib0"])

    assert found({}, ALONE) == []
    assert found({"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "eth0"}, TWO_HOSTS) == []
    assert found({"NCCL_SOCKET_IFNAME": "^docker0,=eth0"}, ALONE) == []
    wrong = only(found({"GLOO_SOCKET_IFNAME": "eth"}, TWO_HOSTS), Level.error)
    assert wrong.text == "GLOO_SOCKET_IFNAME=eth: there is no such interface here; there is eth0, ib0"
    assert only(found({"NCCL_SOCKET_IFNAME": "wl"}, ALONE), Level.error).name == "NCCL_SOCKET_IFNAME"
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    assert "leads to 127.0.1.1" in only(found({}, TWO_HOSTS), Level.warning).text
    assert found({}, TWO_HOSTS, over_gloo=False) == []
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.3")
    assert levels(found({}, TWO_HOSTS)) == [("ok", "network")]


def test_threads() -> None:
    assert threads({}, ALONE) == []
    assert "unset with 8 ranks on 16 cores" in only(threads({}, TWO_HOSTS, 16), Level.warning).text
    assert levels(threads({"OMP_NUM_THREADS": "2"}, TWO_HOSTS, 16)) == [("ok", "OMP_NUM_THREADS")]
    too_many = only(threads({"OMP_NUM_THREADS": "4"}, TWO_HOSTS, 16), Level.warning)
    assert too_many.text == "OMP_NUM_THREADS=4 times 8 ranks is more than 16 cores; set it to 2"
    assert levels(threads({"OMP_NUM_THREADS": "1"}, TWO_HOSTS, 2)) == [("ok", "OMP_NUM_THREADS")]


COMPLETE = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a",
            "MASTER_PORT": "29500"}  # fmt: skip


def test_torchruns_variables_that_go_together() -> None:
    assert torchrun({})[0].text.startswith("not under torchrun")
    assert torchrun(COMPLETE) == [Finding(level=Level.ok, name="torchrun", text="rank 9 of 16, 8 on this host")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "16"}, "RANK=16 is outside WORLD_SIZE=16"),
        ({"WORLD_SIZE": None}, "RANK=9 is outside WORLD_SIZE unset, so 1"),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK=8 is outside LOCAL_WORLD_SIZE=8"),
        ({"LOCAL_WORLD_SIZE": "32"}, "LOCAL_WORLD_SIZE=32 is above WORLD_SIZE=16"),
        ({"RANK": "x"}, "RANK='x' is no number"),
        ({"RANK": "²"}, "RANK='²' is no number"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE=16, but MASTER_ADDR not set: ranks cannot meet"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is no port; use 1..65535"),
    ],
)
def test_torchruns_variables_that_do_not(change: dict[str, str | None], message: str) -> None:
    changed = {name: value for name, value in {**COMPLETE, **change}.items() if value is not None}
    found = torchrun(changed)
    assert {finding.level for finding in found} == {Level.error}
    assert any(message in finding.text for finding in found)


def test_the_job() -> None:
    assert job_of({}, None, None, 8) == Job(ranks=8, ranks_here=None)
    assert job_of(COMPLETE, None, None, 8) == TWO_HOSTS
    assert job_of(COMPLETE, 4, None, 8) == Job(ranks=4, ranks_here=None)
    assert job_of({}, 4, 8, 1) == Job(ranks=4, ranks_here=4)
    assert TWO_HOSTS.has_several_hosts and not ALONE.has_several_hosts


# --- a run that is planned ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_fits(checkpoint: Path, farskip_command: Call) -> None:
    code, found = about(farskip_command, checkpoint, "--wiring", "farskip", "--ep", "4", "--tp", "2")
    assert code == 0, found
    assert found["parallel"] == ("ok", "ep 4 and tp 2 over 4 ranks")
    assert found["model"][1].endswith("qwen3_moe, ordinary")
    assert found["files"][0] == found["overlap"][0] == found["memory"][0] == "ok"


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_parameters_of_a_rank_are_those_that_parallelize_leaves(
    ep: int, tp: int, checkpoint: Path, farskip_command: Call
) -> None:
    model = tiny_model("qwen3_moe")
    cut = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    count = 0
    for name, parameter in model.named_parameters():
        part = ep if ".experts." in name else tp if any(word in name for word in cut) else 1
        count += parameter.numel() // part
    ranks = str(max(ep, tp))
    _, found = about(farskip_command, checkpoint, "--ep", str(ep), "--tp", str(tp), "--ranks", ranks)
    assert found["memory"][1].startswith(f"a rank holds {count:,} parameters: ")


@pytest.mark.parametrize(("ep", "tp", "ranks"), [(1, 1, 4), (2, 1, 4), (1, 2, 4), (4, 1, 4)])
def test_a_divided_optimizer_is_counted_as_the_ranks_divide_it(
    ep: int, tp: int, ranks: int, checkpoint: Path, farskip_command: Call
) -> None:
    """However the model is spread, every rank then has an equal part of the whole model's state."""
    model = tiny_model("qwen3_moe")
    state = 8 * (sum(parameter.numel() for parameter in model.parameters()) // ranks)
    words = ["--ep", str(ep), "--tp", str(tp), "--ranks", str(ranks), "--shard-optimizer"]
    said = about(farskip_command, checkpoint, *words)[1]["memory"][1]
    assert f"AdamW {size_text(state)}, together" in said


def test_memory_that_is_too_little(checkpoint: Path, farskip_command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(parameter.numel() for parameter in tiny_model("qwen3_moe").parameters())
    for size, level in ((20 * count, "ok"), (18 * count, "warning"), (15 * count, "error")):
        monkeypatch.setattr(doctor_run, "device_memory", lambda size=size: (size, "a device"))
        found = about(farskip_command, checkpoint)[1]
        assert found["memory"][0] == level, found["memory"]
        assert level == "ok" or "too little" in found["memory"][1]
    monkeypatch.setattr(doctor_run, "device_memory", lambda: (15 * count, "this machine"))
    found = about(farskip_command, checkpoint, "--ep", "2", "--ranks-per-host", "2")[1]
    assert found["memory"][0] == "warning"  # a run may be planned here for another one
    assert "on this machine for each of 2 ranks: too little; use more ranks" in found["memory"][1]
    assert "or divide the optimizer (--shard-optimizer)" in found["memory"][1]


def test_no_window_is_a_warning(checkpoint: Path, farskip_command: Call) -> None:
    """Qwen3-MoE has no shared expert: ordinary wiring hides nothing, in chunks it does."""
    level, text = about(farskip_command, checkpoint, "--ep", "4")[1]["overlap"]
    assert level == "warning"
    assert text.startswith("ordinary (4 layers) leaves no compute to hide a collective under; try --wiring farskip")
    assert about(farskip_command, checkpoint, "--ep", "4", "--chunks", "2")[1]["overlap"][0] == "ok"
    assert about(farskip_command, checkpoint)[1]["overlap"] == (
        "ok", "no collective inside the layers: there is nothing to hide",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "name", "message"),
    [
        (["--ep", "3"], "experts", "expert parallelism of 3 does not divide 8 experts: choose a divisor"),
        (["--tp", "8", "--ep", "8"], "tensor parallelism", "does not divide num_attention_heads=4: choose a divisor"),
        (["--tp", "2", "--ranks", "3"], "parallel", "tp=2 does not divide 3 ranks"),
        (["--ep", "2", "--tp", "4"], "parallel", "ep=2 is not a multiple of tp=4"),
        (["--sequence-parallel"], "parallel", "parallel.sequence_parallel=true with parallel.tp=1 has no ranks"),
        (["--chunks", "0"], "parallel", "parallel.chunks=0 is too small"),
        (["--wiring", "farskp"], "wiring", "wiring 'farskp' is unknown; did you mean 'farskip'?"),
        (["--wiring", "ladder", "--layers", "last:9"], "wiring", "layers 'last:9': the model has only 4 layers"),
        (["--wiring", "ladder", "--layers", "[a]"], "wiring", "layers '[a]' is not understood"),
        (["--wiring", "ladder", "--layers", "0,9"], "wiring", "layers '0,9': layer 9 is outside 0..3 of this model"),
    ],
)
def test_what_a_run_would_refuse(
    words: list[str], name: str, message: str, checkpoint: Path, farskip_command: Call
) -> None:
    code, found = about(farskip_command, checkpoint, *words)
    assert code == 2
    assert found[name][0] == "error"
    assert message in found[name][1]
    assert found["model"][0] == "ok"  # the rest is looked at all the same
    assert "memory" not in found or name == "wiring"


def altered(checkpoint: Path, folder: Path, **keys: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("keys", "name", "message"),
    [
        ({"architectures": ["BertModel"]}, "model", "model architecture 'BertModel' is not supported"),
        ({"model_type": "mixtral"}, "model", "goes with model_type 'qwen3_moe', but config.json says 'mixtral'"),
        ({"num_hidden_layers": 5}, "files", "none of layer 4, though config.json says 5 layers"),
        ({"hidden_size": 64}, "files", "model.embed_tokens.weight is [97, 32], config.json makes it [97, 64]; corr"),
        ({"num_local_experts": 4}, "files", "mlp.gate.weight is [8, 32], config.json makes it [4, 32]; correct it"),
        ({"mlp_only_layers": [1]}, "files", "layer 0 has tensors of attention + mlp, config.json says"),
        ({"quantization_config": {"quant_method": "gptq"}}, "model", "the checkpoint is quantized ('gptq')"),
        ({"hidden_size": "big"}, "model", "config.json does not make a qwen3_moe: Validation error for"),
        ({"hidden_act": "no"}, "model", "transformers cannot build it (KeyError: 'no')"),
    ],
)  # fmt: skip
def test_a_config_that_lies(
    keys: dict[str, Any], name: str, message: str, checkpoint: Path, tmp_path: Path, farskip_command: Call
) -> None:
    code, found = about(farskip_command, altered(checkpoint, tmp_path / "model", **keys))
    assert code == 2
    assert found[name][0] == "error"
    assert message in found[name][1]


def test_no_checkpoint_and_a_torn_one(checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    code, found = about(farskip_command, tmp_path)
    assert code == 2
    assert found["model"] == ("error", f"{tmp_path}: no config.json there; give the folder of a checkpoint in "
                              "transformers' format")  # fmt: skip
    folder = altered(checkpoint, tmp_path / "torn")
    tensors = folder / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    code, found = about(farskip_command, folder)
    assert (code, found["files"][0]) == (2, "error")
    assert "incomplete or damaged, copy it again" in found["files"][1]
    tensors.unlink()
    code, found = about(farskip_command, folder, "--ranks", "2")
    assert (code, found["files"][0], found["loading"][0]) == (0, "warning", "warning")


def test_no_process_group_is_started(checkpoint: Path, farskip_command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was started"))
    _, found = about(farskip_command, checkpoint, "--ep", "4")
    assert found["torchrun"] == ("ok", "rank 9 of 16, 8 on this host")
    assert found["parallel"] == ("ok", "ep 4 and tp 1 over 16 ranks")
