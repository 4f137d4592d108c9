"""Several ranks: the same run as on one, and how it ends when a rank raises, dies, or is asked to stop."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import farskip
from farskip.checkpoint import latest_checkpoint, read_manifest
from farskip.launch import ranks as ranks_module
from farskip.launch import testing_jobs
from farskip.launch.config import RunConfig
from farskip.launch.ranks import run_on_local_ranks, torchrun_ranks

Runs = Callable[[str], Path]
RUN = RunConfig(device="cpu", timeout_s=60, threads=1)


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ranks_alive() -> list[Any]:
    """The processes of `run_on_local_ranks`; the pool of the test session has others."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("rank ")]


def on_this_rank(job: str, words: list[str]) -> str | None:
    """Calls a job on a rank of the pool; the message of a user error."""
    import torch.distributed as dist

    from farskip.launch import testing_jobs
    from farskip.launch.ranks import Ranks

    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device="cpu")
    try:
        getattr(testing_jobs, job)(ranks, words)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def threads_after(job: str, words: list[str]) -> tuple[str | None, bool, bool]:
    """What the job says, whether it left gloo's threads realtime, and whether they may be."""
    from farskip.parallel.gloo_threads import gloo_threads_are_realtime, set_gloo_threads

    set_gloo_threads("ordinary")
    said = on_this_rank(job, words)
    return said, gloo_threads_are_realtime(), set_gloo_threads("auto")


