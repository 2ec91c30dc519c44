"""The frame of the report's page: its style, light and dark, from a phone's width up."""

__all__ = ["PAGE"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fastchargpt benchmarks</title>
<style>
:root {
  --paper: #ffffff; --card: #f5f6f8; --ink: #1d2129; --muted: #5d6572; --rule: #dfe3e8; --bar: #cfe0f5;
  --c0: #0b6bcb; --c1: #c2410c; --c2: #15803d; --c3: #9333ea;
  --c4: #be185d; --c5: #0e7490; --c6: #7c6f00; --c7: #4b5563;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --card: #1c2027; --ink: #e8eaee; --muted: #a3abb8; --rule: #323843; --bar: #27425f;
    --c0: #6db3f8; --c1: #fb923c; --c2: #4ade80; --c3: #c99bfa;
    --c4: #f783b8; --c5: #4fd1e0; --c6: #facc15; --c7: #b6bec9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1.25rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
.machine { background: var(--card); border-radius: 8px; padding: 0.9rem 1.1rem; margin: 0.8rem 0; }
.machine h2 { margin: 0 0 0.4rem; font-size: 1.05rem; }
.machine ul { margin: 0; padding-left: 1.1rem; color: var(--muted); overflow-wrap: anywhere; }
.machine li:first-child { color: var(--ink); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; padding: 0.8rem; background: var(--card); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: 0.4rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
svg .axis { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; }
svg .ceiling { fill: none; stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg circle { fill: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.15rem 0.9rem; margin: 0.4rem 0 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: 0.35rem; font-size: 0.85rem; color: var(--muted); }
.legend i { width: 0.8rem; height: 0.8rem; border-radius: 50%; background: var(--c); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem 0.3rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 600; }
td:last-child { white-space: normal; min-width: 6rem; }
.bars td:nth-child(2) {
  background: linear-gradient(var(--bar), var(--bar)) no-repeat left center / calc(var(--share) * (100% - 0.7rem)) 70%;
  min-width: 9rem; padding-left: 0.4rem;
}
</style>
</head>
<body>
<h1>fastchargpt benchmarks</h1>
<!-- body -->
</body>
</html>
"""
