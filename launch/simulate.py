"""`farskip simulate`: what a wiring and a schedule would gain, before a run. No GPU, no torch, no measurement.

Exit codes: 0 done, 2 bad input.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from farskip.launch.simulate_inputs import sweep_of
from farskip.launch.simulate_question import Question, ask, missing_times, what_is_missing
from farskip.launch.simulate_report import Swept, draw, header, pictured, swept_table, table, times_table, to_json
from farskip.launch.trace import write_atomically, write_bytes
from farskip.launch.writable import check_file
from farskip.stage_costs import EP, TP
from farskip.stage_graph import COLLECTIVES

SWEEP_POINTS = 13
HIDDEN_BELOW = 0.01
"""Exposed communication of less than this share of a step counts as all of it hidden."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="farskip simulate",
        description="What wirings and schedules would gain. Every figure is simulated; all that goes in is printed.",
        epilog="A stage's time is, in this order: --time, --link with sizes, --times, --tflops and --membw with sizes.",
    )
    model = command.add_argument_group("the model").add_argument
    model("--model", type=Path, metavar="FOLDER", help="of a checkpoint; only its config.json is read")
    model("--num-layers", type=int, metavar="N", help="instead of --model: decoder layers")
    model("--dense-first", type=int, metavar="K", help="the first K layers are dense (default: 0)")
    model("--experts", type=int, metavar="E", help="routed experts of the other layers (default: none)")
    model("--shared", action="store_true", help="those have a shared expert, too")
    model("--hidden", type=int, metavar="D", help="width of the residual stream, for the bytes of collectives")
    model("--top-k", type=int, metavar="K", help="experts per token, for the bytes of collectives")
    wiring = command.add_argument_group("the wirings").add_argument
    wiring("--wirings", default="ordinary,farskip", metavar="NAMES", help="default: ordinary,farskip")
    wiring("--layers", default="all", metavar="LAYERS", help="that get them: all (default), last:3, 2:5, 3 or 0,4,5")
    wiring("--show", metavar="WIRING", help="whose timeline and windows to print (default: the last of --wirings)")
    ranks = command.add_argument_group("the ranks").add_argument
    ranks("--ep", type=int, default=1, metavar="N", help="ranks that share the experts (default: 1)")
    ranks("--tp", type=int, default=1, metavar="N", help="ranks that share attention, MLPs, shared experts")
    ranks("--sequence-parallel", action="store_true", help="with --tp: they share the stream, too")
    ranks("--chunks", type=int, default=1, metavar="N", help="parts into which tokens are cut on their way")
    ranks("--tokens", type=int, default=4096, metavar="N", help="of one step of one data-parallel rank (default: 4096)")
    ranks("--sequence", type=int, metavar="N", help="tokens of one sequence (default: --tokens)")
    ranks("--number-bytes", type=int, default=2, metavar="N", help="of a number, computed with and sent (default: 2)")
    times = command.add_argument_group("how long things take").add_argument
    times("--times", type=Path, metavar="FILE", help="measured: a run folder, its stage_times.json, a bench result")
    times("--variant", metavar="NAME", help="of a bench result")
    times("--time", action="append", default=[], metavar="STAGE=TIME", help="attention_in=1.2ms, experts.backward=3ms")
    times("--tflops", type=float, metavar="X", help="10^12 operations per second that a stage achieves")
    times("--membw", metavar="RATE", help="memory bandwidth that a stage achieves: 3TB/s")
    times("--link", metavar="RATE", help="between the ranks: bandwidth and latency, 50GB/s,10us")
    times("--tp-link", metavar="RATE", help="the same within --tp (default: --link)")
    times("--contention", type=float, default=0.0, metavar="F", help="both lanes take 1+F as long while both are busy")
    out = command.add_argument_group("what comes out").add_argument
    out("--sweep", metavar="LOW:HIGH", help="bandwidths of --link to try: 5GB/s:100GB/s")
    out("--json", metavar="FILE", help="write the figures; - for standard output")
    out("--png", metavar="FILE", help="draw the sweep")
    return command


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: the words after ``farskip simulate``.

    Returns:
        The exit code.

    Raises:
        ValueError: bad input.
    """
    options = parser().parse_args(argv)
    for name in ("json", "png"):
        if getattr(options, name) not in (None, "", "-"):
            check_file(f"--{name} {getattr(options, name)}", getattr(options, name))
    question = ask(options)
    shown = options.show or question.wirings[-1]
    if shown not in question.wirings:
        raise ValueError(f"--show {shown} is not among --wirings {','.join(question.wirings)}; add it there")
    for wiring in dict.fromkeys(("ordinary", *question.wirings)):
        missing = missing_times(question.setting, wiring, question.times())
        if missing:
            raise ValueError(what_is_missing(missing, wiring, question))
    if options.png and not options.sweep:
        raise ValueError("--png draws a sweep; add --sweep 5GB/s:100GB/s")
    swept = _sweep(question, options.sweep) if options.sweep else None
    comparison = question.compare()
    document = to_json(question, comparison, swept)
    if options.json == "-":
        print(json.dumps(document, indent=1))
    else:
        print(header(question))
        print(times_table(question))
        print(table(comparison))
        print(pictured(question, comparison, shown))
        if swept is not None:
            print(swept_table(swept))
    if options.json and options.json != "-":
        write_bytes(options.json, (json.dumps(document, indent=1) + "\n").encode())
    if options.png:
        assert swept is not None
        write_atomically(options.png, partial(draw, question, swept))
    return 0


def _sweep(question: Question, text: str) -> Swept:
    low, high = sweep_of(text)
    if EP not in question.rates.links:
        raise ValueError(f"--sweep {text} varies --link, which is not given; add --link 50GB/s,10us")
    moved = [axis for axis in (EP, TP) if question.rates.links.get(axis) == question.rates.links[EP]]
    if not any({EP: question.layout.ep, TP: question.layout.tp}[axis] > 1 for axis in moved):
        raise ValueError(f"--sweep {text} varies --link, over which nothing travels here; add --ep or drop --tp-link")
    by_hand = set(question.given.forward) & set(COLLECTIVES)
    if by_hand:
        raise ValueError(f"--sweep {text} has nothing to vary: --time fixes {', '.join(sorted(by_hand))}; leave it out")
    points = []
    for step in range(SWEEP_POINTS):
        gb_s = low * (high / low) ** (step / (SWEEP_POINTS - 1))
        links = {axis: replace(question.rates.links[axis], gb_s=gb_s) for axis in moved}
        rates = replace(question.rates, links={**question.rates.links, **links})
        points.append((gb_s, question.compare(rates, modes=("overlapped",))))
    return Swept(points=tuple(points), hidden_below=HIDDEN_BELOW)
