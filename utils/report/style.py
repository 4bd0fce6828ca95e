"""The look of the report: one style sheet, light and dark, no script, nothing from outside."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d8dee4;
  --accent: #0969a8; --good: #0b7a55;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1318; --card: #171c23; --ink: #e6eaee; --muted: #9aa5b1; --line: #2c343d;
    --accent: #6cb6f0; --good: #4cc295;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC",
    "PingFang SC", "Microsoft YaHei", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0 0 8px; color: var(--muted); font-weight: 600; }
p { margin: 6px 0; max-width: 75ch; }
a { color: var(--accent); }
.muted { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 14px; font-size: 14px; }
nav a { text-decoration: none; }
.figures { display: grid; gap: 12px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; }
.figure b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figure span { font-size: 12.5px; color: var(--muted); }
.figure.best b { color: var(--good); }
.plots, .pictures { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px; min-width: 0; }
.card.wide { grid-column: 1 / -1; }
.plot { background: #ffffff; border-radius: 6px; display: block; max-width: 100%; height: auto;
  margin: 0 auto; padding: 4px; }
figure { margin: 0; }
figcaption { font-size: 13px; color: var(--muted); margin-top: 6px; overflow-wrap: anywhere; }
.pictures img { display: block; max-width: 100%; height: auto; border-radius: 6px;
  margin: 0 auto; }
.scroll { overflow-x: auto; }
.tall { max-height: 560px; overflow: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; background: var(--card); }
.tall thead th { position: sticky; top: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.pairs td, table.pairs th { overflow-wrap: anywhere; }
table.pairs th { color: var(--muted); font-weight: 500; width: 34%; min-width: 110px; }
tr.best td { font-weight: 650; color: var(--good); }
td.changed { font-weight: 650; }
pre { background: var(--ground); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; margin: 8px 0; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.note { border-left: 3px solid var(--accent); padding: 2px 0 2px 12px; margin: 12px 0; }
details summary { cursor: pointer; color: var(--accent); margin: 10px 0 6px; }
@media print { .tall { max-height: none; } nav { display: none; } }
"""
