"""The page's style sheet: one column of reading width, light and dark, also on paper."""

CSS = """
:root { color-scheme: light dark;
  --page:#f7f7f3; --card:#ffffff; --ink:#1d211f; --muted:#69726c; --line:#e2e4dd; --cell:#ecede7;
  --accent:#2c6e4e; --good:#2c6e4e; --warn:#a2560b; --hot:#bf3f27; --bar:#7fae95; --rest:#c9cdc5;
  --c0:#2c6e4e; --c1:#c2571f; --c2:#2f6db0; --c3:#8a4fa3; --c4:#a07b0a; --c5:#248a8f; --c6:#b83e6c; --c7:#6a6f73; }
@media (prefers-color-scheme: dark) { :root {
  --page:#131614; --card:#1b1f1c; --ink:#e5e9e5; --muted:#98a39b; --line:#2e3530; --cell:#272d29;
  --accent:#7fc8a0; --good:#7fc8a0; --warn:#e6a35c; --hot:#d9553a; --bar:#457a5e; --rest:#444b46;
  --c0:#7fc8a0; --c1:#f0935c; --c2:#7db1e8; --c3:#c79ade; --c4:#dcb94a; --c5:#6accd0; --c6:#ee86ad; --c7:#a9b0ab; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:36px 20px 60px; }
h1 { font-size:27px; line-height:1.25; margin:0 0 6px; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:18px; margin:0 0 4px; }
h3 { font-size:14px; margin:18px 0 4px; }
p { margin:4px 0 10px; max-width:105ch; }
.eyebrow { color:var(--accent); font-weight:600; font-size:12.5px; letter-spacing:.09em; text-transform:uppercase;
  margin:0 0 6px; }
.lead { color:var(--muted); margin-bottom:22px; overflow-wrap:anywhere; }
.muted, .sub { color:var(--muted); }
.sub { display:block; font-size:12.5px; line-height:1.35; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:20px 22px;
  margin:0 0 16px; }
.tiles { display:flex; flex-wrap:wrap; gap:12px; margin:0 0 16px; }
.tile { flex:1 1 215px; background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; }
.tile b { display:block; font-size:26px; font-weight:600; line-height:1.25; letter-spacing:-.01em;
  font-variant-numeric:tabular-nums; }
.tile .what { font-size:13px; font-weight:600; }
.tile.none b { color:var(--muted); font-size:17px; line-height:32px; font-weight:500; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:7px 0 7px 18px; border-bottom:1px solid var(--line); vertical-align:top;
  white-space:nowrap; }
th:first-child, td:first-child { text-align:left; padding-left:0; white-space:normal; overflow-wrap:anywhere;
  min-width:130px; }
tr:last-child > * { border-bottom:0; }
thead th { white-space:normal; font-size:12.5px; font-weight:600; color:var(--muted); vertical-align:bottom; }
thead th .name { color:var(--ink); display:inline-block; max-width:170px; white-space:normal;
  overflow-wrap:anywhere; }
tbody th { font-weight:500; }
tr.sum > * { border-top:1px solid var(--muted); }
tr.group > * { border-top:1px solid var(--muted); }
.good { color:var(--good); } .warn { color:var(--warn); }
.key { display:inline-block; width:9px; height:9px; border-radius:50%; margin-right:6px; }
.legend { display:flex; flex-wrap:wrap; gap:4px 18px; font-size:13px; margin:2px 0 8px; }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr)); gap:14px 26px; }
figure { margin:0; } figcaption { font-size:13.5px; font-weight:600; margin:8px 0 2px; }
svg { display:block; width:100%; height:auto; font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
svg.plot { max-width:560px; }
svg.heat { min-width:640px; } svg.square { max-width:520px; }
svg.speed { width:200px; margin-left:auto; }
svg text { fill:var(--ink); } svg .tick { fill:var(--muted); font-size:11.5px; } svg .mark { font-size:12px; }
svg .grid { stroke:var(--line); } svg .axis { stroke:var(--muted); }
svg .curve { fill:none; stroke:currentColor; stroke-width:1.8; stroke-linejoin:round; }
  svg .dashed { stroke-dasharray:5 3; }
svg .band { fill:currentColor; opacity:.16; } svg .dot { fill:currentColor; stroke:var(--card); stroke-width:1.2; }
svg .ring { fill:var(--card); stroke:var(--ink); stroke-width:2; } svg .level { stroke:var(--muted);
  stroke-dasharray:2 4; }
svg .cell { fill:var(--cell); } svg .hot { fill:var(--hot); } svg .on { fill:#fff; font-size:11px; }
  svg .off { font-size:11px; }
svg .bar { fill:var(--bar); } svg .slow { fill:var(--hot); opacity:.55; } svg .rest { fill:var(--rest); }
svg .whisker { stroke:var(--ink); stroke-width:1.4; } svg .one { stroke:var(--muted); stroke-dasharray:2 2; }
svg .ideal { stroke:var(--accent); stroke-width:2.6; }
.c0 { color:var(--c0); } .c1 { color:var(--c1); } .c2 { color:var(--c2); } .c3 { color:var(--c3); }
.c4 { color:var(--c4); } .c5 { color:var(--c5); } .c6 { color:var(--c6); } .c7 { color:var(--c7); }
.key { background:currentColor; }
.scale { display:inline-block; width:120px; height:10px; border-radius:3px; margin:0 8px;
  background:linear-gradient(to right,var(--cell),var(--hot)); }
code { font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  overflow-wrap:anywhere; }
.missing { border-left:3px solid var(--warn); padding:5px 0 5px 12px; margin:10px 0; max-width:none; }
.fields { display:grid; grid-template-columns:repeat(auto-fill,minmax(225px,1fr)); gap:2px 22px; margin:6px 0 10px;
  font-size:13px; }
.fields div { display:flex; justify-content:space-between; gap:10px; border-bottom:1px dotted var(--line);
  min-width:0; }
.fields span:first-child { color:var(--muted); } .fields span { overflow-wrap:anywhere; min-width:0; }
.fields span:last-child { text-align:right; }
.facts { display:grid; grid-template-columns:105px minmax(0,1fr); gap:3px 18px; margin:8px 0;
  font-size:13.5px; }
.facts dt { color:var(--muted); } .facts dd { margin:0; overflow-wrap:anywhere; }
details { border-top:1px solid var(--line); padding:9px 0; } details:first-of-type { border-top:0; }
summary { cursor:pointer; font-weight:600; overflow-wrap:anywhere; } summary .muted { font-weight:400; }
.sample { border-top:1px solid var(--line); padding:12px 0 4px; } .sample:first-of-type { border-top:0; }
.said { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr)); gap:8px 26px; }
.said p { white-space:pre-wrap; overflow-wrap:anywhere; max-height:22em; overflow-y:auto; margin:0 0 8px;
  font-size:14px; }
.said .who { font-size:12.5px; font-weight:600; } .prompt { font-weight:600; white-space:pre-wrap;
  overflow-wrap:anywhere; }
ul.notes { margin:6px 0; padding-left:20px; } ul.notes li { margin:3px 0; overflow-wrap:anywhere; max-width:95ch; }
footer { color:var(--muted); font-size:12.5px; }
@media (max-width:640px) { section { padding:16px 14px; } main { padding:22px 10px 40px; } }
@media print { body { background:#fff; } section, .tile { break-inside:avoid; } main { max-width:none; padding:0; } }
"""
