"""Style and script of the page that ``farskip trace --html`` writes: text only, nothing is loaded from anywhere.

The colors are told apart by people who do not see red and green, in light and in dark, and every colored area also
has a lane or a label of its own.
"""

STYLE = """
:root { --paper:#fbfaf7; --card:#fff; --ink:#1d2129; --soft:#5b6472; --line:#e3e0d8; --compute:#3f6fb5;
  --hidden:#2a9d8f; --exposed:#d1495b; --copies:#b08900; --idle:#d9d6cd; --notify:#8d6cab; --chip:#f0ede5 }
@media (prefers-color-scheme: dark) {
  :root { --paper:#14171c; --card:#1c2027; --ink:#e8e6e1; --soft:#9aa3b0; --line:#2e343d; --compute:#6f9fe0;
    --hidden:#3fc1b0; --exposed:#f0717f; --copies:#d9b23c; --idle:#343a44; --notify:#b79ad2; --chip:#262b33 }
}
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100% }
body { margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",Arial,sans-serif }
main { max-width:1120px; margin:0 auto; padding:20px 16px 64px }
h1 { font-size:1.5rem; line-height:1.25; margin:8px 0 4px }
h2 { font-size:1.15rem; margin:36px 0 10px }
h3 { font-size:1rem; margin:22px 0 8px }
p { margin:6px 0 }
details { margin:10px 0 }
summary { cursor:pointer; min-height:32px }
.soft { color:var(--soft) }
.small { font-size:.875rem }
.path { overflow-wrap:anywhere }
.ok, .bad, .open { font-weight:650 }
.ok { color:var(--hidden) } .bad { color:var(--exposed) } .open { color:var(--copies) }
.card, .tile, .scroll { background:var(--card); border:1px solid var(--line); border-radius:12px }
.card { padding:16px; margin:12px 0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:16px 0 }
.tile { padding:12px 14px }
.tile b { display:block; font-size:1.65rem; line-height:1.2; font-weight:650; font-variant-numeric:tabular-nums }
.tile span { color:var(--soft); font-size:.875rem }
.bar { display:flex; height:22px; border-radius:6px; overflow:hidden; background:var(--idle) }
.bar i { display:block; height:100% }
.legend { display:flex; flex-wrap:wrap; gap:4px 16px; font-size:.875rem; margin-top:8px }
.legend span { white-space:nowrap }
.legend i { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:6px; vertical-align:-1px }
.scroll { overflow-x:auto; -webkit-overflow-scrolling:touch; border-radius:10px }
table { border-collapse:collapse; width:100%; font-size:.875rem; font-variant-numeric:tabular-nums }
th, td { padding:7px 12px; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap }
th { color:var(--soft); font-weight:600 }
tr:last-child td { border-bottom:0 }
th.l, td.l { text-align:left }
td.w { white-space:normal; min-width:15rem; overflow-wrap:anywhere }
td:first-child, th:first-child { position:sticky; left:0; background:var(--card); max-width:46vw; overflow:hidden;
  text-overflow:ellipsis }
tr.jump { cursor:pointer }
tr.jump:hover td, tr.jump:focus td { background:var(--chip) }
.meter { display:inline-block; width:64px; height:8px; border-radius:4px; background:var(--exposed); overflow:hidden;
  vertical-align:1px; margin-right:8px }
.meter i { display:block; height:100%; background:var(--hidden) }
.chip { display:inline-block; background:var(--chip); border-radius:999px; padding:1px 10px; font-size:.8125rem;
  margin:2px 4px 2px 0 }
.plot { position:relative }
.plot svg { display:block; width:100%; height:158px; touch-action:pan-y; cursor:grab }
.plot svg:active { cursor:grabbing }
.lane-name { position:absolute; left:0; font-size:.75rem; line-height:18px; color:var(--soft); pointer-events:none }
.ruler { display:flex; justify-content:space-between; font-size:.75rem; color:var(--soft); margin-top:4px;
  font-variant-numeric:tabular-nums }
.tools { display:flex; flex-wrap:wrap; gap:8px; align-items:center; margin:10px 0 0 }
.at { min-height:3em; margin-top:8px; font-size:.875rem; overflow-wrap:anywhere }
button { font:inherit; font-size:.875rem; min-width:44px; min-height:40px; padding:6px 12px; border-radius:8px;
  border:1px solid var(--line); background:var(--chip); color:var(--ink); cursor:pointer }
button:focus-visible, tr.jump:focus-visible, svg:focus-visible { outline:3px solid var(--compute); outline-offset:1px }
.compute { fill:var(--compute) } .comm, .hidden { fill:var(--hidden) } .exposed { fill:var(--exposed) }
.notify { fill:var(--notify) } .lane { fill:var(--chip) }
@media (max-width: 560px) {
  main { padding:12px 12px 48px }
  .card { padding:12px }
  .tile b { font-size:1.4rem }
  th, td { padding:7px 9px }
  .tiles { grid-template-columns:repeat(2,minmax(0,1fr)) }
}
@media print { .tools, .at { display:none } }
"""