@pytest.mark.parametrize("wish", ["auto", "ordinary"])
def test_a_job_puts_gloos_threads_ahead(wish: str, rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    more = [f"parallel.gloo_threads={wish}", "training.num_steps=1", "training.optimizer.warmup_steps=0"]
    for said, are, may_be in rank_pool.run(threads_after, 2, "pretrain_job", workshop.pretrain(tmp_path, *more)[1:]):
        assert said is None and are == (may_be and wish == "auto")


def assert_same_run(actual: Path, expected: Path) -> None:
    """Sums of the same terms in another order: losses agree to fp32 rounding, which Adam's steps let grow a little."""
    ours, theirs = metrics(actual), metrics(expected)
    assert len(ours) == len(theirs) > 1
    for name in ("loss", "grad_norm", "loss_tokens"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2e-4), name
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_are_one_with_twice_the_batch(
    ep: int, family: str, rank_pool: Any, workshop: Any, tmp_path: Path
) -> None:
    more = [f"parallel.ep={ep}", "wiring.name=farskip"]
    one = workshop.pretrain(tmp_path / "one", *more[1:], family=family, batch_size=4)[1:]
    two = workshop.pretrain(tmp_path / "two", *more, family=family, batch_size=2)[1:]
    assert rank_pool.run(on_this_rank, 1, "pretrain_job", one) == [None]
    assert rank_pool.run(on_this_rank, 2, "pretrain_job", two) == [None, None]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    ours, theirs = (farskip.load(tmp_path / name / "model") for name in ("two", "one"))
    assert farskip.wiring_of(ours) == farskip.wiring_of(theirs)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_the_auxiliary_loss_counts_once_on_any_number_of_ranks(rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    seen = []
    for num_ranks, batch_size in ((1, 4), (2, 2)):
        words = workshop.pretrain(tmp_path / str(num_ranks), "balance.aux_coefficient=1.0", batch_size=batch_size)[1:]
        rank_pool.run(on_this_rank, num_ranks, "pretrain_job", words)
        first = metrics(tmp_path / str(num_ranks))[0]
        seen.append((first["balance/aux_loss"], first["grad_norm"]))
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


@pytest.mark.parametrize("schedule", ["serial", "overlapped"])
def test_balancing_is_the_same_under_tensor_parallelism(
    schedule: str, rank_pool: Any, workshop: Any, tmp_path: Path
) -> None:
    """Each rank of a group routes its share of the same tokens; loads are counted over them, and no token twice."""
    more = ["balance.bias_rate=0.01", "balance.aux_coefficient=1.0", "training.num_steps=3", "wiring.name=farskip"]
    for name, num_ranks, words in (("one", 1, []), ("two", 2, ["parallel.tp=2", f"parallel.schedule={schedule}"])):
        command = workshop.pretrain(tmp_path / name, *more, *words)[1:]
        assert rank_pool.run(on_this_rank, num_ranks, "pretrain_job", command) == [None] * num_ranks
    assert_same_run(tmp_path / "two", tmp_path / "one")
    two, one = (metrics(tmp_path / name) for name in ("two", "one"))
    for key in ("balance/aux_loss", "balance/max_load"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=2e-4), key
    ours, theirs = (dict(farskip.load(tmp_path / name / "model").named_buffers()) for name in ("two", "one"))
    biases = [name for name in theirs if name.endswith("e_score_correction_bias")]
    assert biases and all(theirs[name].abs().max() > 0.005 for name in biases)
    for name in biases:  # three steps of 0.01 up or down
        assert (ours[name] - theirs[name]).abs().max() < 1e-6, name


@pytest.mark.slow
def test_four_ranks_in_two_groups(rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    one = workshop.pretrain(tmp_path / "one", "wiring.name=farskip", batch_size=4)[1:]
    four = workshop.pretrain(tmp_path / "four", "wiring.name=farskip", "parallel.ep=2", batch_size=1)[1:]
    rank_pool.run(on_this_rank, 1, "pretrain_job", one)
    assert rank_pool.run(on_this_rank, 4, "pretrain_job", four) == [None] * 4
    assert_same_run(tmp_path / "four", tmp_path / "one")


def test_serial_and_overlapped_give_equal_bits(
    rank_pool: Any, workshop: Any, farskip_command: Any, tmp_path: Path
) -> None:
    """And the run that chose its schedule by stage times leaves them for `farskip simulate`."""
    timings = {"step_s", "tokens_per_s", "exposed_share"}
    seen = []
    for schedule in ("serial", "overlapped"):
        words = workshop.pretrain(tmp_path / schedule, "wiring.name=farskip", f"parallel.schedule={schedule}")[1:]
        assert rank_pool.run(on_this_rank, 2, "pretrain_job", words) == [None, None]
        seen.append([{k: v for k, v in line.items() if k not in timings} for line in metrics(tmp_path / schedule)])
    assert seen[0] == seen[1]
    assert not (tmp_path / "serial" / "stage_times.json").exists()
    run, words = tmp_path / "overlapped", ["simulate", "--ep", "2", "--json", "-"]
    code, out, _ = farskip_command([*words, "--model", str(run / "model"), "--times", str(run)])
    assert code == 0
    assert json.loads(out)["stage_ms"] == json.loads((run / "stage_times.json").read_text())


def test_stages_of_a_wiring_are_those_of_one_rank(rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    """With a schedule chosen by stage times of the whole wiring, and with all that a new executor has to take over."""
    stages = ["wiring.name=farskip", "wiring.stage_layers=1", "wiring.stage_steps=1", "balance.aux_coefficient=0.01"]
    words = workshop.pretrain(tmp_path / "one", *stages, batch_size=4)[1:]
    assert rank_pool.run(on_this_rank, 1, "pretrain_job", words) == [None]
    more = ["parallel.warmup_steps=1", "parallel.recompute=full", "parallel.kernels=reference", "profile.steps=[3]"]
    words = workshop.pretrain(tmp_path / "two", *stages, *more)[1:]
    assert rank_pool.run(on_this_rank, 2, "pretrain_job", words) == [None, None]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "traces" / "rank1_step3.json.gz").is_file()
    whole = workshop.pretrain(tmp_path / "whole", "wiring.name=farskip", stages[-1], batch_size=4)[1:]
    assert rank_pool.run(on_this_rank, 1, "pretrain_job", whole) == [None]
    first, at_once = metrics(tmp_path / "one")[0]["loss"], metrics(tmp_path / "whole")[0]["loss"]
    assert first != pytest.approx(at_once, rel=1e-3), "the first stage is the last one"


class Words:
    """A tokenizer as far as a model is built by it."""

    eos_token_id = 7

    def __len__(self) -> int:
        return 61


def first_weights(settings: dict[str, Any], **degrees: int) -> dict[str, Any]:
    """What this rank of a pretraining starts with."""
    import torch.distributed as dist

    from farskip.launch import job
    from farskip.launch.config import FreshModelConfig, ParallelConfig, WiringConfig
    from farskip.launch.ranks import Ranks

    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device="cpu")
    parallel, model = ParallelConfig(**degrees), FreshModelConfig(family="qwen3_moe", config=settings)
    mesh = job.build_job_mesh(parallel, ranks)
    return dict(job.build_spread(model, Words(), WiringConfig(), parallel, ranks, mesh).state_dict())


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"ep": 1, "tp": 2}], ids=str)
def test_every_rank_starts_with_its_slices_of_the_model_of_one(degrees: dict[str, int], rank_pool: Any) -> None:
    import torch

    sizes = {"hidden_size": 16, "head_dim": 8, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    settings = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    (whole,) = rank_pool.run(first_weights, 1, settings)
    num_cut = 0
    for rank, mine in enumerate(rank_pool.run(first_weights, 2, settings, **degrees)):
        for name, tensor in whole.items():
            cut = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != mine[name].shape[dim]]
            assert torch.equal(mine[name], tensor.chunk(2, cut[0])[rank] if cut else tensor), name
            num_cut += len(cut)
    assert num_cut == 2 * 2 * (2 if "tp" not in degrees else 4), "two stacks of experts or four projections per layer"


