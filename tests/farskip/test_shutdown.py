"""The stop flag, the deadline of the last save, and one line for a peer that no longer answers."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from farskip.shutdown import ShutdownRequest, deadline, is_peer_error, peer_errors


def test_a_signal_sets_the_flag_and_uninstall_restores_the_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    request = ShutdownRequest()
    request.install()
    try:
        seen = [request.requested]
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(request.requested)
        assert seen == [False, True]
    finally:
        request.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_is_installed_unasked() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ShutdownRequest().request()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_body_in_time_is_left_alone() -> None:
    messages: list[str] = []
    with deadline(0.05, "too late", on_expiry=messages.append):
        pass
    time.sleep(0.1)
    assert messages == []


def test_a_late_body_is_told_from_outside() -> None:
    expired = threading.Event()
    with deadline(0.01, "too late", on_expiry=lambda message: expired.set()):
        assert expired.wait(5)


def test_by_default_a_late_body_ends_the_process_with_one_line() -> None:
    code = "from farskip.shutdown import deadline; import time\nwith deadline(0.01, 'rank 0: too late'): time.sleep(60)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (1, "rank 0: too late\n")


@pytest.mark.parametrize(
    ("text", "who"),
    [
        (
            "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:62189: "
            "Connection reset by peer. This is typically caused by a remote worker hanging.",
            "another rank",
        ),
        (
            "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
            "another",
        ),
        ("Rank 0 failed to pass monitoredBarrier in 2000 ms\nRank 1, 3 missing", "ranks 1, 3"),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)", "another rank"),
        ("NCCL error: remote process exited; rank 2 closed its socket", "rank 2"),
    ],
)
def test_a_dead_or_late_peer_is_one_line(text: str, who: str) -> None:
    with (
        pytest.raises(RuntimeError, match=rf"^rank 0: no answer from {who}.* after step 7: ") as caught,
        peer_errors(0, lambda: "after step 7"),
    ):
        raise RuntimeError(text)
    assert "\n" not in str(caught.value)
    assert ".cc:" not in str(caught.value)
    assert str(caught.value.__cause__) == text


def test_torchs_own_kind_of_error_is_a_peers_whatever_it_says() -> None:
    assert is_peer_error(torch.distributed.DistBackendError("something new"))


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("NCCL"), OSError()]
)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, peer_errors(0, lambda: ""):
        raise error
    assert caught.value is error