SCRIPT = """
'use strict';
document.querySelectorAll('.time').forEach(function (box) {
  var svg = box.querySelector('svg'), full = parseFloat(svg.dataset.span), at = box.querySelector('.at');
  var left = 0, span = full, ends = box.querySelectorAll('.ruler span');
  function show() {
    span = Math.min(full, Math.max(full / 20000, span));
    left = Math.min(full - span, Math.max(0, left));
    svg.setAttribute('viewBox', left + ' 0 ' + span + ' 158');
    var digits = span < 1 ? 4 : span < 100 ? 3 : 1;
    for (var i = 0; i < ends.length; i++) {
      ends[i].textContent = (left + span * i / (ends.length - 1)).toFixed(digits) + (i ? '' : ' ms');
    }
  }
  function zoom(factor, x) {
    var focus = x === undefined ? 0.5 : x, point = left + span * focus;
    span = span * factor;
    span = Math.min(full, Math.max(full / 20000, span));
    left = point - span * focus;
    show();
  }
  function place(event) {
    var frame = svg.getBoundingClientRect();
    return (event.clientX - frame.left) / frame.width;
  }
  function tell(event) {
    var found = document.elementFromPoint(event.clientX, event.clientY), text = found && found.getAttribute('data-t');
    var now = (left + span * place(event)).toFixed(3);
    if (text) { at.textContent = 'at ' + now + ' ms: ' + text; }
  }
  var drag = null;
  svg.addEventListener('pointerdown', function (event) {
    drag = { x: event.clientX, left: left };
    tell(event);
  });
  svg.addEventListener('pointermove', function (event) {
    if (drag) {
      left = drag.left - (event.clientX - drag.x) / svg.getBoundingClientRect().width * span;
      show();
    } else { tell(event); }
  });
  ['pointerup', 'pointercancel', 'pointerleave'].forEach(function (name) {
    svg.addEventListener(name, function () { drag = null; });
  });
  svg.addEventListener('wheel', function (event) {
    if (event.ctrlKey || event.metaKey) { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, place(event)); }
  }, { passive: false });
  svg.addEventListener('keydown', function (event) {
    if (event.key === '+' || event.key === '=') { zoom(0.5); }
    if (event.key === '-') { zoom(2); }
    if (event.key === 'ArrowLeft') { left -= span / 8; show(); }
    if (event.key === 'ArrowRight') { left += span / 8; show(); }
  });
  box.querySelectorAll('button').forEach(function (button) {
    button.addEventListener('click', function () {
      var what = button.dataset.do;
      if (what === 'in') { zoom(0.5); }
      if (what === 'out') { zoom(2); }
      if (what === 'left') { left -= span / 3; show(); }
      if (what === 'right') { left += span / 3; show(); }
      if (what === 'all') { left = 0; span = full; show(); }
    });
  });
  document.querySelectorAll('tr.jump[data-rank="' + box.dataset.rank + '"]').forEach(function (row) {
    function jump() {
      var start = parseFloat(row.dataset.at), length = parseFloat(row.dataset.ms);
      span = Math.max(length * 4, full / 20000);
      left = start + length / 2 - span / 2;
      show();
      at.textContent = 'at ' + start.toFixed(3) + ' ms: ' + row.dataset.text;
      box.scrollIntoView({ behavior: 'smooth', block: 'center' });
    }
    row.addEventListener('click', jump);
    row.addEventListener('keydown', function (event) { if (event.key === 'Enter') { jump(); } });
  });
  show();
});
"""
