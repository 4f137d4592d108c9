"""The command: exit codes, outputs, one line for bad input, inputs never written to."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from farskip.launch.trace import main, parser
from farskip.testing_traces import GEMM, TraceBuilder, training_trace


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(training_trace(steps=2, layers=2).write(tmp_path / "rank0.json"))


def test_options_are_frozen() -> None:
    """A new option is a decision: it is added here, in docs/trace.md and in the changelog."""
    options = {option for action in parser()._actions for option in action.option_strings}
    assert options == {
        "-h",
        "--help",
        "--against",
        "--assert",
        "--communication",
        "--csv",
        "--details",
        "--device",
        "--html",
        "--include-last-step",
        "--json",
        "--junit",
        "--mode",
        "--perfetto",
        "--quiet",
        "--schedule",
        "--show-names",
        "--stretches",
    }


def test_a_report(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace]) == 0
    out = capsys.readouterr().out
    assert "overlap" in out and "why exposed" in out and "dispatch" in out


def test_all_outputs_at_once(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(trace).read_bytes()
    names = {"json": "r.json", "details": "d.json", "csv": "r.csv", "html": "r.html", "perfetto": "p.json.gz"}
    arguments = [word for key, name in names.items() for word in (f"--{key}", str(tmp_path / name))]
    assert main([trace, "--quiet", "--against", trace, "--junit", str(tmp_path / "j.xml"),
                 "--assert", "overlap >= 1%", *arguments]) == 0  # fmt: skip
    assert capsys.readouterr().out.startswith("assert overlap >= 1%: holds: ")
    assert set(json.loads((tmp_path / "r.json").read_text())) == {"event_set", "ranks"}
    assert json.loads((tmp_path / "d.json").read_text())["comparison"]["per"] == "step"
    assert (tmp_path / "r.csv").read_text().startswith("rank,group,name")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "p.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert ElementTree.parse(tmp_path / "j.xml").getroot().tag == "testsuites"
    assert Path(trace).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"rank0.json", "j.xml", *names.values()}


def test_json_on_standard_output(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace, "--json", "-", "--assert", "overlap >= 1%"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ranks"][0]["rank"] == 0
    assert captured.err.startswith("assert ")


def test_several_ranks_write_one_perfetto_file_each(tmp_path: Path) -> None:
    paths = [str(training_trace(rank=r, steps=1, layers=1).write(tmp_path / f"r{r}.json")) for r in range(2)]
    assert main([*paths, "--quiet", "--perfetto", str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.rank0.json").exists() and (tmp_path / "out.rank1.json").exists()


@pytest.mark.parametrize(
    ("conditions", "code"),
    [
        (["overlap >= 1%"], 0),
        (["overlap >= 100%"], 1),
        (["gather.overlap >= 1%"], 2),
        (["overlap >= 1%", "overlap >= 100%", "gather.overlap >= 1%"], 1),
    ],
)
def test_the_gate(trace: str, conditions: list[str], code: int) -> None:
    assert main([trace, "--quiet", *(word for text in conditions for word in ("--assert", text))]) == code


def bad(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("farskip trace: ") and says in captured.err


def test_bad_input_is_one_line(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated = tmp_path / "cut.json"
    truncated.write_bytes(Path(trace).read_bytes()[:-300])
    other = str(training_trace(rank=1, steps=1, layers=1).write(tmp_path / "other.json"))
    bad([str(tmp_path / "absent.json")], "cannot be read", capsys)
    bad([str(truncated)], "truncated", capsys)
    bad([trace, "--assert", "overlap >= 85"], "add the unit", capsys)
    bad([trace, "--junit", str(tmp_path / "j.xml")], "needs at least one --assert", capsys)
    bad([trace, "--communication", "("], "no regular expression", capsys)
    bad([trace, "--against", other], "not comparable", capsys)
    bad([trace, "--include-last-step"], "belongs to --mode hta", capsys)
    bad([trace, "--device", "5"], "no rows of device 5", capsys)
    bad([trace, "--stretches", "-4"], "--stretches -4 is too small; use at least 0", capsys)
    bad([trace, "--quiet", "--json", str(tmp_path / "absent" / "r.json")], "does not exist; create it first", capsys)


def test_traces_are_never_overwritten(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(trace).read_bytes()
    for option in ("--json", "--html", "--perfetto", "--csv", "--details"):
        bad([trace, option, trace], "never written to", capsys)
    assert Path(trace).read_bytes() == before


def test_a_failed_write_leaves_nothing_behind(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("farskip.launch.trace.write_perfetto", fail)
    bad([trace, "--quiet", "--perfetto", str(tmp_path / "p.json")], "No space left", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.json"]


def test_the_hta_mode_and_names(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace, "--mode", "hta", "--include-last-step"]) == 0
    assert "rules of HolisticTraceAnalysis" in capsys.readouterr().out
    assert main([trace, "--show-names"]) == 0
    assert "communication: all_to_all" in capsys.readouterr().out


def test_no_communication_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = TraceBuilder()
    builder.kernel(GEMM, 0, 10)
    path = str(builder.write(tmp_path / "rank0.json"))
    assert main([path]) == 0
    out = capsys.readouterr().out
    assert "none" in out and "no communication" in out
    assert main([path, "--quiet", "--assert", "overlap >= 1%"]) == 2