def num_parts(checkpoint: Path, name: str) -> int:
    """In how many parts a tensor was written."""
    from torch.distributed.checkpoint import FileSystemReader

    stored: Any = FileSystemReader(checkpoint).read_metadata().state_dict_metadata[name]
    return len(stored.chunks)


def test_a_divided_optimizer_changes_no_bit_and_its_run_goes_on_on_one_rank(
    rank_pool: Any, workshop: Any, tmp_path: Path
) -> None:
    timings = {"step_s", "tokens_per_s", "exposed_share"}
    seen, half = [], "checkpoints/step_00000002"
    for name, parts in (("false", 1), ("true", 2)):
        words = workshop.pretrain(tmp_path / name, f"parallel.shard_optimizer={name}")[1:]
        assert rank_pool.run(on_this_rank, 2, "pretrain_job", words) == [None, None]
        seen.append([{k: v for k, v in line.items() if k not in timings} for line in metrics(tmp_path / name)])
        assert num_parts(tmp_path / name / half, "optimizer.exp_avg.model.norm.weight") == parts
    assert len(seen[0]) == 4 and seen[0] == seen[1]
    shutil.copytree(tmp_path / "true" / half, tmp_path / "one" / half)
    more = ["parallel.shard_optimizer=true", "run.resume=true"]
    words = workshop.pretrain(tmp_path / "one", *more, batch_size=4)[1:]
    assert rank_pool.run(on_this_rank, 1, "pretrain_job", words) == [None]
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "true")
    assert [line["step"] for line in ours] == [3, 4]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs[2:]], rel=2e-4), name
    words = workshop.pretrain(tmp_path / "other", "run.resume=true", batch_size=2)[1:]
    shutil.copytree(tmp_path / "true" / half, tmp_path / "other" / half)
    (said,) = rank_pool.run(on_this_rank, 1, "pretrain_job", words)
    assert "the saved position in the data is for data.batch_size * ranks=4, but this run has" in said


