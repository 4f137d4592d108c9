"""`farskip simulate`: its figures are those of the simulator, all that goes in is printed, bad input is one line."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farskip.launch.simulate import parser
from farskip.launch.simulate_inputs import merged
from farskip.launch.simulate_report import Swept, middle_of
from farskip.schedule import Schedule
from farskip.simulator import StageTimes
from farskip.what_if import Comparison, Outcome
from farskip.wiring import DENSE, MOE

Call = Callable[[list[str]], tuple[int, str, str]]

MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
MACHINE = ["--tflops", "400", "--membw", "4TB/s", "--link", "50GB/s,20us"]
MOE_TIMES = {
    **dict.fromkeys(("attention_in", "attention_core", "experts", "shared"), 2.0),
    **dict.fromkeys(("route", "merge"), 0.5),
    **dict.fromkeys(("dispatch", "combine"), 3.0),
}
HAND = ["--num-layers", "4", "--experts", "8", "--shared", "--ep", "2"]
BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "overlap_real_500mbit.json"


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


@pytest.fixture
def times(tmp_path: Path) -> str:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"forward": MOE_TIMES}))
    return str(path)


def figures(call: Call, words: list[str]) -> dict[str, Any]:
    code, out, err = call(["simulate", *words, "--json", "-"])
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_answer_names_the_model(model: str, farskip_command: Call) -> None:
    assert figures(farskip_command, ["--model", model, *MACHINE])["model"]["name"] == "DeepseekV2ForCausalLM"
    given = figures(farskip_command, [*HAND, *(word for stage in MOE_TIMES for word in ("--time", f"{stage}=1ms"))])
    assert given["model"]["name"] == "a model of flags"


def test_options_are_frozen() -> None:
    """A new option is a decision: it is added here, in docs/simulate.md and in the changelog."""
    options = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    assert options == {
        "--help", "--model", "--num-layers", "--dense-first", "--experts", "--shared", "--hidden", "--top-k",
        "--wirings", "--layers", "--show", "--ep", "--tp", "--sequence-parallel", "--chunks", "--tokens", "--sequence",
        "--number-bytes", "--times", "--variant", "--time", "--tflops", "--membw", "--link", "--tp-link",
        "--contention", "--sweep", "--json", "--png",
    }  # fmt: skip


def test_without_torch_and_quickly(model: str) -> None:
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "hydra", "matplotlib"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Block())
from farskip.launch.main import main
sys.exit(main(sys.argv[1:]))
"""
    words = [sys.executable, "-P", "-c", program, "simulate", "--model", model, "--ep", "8", *MACHINE]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("SIMULATED")
    assert time.perf_counter() - started < 10


def test_a_model_and_rates(model: str, farskip_command: Call) -> None:
    code, out, err = farskip_command(["simulate", "--model", model, "--ep", "8", *MACHINE])
    assert (code, err) == (0, "")
    assert "6 layers (1 of attention + mlp, 5 of attention + shared + routed), hidden 2048, 64 experts, 6 per" in out
    assert "400 TFLOP/s, memory 4000 GB/s" in out
    assert "ep: 50 GB/s, 20 us" in out
    assert "tp:" not in out
    rows = {line.split()[0]: line.split() for line in out.split("from\n")[1].splitlines()[:9]}
    # 4096 tokens * 6 experts * 2048 * 2 bytes * 7/8, and 20 us
    assert rows["dispatch"][1:4] == ["88.08", f"{88.080384 / 50 + 0.02:.3f}", f"{88.080384 / 50 + 0.02:.3f}"]
    assert rows["mlp"][1] == f"{2 * 4096 * 3 * 2048 * 10944 / 1e9:.1f}"
    assert "farskip, overlapped, backward; layers 2 and 3, simulated ms, sums of all layers:" in out
    assert "ordinary, blocking" in out
    assert "hides under" in out


def test_figures_are_the_simulators(times: str, farskip_command: Call) -> None:
    """Closed form of farskip with these times: each dispatch hides 2 of 3 ms but the first, which has all of attention;
    each combine hides all of 3 under the shared expert and the next projections, but the last, which hides 2."""
    found = figures(farskip_command, [*HAND, "--times", times])
    assert found["simulated"] is True
    compute = 4 * 9.0
    assert found["no_communication"]["forward_ms"] == compute
    assert found["ordinary_blocking"]["forward_ms"] == compute + 4 * 6
    overlapped = found["wirings"]["farskip"]["overlapped"]
    assert overlapped["forward_ms"] == compute + 3 * 1 + 1
    assert overlapped["forward_speedup"] == pytest.approx((compute + 24) / (compute + 4))
    assert found["wirings"]["farskip"]["serial"]["speedup"] == 1.0
    # backward has twice the compute and hides everything but the first combine... which has the shared expert's 4 ms
    assert overlapped["forward_backward_ms"] == compute + 4 + 2 * compute


