"""What defeats overlap is said, and nothing else is."""

import pytest

from farskip.launch.device_queues import overlap_warnings, prefer_collectives


@pytest.mark.parametrize("name", ["CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT"])
def test_a_setting_that_defeats_overlap_is_named(name: str) -> None:
    [line] = overlap_warnings({name: "1", "PATH": "1"})
    assert line.startswith(f"{name}=1 defeats overlap: ")
    assert "unset it" in line


@pytest.mark.parametrize(
    "environment",
    [{}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, {"CUDA_LAUNCH_BLOCKING": "0"}, {"TORCH_NCCL_BLOCKING_WAIT": ""}],
    ids=str,
)
def test_others_are_not(environment: dict[str, str]) -> None:
    assert overlap_warnings(environment) == []


def test_collectives_come_first_unless_the_user_says_otherwise() -> None:
    environment: dict[str, str] = {}
    prefer_collectives(environment)
    assert environment == {"TORCH_NCCL_HIGH_PRIORITY": "1"}
    environment = {"TORCH_NCCL_HIGH_PRIORITY": "0"}
    prefer_collectives(environment)
    assert environment == {"TORCH_NCCL_HIGH_PRIORITY": "0"}