@pytest.mark.slow
def test_distillation_with_recompute_and_an_emulated_link(
    rank_pool: Any, workshop: Any, pretrained: Runs, tmp_path: Path
) -> None:
    more = ["parallel.recompute=full", "parallel.link.kind=emulated", "parallel.link.latency_us=500"]
    plain = workshop.distill(tmp_path / "plain", pretrained("deepseek_v3") / "model", batch_size=1)[1:]
    heavy = workshop.distill(tmp_path / "heavy", pretrained("deepseek_v3") / "model", *more, batch_size=1)[1:]
    for words in (plain, heavy):
        assert rank_pool.run(on_this_rank, 2, "distill_job", words) == [None, None]
    for line, other in zip(metrics(tmp_path / "heavy"), metrics(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert farskip.wiring_of(farskip.load(tmp_path / "heavy" / "model")).name == "farskip"
    assert (tmp_path / "heavy" / "report.md").exists()


def experts_loaded_by_a_distillation(words: list[str]) -> list[tuple[int, int, str]]:
    """Of each model that this rank loads: experts that it held as soon as it was loaded, chunks, schedule."""
    from farskip.launch import job
    from farskip.models.attach import attachment_of, layers_of

    seen = []
    load = job.load

    def noting(*arguments: Any, **settings: Any) -> Any:
        model = load(*arguments, **settings)
        attachment = attachment_of(model)
        assert attachment is not None and attachment.executor.dispatcher is not None
        experts = layers_of(model)[-1].mlp.experts
        seen.append((experts.gate_up_proj.shape[0], attachment.executor.dispatcher.chunks, attachment.executor.mode))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load", noting)
        assert on_this_rank("distill_job", words) is None
    return seen


def test_a_rank_of_a_distillation_loads_its_share_of_teacher_and_student(
    rank_pool: Any, workshop: Any, pretrained: Runs, tmp_path: Path
) -> None:
    more = ["parallel.chunks=2", "parallel.schedule=serial", "training.num_steps=2"]
    words = workshop.distill(tmp_path / "run", pretrained("qwen3_moe") / "model", *more)[1:]
    assert rank_pool.run(experts_loaded_by_a_distillation, 2, words) == [[(2, 2, "serial")] * 2] * 2


BAD = {
    "ep and ranks": (["parallel.ep=3"], "ep=3 does not divide 2 ranks: choose a divisor of 2"),
    "ep and experts": (["model.config.n_routed_experts=3"], "expert parallelism of 2 does not divide 3 experts"),
}


@pytest.mark.parametrize(("more", "answer"), BAD.values(), ids=BAD)
def test_what_does_not_divide(more: list[str], answer: str, rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    words = workshop.pretrain(tmp_path / "run", *more)[1:]
    answers = rank_pool.run(on_this_rank, 2, "pretrain_job", words)
    assert all(text.startswith(f"ValueError: {answer}") for text in answers)
    assert not (tmp_path / "run").exists()


def test_a_nan_stops_every_rank_with_the_same_words(rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    more = ["training.optimizer.learning_rate=1e30", "training.optimizer.max_grad_norm=null", "data.batch_size=1"]
    answers = rank_pool.run(on_this_rank, 2, "pretrain_job", workshop.pretrain(tmp_path / "run", *more)[1:])
    assert answers[0] == answers[1]
    assert answers[0].startswith("NonFiniteError: step ")
    assert not (tmp_path / "run" / "model").exists()


def test_a_rank_that_raises_ends_all_and_is_named() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1: give it more$"):
        run_on_local_ranks(testing_jobs.raise_on_rank_1, "give it more", RUN, 2)
    assert time.monotonic() - started < 60
    assert ranks_alive() == []


def test_a_rank_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_module._GRACE_S <= 60
    monkeypatch.setattr(ranks_module, "_GRACE_S", 0.5)
    with pytest.raises(RuntimeError, match=r"^rank 1: left$"):
        run_on_local_ranks(testing_jobs.hang_on_rank_0, 600.0, RUN, 2)
    assert ranks_alive() == []


def test_a_rank_that_raises_lets_those_go_who_wait_for_its_words(tmp_path: Path) -> None:
    """Which is no collective, whose connections would be closed; the launcher ends them only after its grace."""
    with pytest.raises(RuntimeError, match=r"^rank 0: left$"):
        run_on_local_ranks(testing_jobs.wait_for_words_of_rank_0, str(tmp_path), RUN, 2)
    assert (tmp_path / "let go").exists()


def text_packed_slowly(folder: str, seconds: float) -> int:
    """Training tokens that this rank sees, from a packing that takes longer than the group's timeout."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from farskip import data
    from farskip.data_config import DataConfig
    from farskip.launch import job
    from farskip.launch.config import ParallelConfig
    from farskip.launch.ranks import Ranks

    def pack_slowly(*arguments: Any) -> Any:
        time.sleep(seconds)
        return pack_text(*arguments)

    pack_text, config = data.pack_text, DataConfig(path=folder, patterns=["*.txt"], vocab_size=257, sequence_length=8)
    config.cache_dir, config.heldout_fraction = str(Path(folder) / "cache"), 0.0
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device="cpu")
    _set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "pack_text", pack_slowly)
        return job.build_text(config, ParallelConfig(), ranks)[1].num_train_tokens


def test_packing_may_take_longer_than_a_collective_waits(rank_pool: Any, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}")
    first, second = rank_pool.run(text_packed_slowly, 2, str(tmp_path), 1.5)
    assert first == second > 0


def test_on_cuda_a_rank_that_raises_tells_why_and_leaves_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_local_rank", testing_jobs.local_rank_as_on_cuda)
    with pytest.raises(RuntimeError, match=r"^rank 1: give it more$"):
        run_on_local_ranks(testing_jobs.raise_on_rank_1, "give it more", RUN, 2)


@pytest.mark.parametrize("error", [None, ValueError("out of words"), KeyError("a bug"), KeyboardInterrupt()], ids=repr)
def test_on_cuda_torchrun_destroys_the_group_of_ranks_that_are_done_only(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.distributed as dist

    store, seen, at_exit = dist.HashStore(), [], []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCH_NCCL_HIGH_PRIORITY": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "_device", lambda name, local_rank: f"cuda:{local_rank}")
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: seen.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append("destroyed"))
    monkeypatch.setattr(ranks_module, "atexit", SimpleNamespace(register=at_exit.append))
    monkeypatch.setattr(ranks_module, "_leave_together", lambda *_: seen.append("all are done"))
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), torchrun_ranks(RUN) as ranks:
        assert ranks.device == "cuda:1"
        if error is not None:
            raise error
    if error is None:
        assert (seen, at_exit) == (["cuda:1", "nccl", "all are done", "destroyed"], [])
        return
    assert seen == ["cuda:1", "nccl"]
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    (leave,) = at_exit
    leave()
    assert codes == [1]


@pytest.mark.parametrize(
    ("codes", "messages", "answer"),
    [
        ((-6, 1), {"error_1": "out of memory"}, "rank 1: out of memory"),
        ((-6, 1), {}, "rank 1 of 2 ended with exit code 1; what it said stands above"),
        ((-6, -9), {}, "rank 1 of 2 was ended by signal SIGKILL; the others were stopped"),
        (
            (1, -6),
            {"lost_peer_0": "rank 0: no answer from rank 1"},
            "rank 1 of 2 was ended by signal SIGABRT; the others",
        ),
        ((1, -11), {"error_0": "gone"}, "rank 1 of 2 was ended by signal SIGSEGV; the others were stopped"),
        ((1, 1), {"lost_peer_0": "rank 0: no answer", "error_1": "too short"}, "rank 1: too short"),
    ],
    ids=str,
)
def test_who_failed_first(codes: tuple[int, int], messages: dict[str, str], answer: str, tmp_path: Path) -> None:
    """A peer that raises under NCCL ends as SIGABRT of those who wait for it."""
    for name, message in messages.items():
        (tmp_path / name).write_text(message)
    failed = list(enumerate(codes))
    for order in (failed, failed[::-1]):
        assert ranks_module._first_failure(order, str(tmp_path), 2).startswith(answer)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [ranks_module._device("auto", local_rank) for local_rank in range(2)] == ["cuda:0", "cuda:1"]
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=f"^run.device={name}: .* needs cuda:2, but torch sees 2 GPU"):
            ranks_module._device(name, 2)
    assert ranks_module._device("cpu", 2) == "cpu"


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="ranks=0 is too small; use at least 1"):
        run_on_local_ranks(testing_jobs.raise_on_rank_1, "", RUN, 0)


def test_sigterm_outside_of_training_is_told(tmp_path: Path) -> None:
    def stop_when_there() -> None:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_when_there)
    thread.start()
    with pytest.raises(RuntimeError, match="stopped outside of a training step, "):
        run_on_local_ranks(testing_jobs.wait_for_file, str(tmp_path), RUN, 2)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def wait_until(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def long_run(workshop: Any, folder: Path) -> list[str]:
    more = ["training.num_steps=100000", "training.heldout.every_steps=0", "data.batch_size=1"]
    return workshop.pretrain(folder, *more)[1:]


def resume_for_two_steps(rank_pool: Any, words: list[str], folder: Path) -> None:
    """The last checkpoint loads, and the run goes on from it."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    step = read_manifest(newest).step
    more = [f"training.num_steps={step + 2}", "run.resume=true"]
    assert rank_pool.run(on_this_rank, 2, "pretrain_job", [*words, *more]) == [None, None]
    assert metrics(folder)[-1]["step"] == step + 2
    farskip.load(folder / "model")


def test_a_rank_that_is_killed_in_mid_step(rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    words = long_run(workshop, tmp_path / "run")
    killed_at: list[float] = []

    def kill_rank_1() -> None:
        wait_until(lambda: len(metrics(tmp_path / "run")) > 5)
        (process,) = (child for child in ranks_alive() if child.name == "rank 1")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        killed_at.append(time.monotonic())

    thread = threading.Thread(target=kill_rank_1)
    thread.start()
    with pytest.raises(RuntimeError, match="rank 1 of 2 was ended by signal SIGKILL; the others were stopped"):
        run_on_local_ranks(testing_jobs.pretrain_job, words, RUN, 2)
    thread.join()
    assert time.monotonic() - killed_at[0] < 60
    assert ranks_alive() == []
    resume_for_two_steps(rank_pool, words, tmp_path / "run")


def test_sigterm_saves_on_all_ranks(
    rank_pool: Any, workshop: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*long_run(workshop, tmp_path / "run"), "training.checkpoint.every_steps=0"]

    def stop() -> None:
        wait_until(lambda: len(metrics(tmp_path / "run")) > 5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    run_on_local_ranks(testing_jobs.pretrain_job, words, RUN, 2)
    thread.join()
    out, error = capfd.readouterr()
    assert "shutdown requested after step " in out
    assert error == ""
    assert not (tmp_path / "run" / "model").exists()
    resume_for_two_steps(rank_pool, words, tmp_path / "run")


def asked_at_a_look(words: list[str], asked: int, look: int) -> tuple[str | None, int]:
    """Calls a job on a rank of the pool; one rank is asked to stop when the trainer looks for the `look`-th time. What
    went wrong, and how often this rank looked."""
    import torch.distributed as dist

    from farskip.launch import job

    class AskedAtALook(job.ShutdownRequest):
        num_looks = 0

        @property
        def requested(self) -> bool:
            AskedAtALook.num_looks += 1
            return dist.get_rank() == asked and self.num_looks >= look

    before, job.ShutdownRequest = job.ShutdownRequest, AskedAtALook  # type: ignore[misc]
    try:
        return on_this_rank("pretrain_job", words), AskedAtALook.num_looks
    finally:
        job.ShutdownRequest = before  # type: ignore[misc]


@pytest.mark.parametrize("asked", [0, 1])
def test_ranks_that_share_tensors_stop_at_the_same_step(
    asked: int, rank_pool: Any, workshop: Any, tmp_path: Path
) -> None:
    """Though only one of them was asked to: the other would wait for it in the next all-reduce."""
    words = [*long_run(workshop, tmp_path / "run"), "training.checkpoint.every_steps=0", "parallel.tp=2"]
    assert rank_pool.run(asked_at_a_look, 2, words, asked, 2, timeout_s=60.0) == [(None, 2)] * 2
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and read_manifest(newest).step == 2
    resume_for_two_steps(rank_pool, words, tmp_path / "run")


def torchrun(*words: str, ranks: int = 2) -> list[str]:
    """The words of a torchrun of the console script. On a port that torchrun finds free."""
    script = Path(sys.executable).with_name("farskip")
    if not script.exists():
        pytest.skip("the console script is not installed")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "--no-python", str(script), *words]


def torchrun_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_torchrun(workshop: Any, pretrained: Runs, tmp_path: Path) -> None:
    """The documented way, with a multirun, a trace and two ranks: nothing on stderr, and rank 1 says nothing."""
    words = workshop.distill(
        tmp_path / "${wiring.name}",
        pretrained("deepseek_v3") / "model",
        "training.num_steps=2",
        "profile.steps=[2]",
        "--multirun",
        "wiring.name=farskip,ladder",
        batch_size=1,
    )
    done = subprocess.run(torchrun(*words), cwd=tmp_path, env=torchrun_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        "== 1 of 2: wiring.name=farskip",
        "== 2 of 2: wiring.name=ladder",
    ]
    assert sum(line.startswith("original: ") for line in lines) == 2  # once per run, not per rank
    for name in ("farskip", "ladder"):
        assert farskip.wiring_of(farskip.load(tmp_path / name / "model")).name == name
        assert len(list((tmp_path / name / "traces").iterdir())) == 2


@pytest.mark.slow
def test_torchrun_with_a_capacity(workshop: Any, tmp_path: Path) -> None:
    more = ["parallel.capacity=2", "parallel.side_stream=merge_and_route", "training.num_steps=2"]
    words = workshop.pretrain(tmp_path / "run", "wiring.name=farskip", *more)
    done = subprocess.run(torchrun(*words), cwd=tmp_path, env=torchrun_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert done.stdout.count("side stream: merge_and_route has no effect on CPU, which has no streams") == 1
    assert "side          |" in (tmp_path / "run" / "schedule.txt").read_text()
    shares = [line["dispatch/dropped_share"] for line in lines if "dispatch/dropped_share" in line]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wiring", "cut"),
    [
        ("ladder", ["parallel.tp=2"]),
        ("farskip", ["parallel.tp=2"]),
        ("farskip", ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.chunks=2", "profile.steps=[4]"]),
    ],
    ids=str,
)
def test_torchrun_with_tensor_parallelism(
    wiring: str, cut: list[str], workshop: Any, farskip_command: Any, tmp_path: Path
) -> None:
    """Two ranks that share every tensor learn what one rank learns, and a run that was cut short goes on."""
    more = [f"wiring.name={wiring}", "training.num_steps=4", "training.checkpoint.every_steps=2"]
    words = workshop.pretrain(tmp_path / "two", *more, *cut)
    for steps in ("2", "4"):
        done = subprocess.run(
            torchrun(
                *words,
                f"training.num_steps={steps}",
                "run.resume=true",
                *(["profile.steps=[]"] if steps == "2" else []),
            ),
            cwd=tmp_path,
            env=torchrun_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert farskip_command(workshop.pretrain(tmp_path / "one", *more))[0] == 0
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert farskip.wiring_of(farskip.load(tmp_path / "two" / "model")).name == wiring
    if "profile.steps=[4]" in cut:
        traces = [str(path) for path in sorted((tmp_path / "two" / "traces").iterdir())]
        code, out, _ = farskip_command(["trace", *traces, "--schedule", str(tmp_path / "two" / "schedule.json")])
        plans = [line.split() for line in out.splitlines() if line.strip().startswith("planned schedule:")]
        assert code == 0 and plans and all(words[2] == words[4] for words in plans)
        assert "unplanned" not in out and "gather_attention" in out and "scatter_shared::backward" in out


@pytest.mark.slow
def test_torchrun_repairs_under_tensor_parallelism(workshop: Any, pretrained: Runs, tmp_path: Path) -> None:
    """Evaluation, generation and the report, too; the figures are those of one rank."""
    original = pretrained("deepseek_v3") / "model"
    for name, words in (("two", ["parallel.tp=2"]), ("one", [])):
        command = workshop.distill(tmp_path / name, original, "wiring.name=ladder", "training.num_steps=2", *words)
        started = torchrun(*command, ranks=2 if words else 1)
        done = subprocess.run(started, cwd=tmp_path, env=torchrun_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    tables = [
        [line for line in (tmp_path / name / "report.md").read_text().splitlines() if line.startswith("| re")]
        for name in ("two", "one")
    ]
    assert [len(table) for table in tables] == [2, 2]
    numbers = [[float(cell.split()[0]) for row in table for cell in row.split("|")[2:5]] for table in tables]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-2)


@pytest.mark.slow
def test_torchrun_a_nan(workshop: Any, tmp_path: Path) -> None:
    more = ["training.optimizer.learning_rate=1e30", "training.optimizer.max_grad_norm=null"]
    words = workshop.pretrain(tmp_path / "run", *more)
    done = subprocess.run(torchrun(*words), cwd=tmp_path, env=torchrun_environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert sum(line.startswith("farskip pretrain: step ") for line in done.stderr.splitlines()) == 1
    assert "exitcode  : 2 " in done.stderr


@pytest.mark.slow
def test_torchrun_sigterm_and_a_killed_rank(rank_pool: Any, workshop: Any, tmp_path: Path) -> None:
    for number, blow in (("term", signal.SIGTERM), ("kill", signal.SIGKILL)):
        folder = tmp_path / number
        words = long_run(workshop, folder)
        with subprocess.Popen(
            torchrun("pretrain", *words),
            env=torchrun_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            wait_until(lambda folder=folder: len(metrics(folder)) > 5)  # type: ignore[misc]
            if blow is signal.SIGTERM:
                process.send_signal(blow)
            else:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), blow)
            out, error = process.communicate(timeout=60)
        if blow is signal.SIGTERM:
            assert "shutdown requested after step " in out
        else:
            assert process.returncode != 0
            assert "SIGKILL" in error
        resume_for_two_steps(rank_pool, words, folder)


@pytest.mark.slow
def test_a_full_disk(workshop: Any, tmp_path: Path, require: Callable[..., str], farskip_command: Any) -> None:
    """One line, the checkpoint before it stays whole, and the run goes on once there is room."""
    require("root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        words = workshop.pretrain(disk / "run", "training.num_steps=40", "training.checkpoint.keep_last=99")
        code, _, error = farskip_command(words)
        assert code == 2
        assert error.count("\n") == 1
        assert "No space left" in error
        assert not [path for path in disk.rglob("*") if path.name.endswith((".tmp", ".part"))]
        newest = latest_checkpoint(disk / "run" / "checkpoints")
        assert newest is not None
        read_manifest(newest)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