def test_contention_and_show(times: str, farskip_command: Call) -> None:
    free = figures(farskip_command, [*HAND, "--times", times])["wirings"]["farskip"]["overlapped"]
    slowed = figures(farskip_command, [*HAND, "--times", times, "--contention", "0.3"])["wirings"]["farskip"][
        "overlapped"
    ]
    assert slowed["exposed_ms"] == free["exposed_ms"]
    hidden = free["communication_ms"] - free["exposed_ms"]
    assert slowed["forward_backward_ms"] == pytest.approx(free["forward_backward_ms"] + 0.3 * hidden)
    _, out, _ = farskip_command(["simulate", *HAND, "--times", times, "--contention", "0.3", "--show", "ordinary"])
    assert "both lanes take 1.3 times as long while both are busy" in out
    assert "ordinary, overlapped, forward; layers 1 and 2" in out


def test_where_times_come_from(model: str, times: str, farskip_command: Call) -> None:
    words = ["simulate", "--model", model, "--ep", "8", *MACHINE, "--times", times, "--time", "shared=7ms"]
    out = farskip_command([*words, "--time", "experts.backward=900us", "--time", "combine=1ms"])[1]
    rows = {line.split()[0]: " ".join(line.split()) for line in out.split("from\n")[1].splitlines()[:9]}
    assert rows["shared"].endswith("7.000 14.000 given")
    assert rows["experts"].endswith("2.000 0.900 given")
    assert rows["attention_in"].endswith("measured")
    assert rows["dispatch"].endswith("1.782 1.782 bytes over the link")  # not the file's 3 ms
    assert rows["combine"].endswith("1.000 1.000 given")
    assert rows["mlp"].endswith("shapes at the stated rates")
    remark = "measured times are of the tokens and ranks that they were measured with"
    assert remark in out and remark not in farskip_command(["simulate", "--model", model, "--ep", "8", *MACHINE])[1]


def test_merged_times() -> None:
    lower = StageTimes(forward={"mlp": 1.0, "shared": 1.0}, backward={"mlp": 9.0, "shared": 9.0})
    upper = StageTimes(forward={"mlp": 5.0}, backward={"merge": 3.0})
    both = merged(lower, upper)
    assert both.forward == {"mlp": 5.0, "shared": 1.0}
    assert both.backward == {"shared": 9.0, "merge": 3.0}


def test_a_variant_of_a_bench_result(farskip_command: Call) -> None:
    stored = json.loads(BENCH.read_text())
    found = figures(farskip_command, [*HAND, "--times", str(BENCH), "--variant", "farskip_overlapped"])
    assert found["stage_ms"] == stored["machine"]["stage_ms"]["farskip_overlapped"]


def test_tensor_parallelism_in_shares(tmp_path: Path, farskip_command: Call) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
              "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--model", str(tmp_path), "--tp", "4", "--wirings", "parallel,ladder", *MACHINE]
    whole = figures(farskip_command, words)
    shares = figures(farskip_command, [*words, "--sequence-parallel", "--chunks", "2"])
    assert whole["ordinary_blocking"] == shares["ordinary_blocking"]  # both against the same all-reduces
    assert "gather_mlp" in shares["stage_ms"]["forward"]
    assert whole["wirings"]["parallel"]["serial"]["speedup"] > 1
    ladder = shares["wirings"]["ladder"]
    assert ladder["overlapped"]["speedup"] > 1 > ladder["serial"]["speedup"]  # twice the latencies, if nothing hides
    slower = figures(farskip_command, [*words, "--tp-link", "10GB/s"])
    assert slower["ordinary_blocking"]["forward_ms"] > whole["ordinary_blocking"]["forward_ms"]


def test_times_in_shares_have_blocking_in_shares(tmp_path: Path, farskip_command: Call) -> None:
    """They say nothing of all-reduces."""
    blocks = ("attention", "mlp")
    stages = [f"{kind}_{block}" for kind in ("gather", "scatter") for block in blocks]
    stages += [f"{block}_norm" for block in blocks] + ["attention_in", "attention_core", "mlp"]
    path = tmp_path / "stage_times.json"
    path.write_text(json.dumps({"forward": dict.fromkeys(stages, 1.0)}))
    words = ["--num-layers", "3", "--tp", "2", "--sequence-parallel", "--wirings", "ladder"]
    assert figures(farskip_command, [*words, "--times", str(tmp_path)])["ordinary_blocking"]["forward_ms"] == 3 * 9


