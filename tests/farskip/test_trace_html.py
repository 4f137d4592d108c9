"""The page: self-contained by inspection, and (slow) legible in a real browser on a phone and on a desk."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from farskip.testing_traces import ALL_REDUCE, GEMM, TraceBuilder, training_trace
from farskip.trace import TraceReport, inspect
from farskip.trace_html import render_html

BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
)


def page_of(tmp_path: Path, *, ranks: int = 2) -> tuple[TraceReport, str]:
    paths = [
        training_trace(rank=rank, steps=2, layers=3).write(tmp_path / f"a_rather_long_name_of_a_run.rank{rank}.json")
        for rank in range(ranks)
    ]
    report = inspect(paths)
    judgements = report.judge(["overlap >= 10%", "exposed <= 1us/step", "gather.overlap >= 1%"])
    return report, render_html(report.ranks, report.skew, report.against(report), judgements)


class Tags(HTMLParser):
    """Collects tags and attributes, and complains where tags do not nest."""

    VOID = frozenset({"meta", "link", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()


def test_the_page_nests_and_loads_nothing(tmp_path: Path) -> None:
    _, page = page_of(tmp_path)
    tags = Tags()
    tags.feed(page)
    assert tags.stack == []
    for tag, attributes in tags.found:
        assert tag not in ("img", "iframe", "object", "video", "audio")
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:,") == "data:,", f"{tag} loads {attributes[name]}"
    assert "url(" not in page and "@import" not in page and "http" not in page


def test_names_of_the_trace_cannot_become_markup(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("<script>alert('x')</script> & \"quoted\"", 0, 100)
    trace.kernel(GEMM, 10, 200, launch=5)
    trace.kernel(ALL_REDUCE, 100, 400, stream=20, launch=50)
    trace.kernel(GEMM, 401, 500, launch=60)
    report = inspect(trace.write(tmp_path / "rank0.json"))
    page = render_html(report.ranks, report.skew, None, [])
    assert report.ranks[0].stretches[0].waits_for is not None, "the name has to reach that column, too"
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    tags = Tags()
    tags.feed(page)
    assert tags.stack == []


def test_the_numbers_on_the_page_are_the_report_s(tmp_path: Path) -> None:
    report, page = page_of(tmp_path)
    for rank in report.ranks:
        assert f"{rank.exposed_ns / 1e6:.3f}" in page and f"{rank.overlap_percent:.2f} %" in page
    assert "does not hold" in page and "cannot be judged" in page and "Against the baseline" in page


def test_the_timeline_draws_exposed_time_to_scale(tmp_path: Path) -> None:
    report, page = page_of(tmp_path, ranks=1)
    drawn = re.findall(r'<rect class="exposed" x="([\d.]+)" y="\d+" width="([\d.]+)"', page)
    assert sum(float(width) for _, width in drawn) == pytest.approx(report.ranks[0].exposed_ns / 1e6, abs=1e-3)


def test_ranks_without_communication_have_a_page(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10)
    report = inspect(trace.write(tmp_path / "rank0.json"))
    page = render_html(report.ranks, report.skew, None, [])
    assert "<b>none</b>" in page and "no communication" in page


PROBE = """<!doctype html><body><iframe id="f" src="report.html" style="width:%dpx;height:900px;border:0"></iframe>
<script>
document.getElementById('f').addEventListener('load', function () {
  var d = this.contentDocument, w = this.contentWindow, root = d.documentElement, svg = d.querySelector('.time svg');
  var outside = [];
  d.querySelectorAll('h1,h2,h3,p,.tile,.card,button,summary,.scroll').forEach(function (e) {
    var b = e.getBoundingClientRect();
    if (b.width && (b.right > root.clientWidth + 1 || b.left < -1)) { outside.push(e.className || e.tagName); }
  });
  var small = [];
  d.querySelectorAll('body *').forEach(function (e) {
    if (e.childNodes.length === 1 && e.firstChild.nodeType === 3 && e.textContent.trim()
        && !/STYLE|SCRIPT|TITLE/.test(e.tagName)
        && parseFloat(w.getComputedStyle(e).fontSize) < 12) { small.push(e.className || e.tagName); }
  });
  var before = svg.getAttribute('viewBox');
  d.querySelector('button[data-do=in]').click();
  var zoomed = svg.getAttribute('viewBox');
  d.querySelector('button[data-do=all]').click();
  var whole = svg.getAttribute('viewBox');
  d.querySelector('tr.jump').click();
  var buttons = Array.from(d.querySelectorAll('button')).map(function (e) { return e.getBoundingClientRect().height; });
  document.title = 'done';
  var out = document.createElement('pre');
  out.id = 'out';
  out.textContent = JSON.stringify({ wide: root.scrollWidth, room: root.clientWidth, outside: outside, small: small,
    family: w.getComputedStyle(d.body).fontFamily, pad: d.querySelector('h1').getBoundingClientRect().left,
    before: before, zoomed: zoomed, whole: whole, jumped: svg.getAttribute('viewBox'),
    said: d.querySelector('.at').textContent, button: Math.min.apply(null, buttons),
    loaded: w.performance.getEntriesByType('resource').map(function (r) { return r.name; }) });
  document.body.appendChild(out);
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_the_page_in_a_real_browser(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine (Debian package chromium)")
    _, page = page_of(tmp_path)
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "probe.html").write_text(PROBE % width)
    command = [browser, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000"]
    command += ["--virtual-time-budget=8000", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    match = re.search(r'<pre id="out">(.*?)</pre>', finished.stdout, re.DOTALL)
    assert match is not None, finished.stdout[-2000:]
    seen = json.loads(match.group(1).replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["wide"] <= seen["room"], f"the page is {seen['wide']} wide in a window of {seen['room']}"
    assert seen["outside"] == [] and seen["small"] == []
    assert seen["loaded"] == []
    # A rule that the browser could not read would be skipped in silence, and the next one with it.
    assert "sans-serif" in seen["family"] and seen["pad"] >= 12
    assert seen["before"] == seen["whole"] != seen["zoomed"]
    assert seen["jumped"] not in (seen["whole"], seen["zoomed"]) and "exposed" in seen["said"]
    assert seen["button"] >= 40, "a button too low for a thumb"
