"""The race to a loss, and the worth of the recipe's ingredients, as JSON and as Markdown."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastchargpt.bench.ingredients import Worth
from fastchargpt.bench.speedrun import TARGET, Finish

__all__ = ["ingredients_table", "race_table", "write"]

PEER = "nanoGPT"


def race_table(corpus: str, runs: Mapping[str, Sequence[Finish]]) -> str:
    """Markdown: a row for each contestant, the ratio to the peer's time, and whether each run reached the target."""
    peer = runs.get(PEER)
    target, whose = (TARGET, "nanoGPT's README") if corpus == "shakespeare" else (None, "the peer's median loss here")
    if target is None and peer:
        target = statistics.median(run.val_loss for run in peer)
    goal = f"target {target:.4f} ({whose})" if target is not None else "no target without a peer"
    lines = [
        f"### {corpus}: {goal}",
        "",
        "| contestant | seconds, median (each) | exact validation loss (each) | at the target | times faster |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, finishes in runs.items():
        seconds = statistics.median(run.seconds for run in finishes)
        each = ", ".join(f"{run.seconds:.1f}" for run in finishes)
        losses = ", ".join(f"{run.val_loss:.4f}" for run in finishes)
        reached = sum(target is not None and run.val_loss <= target for run in finishes)
        ratio = f"{statistics.median(run.seconds for run in peer) / seconds:.1f}" if peer else ""
        lines.append(f"| {name} | {seconds:.1f} ({each}) | {losses} | {reached} of {len(finishes)} | {ratio} |")
    return "\n".join(lines)


def ingredients_table(corpus: str, worths: Sequence[Worth]) -> str:
    """Markdown: the recipe first, then what each change costs in loss."""
    recipe = worths[0]
    lines = [
        f"### {corpus}: the recipe with one thing changed, {len(recipe.losses)} seeds",
        "",
        "| | exact validation loss, mean ± standard deviation | against the recipe | ms a step |",
        "| --- | --- | --- | --- |",
    ]
    for worth in worths:
        chosen = ", ".join(f"{name} {value:g}" for name, value in worth.chosen.items())
        name = f"{worth.name} ({chosen})" if chosen else worth.name
        change = f"{worth.mean - recipe.mean:+.4f}" if worth is not recipe else ""
        lines.append(f"| {name} | {worth.mean:.4f} ± {worth.spread:.4f} | {change} | {worth.step_ms:.1f} |")
    return "\n".join(lines)


def write(
    path: Path,
    machine: Mapping[str, Any],
    races: Mapping[str, Mapping[str, Sequence[Finish]]],
    ingredients: Mapping[str, Sequence[Worth]],
) -> list[Path]:
    """Write `path`, JSON, and the tables beside it; the files written."""
    found = {
        "machine": machine,
        "races": {
            corpus: {name: [dataclasses.asdict(run) for run in finishes] for name, finishes in runs.items()}
            for corpus, runs in races.items()
        },
        "ingredients": {
            corpus: [dataclasses.asdict(worth) for worth in worths] for corpus, worths in ingredients.items()
        },
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = path.with_suffix(".md")
    tables = [race_table(corpus, runs) for corpus, runs in races.items()]
    tables += [ingredients_table(corpus, worths) for corpus, worths in ingredients.items() if worths]
    where = f"{machine.get('device')}, {machine.get('threads')} threads, torch {machine.get('torch')}"
    about = f"Measured on {where}. Whole processes, imports and evaluation included."
    if "compile_seconds" in machine:
        about += f" Compiling the native step, once at installation, takes {machine['compile_seconds']:.1f} s more."
    page.write_text("\n\n".join([about, *tables]) + "\n", encoding="utf-8")
    return [path, page]