def test_a_sweep_says_from_where_on_everything_hides(model: str, tmp_path: Path, farskip_command: Call) -> None:
    picture, document = tmp_path / "sweep.png", tmp_path / "sweep.json"
    words = ["simulate", "--model", model, "--ep", "8", *MACHINE, "--sweep", "10GB/s:4000GB/s"]
    code, out, err = farskip_command([*words, "--png", str(picture), "--json", str(document)])
    assert (code, err) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    sweep = json.loads(document.read_text())["sweep"]
    found = sweep["hides_from_gb_s"]["farskip"]
    assert f"farskip: less than 1 % of the step exposed from {found:.4g} GB/s on" in out
    shares = {}
    for point in sweep["points"]:
        of_one = point["wirings"]["farskip"]["overlapped"]
        shares[point["gb_s"]] = of_one["exposed_ms"] / of_one["forward_backward_ms"]
    assert len(shares) == 13
    assert all((share <= 0.01) is (gb_s >= found) for gb_s, share in shares.items())
    assert 10 < found < 4000


def test_a_sweep_in_which_nothing_hides(model: str, farskip_command: Call) -> None:
    words = ["simulate", "--model", model, "--ep", "8", *MACHINE, "--sweep", "1GB/s:2GB/s"]
    assert "farskip: at no bandwidth tried less than 1 % of the step exposed" in farskip_command(words)[1]


def test_hidden_from_a_bandwidth_on_means_at_all_higher_ones() -> None:
    def compared(exposed: float) -> Comparison:
        outcome = Outcome(
            wiring="farskip", mode="overlapped", schedule=Schedule(mode="serial", segments=(), forward=(), backward=()),
            forward=40.0, total=100.0, communication=50.0, exposed=exposed,
        )  # fmt: skip
        return Comparison(blocking=outcome, forward_bound=1.0, bound=1.0, outcomes=(outcome,))

    def hides_from(*exposed: float) -> float | None:
        points = tuple((10.0 * (place + 1), compared(one)) for place, one in enumerate(exposed))
        return Swept(points=points, hidden_below=0.01).hides_from("farskip")

    assert hides_from(5.0, 0.5, 2.0, 1.0, 0.0) == 40.0
    assert hides_from(0.0, 0.0) == 10.0
    assert hides_from(0.0, 2.0) is None


