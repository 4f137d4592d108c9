"""`Pending`: waits once, keeps alive until then, lets go afterwards."""

import time
import weakref

import torch

from farskip.pending import Pending
from farskip.wait_meter import WaitMeter


class Work:
    def __init__(self, output: torch.Tensor, seconds: float = 0.0) -> None:
        self.waits = 0
        self.output = output
        self.seconds = seconds

    def wait(self) -> None:
        self.waits += 1
        time.sleep(self.seconds)
        self.output.fill_(1.0)


def test_the_result_is_there_after_wait_and_not_before() -> None:
    output = torch.full((3,), float("nan"))
    pending = Pending(output, Work(output))
    assert pending.unfilled.isnan().all()
    assert torch.equal(pending.wait(), torch.ones(3))


def test_only_the_first_wait_waits() -> None:
    output = torch.zeros(3)
    work = Work(output)
    pending = Pending(output, work)
    assert pending.wait() is pending.wait() is output
    assert work.waits == 1


def test_the_time_stood_still_is_reported() -> None:
    meter, output = WaitMeter(), torch.zeros(3)
    pending = Pending(output, Work(output, seconds=0.02), meter=meter)
    assert meter.seconds() == 0
    pending.wait()
    stood_still = meter.seconds()
    assert stood_still >= 0.02
    pending.wait()
    assert meter.seconds() == stood_still, "only the first wait waits"


def test_what_is_sent_lives_until_it_is_waited_for_and_no_longer() -> None:
    output, sent = torch.zeros(3), torch.ones(3)
    alive = weakref.ref(sent)
    pending = Pending(output, Work(output), keep=(sent,))
    del sent
    assert alive() is not None
    pending.wait()
    assert alive() is None


def test_a_result_that_is_there_needs_no_wait() -> None:
    output = torch.ones(3)
    assert Pending(output, None).wait() is output
