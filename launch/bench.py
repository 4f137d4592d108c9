"""`farskip bench`: the benchmarks, each a command of its own."""

from farskip.launch.main import Command, dispatch

COMMANDS: tuple[Command, ...] = (
    Command(
        name="overlap",
        module="farskip.launch.bench_overlap",
        help="blocking, overlapped and chunked expert parallelism over links that cost real time",
    ),
    Command(
        name="kernels",
        module="farskip.launch.bench_kernels",
        help="every kernel on a GPU, against what the hardware allows and against plain torch",
    ),
)


def main(argv: list[str]) -> int:
    """Entry of the command."""
    return dispatch("farskip bench", COMMANDS, argv)