def test_the_middle_of_a_model() -> None:
    assert middle_of([MOE] * 8) == range(3, 5)
    assert middle_of([DENSE, *[MOE] * 3]) == range(1, 3)
    assert middle_of([MOE]) == range(0, 1)
    assert middle_of([DENSE, MOE] * 2) == range(1, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --model FOLDER or --num-layers N"),
        (
            ["--num-layers", "2", "--layers", "0,2"],
            "layers '0,2': layer 2 is outside 0..1",
        ),
        (["--num-layers", "2", "--layers", "[]"], "layers '[]' names no layer"),
        (["--model", "nowhere"], "nowhere: no config.json there"),
        (["--model", "MODEL", "--num-layers", "3"], "give either --model FOLDER or --num-layers N"),
        (["--model", "MODEL", "--hidden", "3"], "--hidden goes with --num-layers"),
        (["--num-layers", "0"], "--dense-first 0 of --num-layers 0 makes no model"),
        (["--num-layers", "2", "--dense-first", "3"], "--dense-first 3 of --num-layers 2 makes no model"),
        (["--num-layers", "2", "--hidden", "-64"], "--hidden -64 is too small; use at least 1, or leave it out"),
        (["--num-layers", "2", "--experts", "-8"], "--experts -8 is too small; use at least 1, or leave it out"),
        (["--num-layers", "2", "--experts", "8", "--top-k", "-2"], "--top-k -2 is too small; use at least 1"),
        (["--num-layers", "2", "--experts", "8", "--top-k", "9"], "--top-k 9 is more than there are: --experts 8"),
        (["--model", "MODEL", "--ep", "2", "--chunks", "8", "--tokens", "4"], "--chunks 8 of --tokens 4 would have no"),
        (["--model", "MODEL", "--ep", "7"], "expert parallelism of 7 does not divide 64 experts: choose a divisor"),
        (["--model", "MODEL", "--ep", "0"], "--ep 0 is too small; use at least 1"),
        (["--model", "MODEL", "--ep", "-1"], "--ep -1 is too small; use at least 1"),
        (["--model", "MODEL", "--tp", "0"], "--tp 0 is too small; use at least 1"),
        (["--model", "MODEL", "--ep", "2", "--chunks", "0"], "--chunks 0 is too small; use at least 1"),
        (["--model", "MODEL", "--ep", "2", "--tp", "4"], "ep=2 is not a multiple of tp=4"),
        (["--num-layers", "2", "--ep", "2"], "--ep 2: the model has no experts to spread; leave it out"),
        (
            ["--model", "MODEL", "--sequence-parallel"],
            "--sequence-parallel has no ranks to share tokens among; add --tp 2",
        ),
        (["--model", "MODEL", "--chunks", "2"], "--chunks 2: nothing travels in chunks without --ep"),
        (["--model", "MODEL", "--tokens", "0"], "--tokens 0 is too small; use at least 1"),
        (["--model", "MODEL", "--sequence", "9999"], "--sequence 9999 is outside 1..4096, the tokens of a step"),
        (["--model", "MODEL", "--contention", "nan"], "--contention nan makes no sense; use 0 or more"),
        (["--model", "MODEL", "--contention", "-1"], "--contention -1.0 makes no sense; use 0 or more"),
        (["--model", "MODEL", "--tflops", "400"], "--tflops and --membw go together"),
        (["--model", "MODEL", "--tflops", "0", "--membw", "1TB/s"], "--tflops 0.0 has to be above 0"),
        (["--model", "MODEL", "--tflops", "nan", "--membw", "1TB/s"], "--tflops nan has to be above 0"),
        (["--num-layers", "2", "--tflops", "1", "--membw", "1TB/s"], "--tflops and --membw need the sizes of a model"),
        (["--model", "MODEL", "--link", "0GB/s"], "--link 0GB/s: the bandwidth '0GB/s' has to be above 0"),
        (["--model", "MODEL", "--link", "fast"], "--link fast: the bandwidth 'fast' is not understood; use 50GB/s"),
        (["--model", "MODEL", "--link", "5GB/s,10"], "--link 5GB/s,10: the latency '10' is not understood"),
        (["--model", "MODEL", "--link", "5GB/s,nanus"], "--link 5GB/s,nanus: 'nan' is no number of 0 or more"),
        ([*HAND, "--link", "5GB/s"], "--link needs the bytes of a collective: give --model, or --hidden and --top-k"),
        (["--model", "MODEL", "--time", "mlp"], "--time mlp is not understood; use STAGE=1.2ms"),
        (["--model", "MODEL", "--time", "mlp=3"], "--time mlp=3 is not understood; use STAGE=1.2ms"),
        (["--model", "MODEL", "--time", "mlp.sideward=3ms"], "--time mlp.sideward=3ms is not understood"),
        (["--model", "MODEL", "--time", "mlp=nanms"], "--time mlp=nanms: 'nan' is no number of 0 or more"),
        (["--model", "MODEL", "--time", "mlp=-1ms"], "--time mlp=-1ms: '-1' is no number of 0 or more"),
        (["--model", "MODEL", "--time", "expert=1ms"], "there is no stage 'expert'; did you mean 'experts'?"),
        (
            ["--model", "MODEL", "--times", "nowhere"],
            "--times nowhere: there is no such file; a run writes",
        ),
        (["--model", "MODEL", "--variant", "x"], "--variant x goes with --times FILE"),
        (
            ["--model", "MODEL", "--times", str(BENCH)],
            "holds those of several; add --variant, one of ordinary_",
        ),
        (["--model", "MODEL", "--ep", "8"], "no time for attention_in, attention_core, mlp, route, dispatch, experts,"),
        (["--model", "MODEL", "--ep", "8"], "give --tflops and --membw and --link, or a file of --times that has them"),
        (["--model", "MODEL", "--ep", "8", *MACHINE[:4]], "no time for dispatch, combine of ordinary; give --link, or"),
        (
            ["--num-layers", "2", "--tp", "2", "--wirings", "parallel"]
            + [f"--time={stage}=1ms" for stage in ("attention_in", "attention_core", "mlp", "reduce_mlp")],
            "no time for reduce_attention of ordinary; give --link with --hidden and --top-k, or a file",
        ),
        ([*HAND, "--times", "TIMES", "--wirings", "farskp"], "wiring 'farskp' is unknown; did you mean 'farskip'?"),
        ([*HAND, "--times", "TIMES", "--wirings", ","], "--wirings ',' names none; use ordinary,farskip"),
        ([*HAND, "--times", "TIMES", "--layers", "9:12"], "layers '9:12': use START:STOP"),
        ([*HAND, "--times", "TIMES", "--show", "ladder"], "--show ladder is not among --wirings ordinary,farskip"),
        ([*HAND, "--times", "TIMES", "--variant", "x"], "--variant x: TIMES is no result of farskip bench overlap"),
        ([*HAND, "--times", "TIMES", "--sweep", "1GB/s:2GB/s"], "varies --link, which is not given"),
        ([*HAND, "--times", "TIMES", "--png", "x.png"], "--png draws a sweep; add --sweep"),
        (["--model", "MODEL", *MACHINE, "--sweep", "1GB/s:2GB/s"], "varies --link, over which nothing travels here"),
        (["--model", "MODEL", "--ep", "8", *MACHINE, "--sweep", "9GB/s:2GB/s"], "--sweep 9GB/s:2GB/s does not ascend"),
        (["--model", "MODEL", "--ep", "8", *MACHINE, "--sweep", "9GB/s"], "--sweep 9GB/s is not understood"),
        (
            ["--model", "MODEL", "--ep", "8", *MACHINE, "--sweep", "1GB/s:2GB/s", "--time", "combine=1ms"],
            "has nothing to vary: --time fixes combine; leave it out",
        ),
        ([*HAND, "--times", "TIMES", "--json", "nowhere/x.json"], "the folder nowhere does not exist; create it first"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    words: list[str], message: str, model: str, times: str, farskip_command: Call, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [{"MODEL": model, "TIMES": times}.get(word, word) for word in words]
    code, _, err = farskip_command(["simulate", *given])
    assert code == 2
    assert err.startswith("farskip simulate: ")
    assert err.count("\n") == 1
    assert message.replace("TIMES", times) in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON ("),
        ("[]", "list instead of an object"),
        ('{"backward": {}}', "it has to hold forward, and may hold backward"),
        ('{"forward": {"mlp": 1}, "sideward": {}}', "it has to hold forward, and may hold backward"),
        ('{"forward": [1]}', "forward is no object of stage: milliseconds"),
        ('{"forward": {"mlp": NaN}}', "forward.mlp=nan is no time; use milliseconds, 0 or more"),
        ('{"forward": {"mlp": Infinity}}', "forward.mlp=inf is no time"),
        ('{"forward": {"mlp": -1}}', "forward.mlp=-1 is no time"),
        ('{"forward": {"mlp": "1"}}', "forward.mlp='1' is no time"),
        ('{"machine": {"stage_ms": {"one": null}}}', "one is NoneType instead of an object"),
        ('{"forward": {"mpl": 1}}', "there is no stage 'mpl'; did you mean 'mlp'?"),
    ],
)
def test_a_file_that_holds_no_times(content: str, message: str, tmp_path: Path, farskip_command: Call) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    variant = ["--variant", "one"] if '"one"' in content else []
    code, _, err = farskip_command(["simulate", *HAND, "--times", str(path), *variant])
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_config_whose_model_type_lies(model: str, farskip_command: Call) -> None:
    (Path(model) / "config.json").write_text(json.dumps({**MODEL, "model_type": "deepseek_v3"}))
    code, _, err = farskip_command(["simulate", "--model", model, "--ep", "8", *MACHINE])
    assert (code, err.count("\n")) == (2, 1)
    assert "goes with model_type 'deepseek_v2', but config.json says 'deepseek_v3'; correct whichever is wrong" in err


def test_an_unknown_flag(farskip_command: Call, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        farskip_command(["simulate", "--bandwith", "5"])
    assert "unrecognized arguments: --bandwith 5" in capsys.readouterr().err


def test_what_all_is_compared_with_is_said_where_it_is_not_the_usual(tmp_path: Path, farskip_command: Call) -> None:
    stages = ["attention_norm", "attention_in", "attention_core", "mlp_norm", "mlp"]
    stages += ["gather_attention", "scatter_attention", "gather_mlp", "scatter_mlp"]
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"forward": dict.fromkeys(stages, 1.0)}))
    words = ["simulate", "--num-layers", "2", "--tp", "2", "--sequence-parallel", "--times", str(path)]
    code, out, _ = farskip_command(words)
    assert code == 0
    assert "\nbaseline    in the same chunks and shares of tokens: no time for reduce_attention, reduce_mlp" in out
    code, out, _ = farskip_command([*words, "--hidden", "64", "--link", "1GB/s"])
    assert code == 0 and "\nbaseline" not in out
