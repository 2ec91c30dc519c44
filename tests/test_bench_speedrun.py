"""The race to a loss: who runs when, what the tables say, and that its figures are those of real runs."""

import json
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fastchargpt.bench.ingredients import VARIANTS, Variant, Worth, leave_one_out
from fastchargpt.bench.speedrun import Finish, entrants, get_corpus, time_to_loss
from fastchargpt.bench.speedrun_report import ingredients_table, race_table, write
from fastchargpt.cli.main import main
from fastchargpt.corpus import load_corpus
from fastchargpt.errors import ConfigError, TrainingError


def test_contestants_take_turns_in_rotating_order():
    order = []

    def contestant(name):
        return lambda: order.append(name) or Finish(seconds=1.0, val_loss=2.0)

    found = time_to_loss({name: contestant(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(runs) for name, runs in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_race_is_told_by_medians_against_the_target():
    runs = {
        "fastchargpt": [Finish(seconds=s, val_loss=v) for s, v in ((4.0, 1.87), (5.0, 1.89), (9.0, 1.88))],
        "nanoGPT": [Finish(seconds=60.0, val_loss=1.9), Finish(seconds=40.0, val_loss=1.88)],
    }
    ours, theirs = race_table("shakespeare", runs).splitlines()[-2:]
    assert ours.split(" | ")[1:] == ["5.0 (4.0, 5.0, 9.0)", "1.8700, 1.8900, 1.8800", "2 of 3", "10.0 |"]
    assert theirs.split(" | ")[3:] == ["1 of 2", "1.0 |"]
    # elsewhere the peer sets the target: its median loss
    assert "target 1.8900 (the peer's" in race_table("pydoc", runs)
    assert "no target without a peer" in race_table("pydoc", {"fastchargpt": runs["fastchargpt"]})


def test_ingredients_are_trained_by_seed_and_the_best_of_the_tries_counts(small):
    variants = (
        Variant(name="the recipe"),
        Variant(name="another rate", tries=({"learning_rate": 1e-9, "matrix_learning_rate": 1e-9}, {})),
        Variant(name="wider", model={"n_embd": 96, "n_head": 3}),
    )
    recipe, rate, wider = leave_one_out(small, (1, 2), variants=variants, steps=3)
    assert len(set(recipe.losses)) == 2
    assert rate.chosen == {}
    assert rate.losses == recipe.losses
    assert wider.losses != recipe.losses
    assert recipe.mean == pytest.approx(sum(recipe.losses) / 2)
    assert 0 < recipe.spread < 0.5


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("".join(topics.values())[:20_000])
    return load_corpus(path)


def test_every_variant_is_one_that_can_be_trained(small):
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    for worth in leave_one_out(small, (1,), steps=1):
        assert worth.losses[0] < 10.0, worth.name


def test_the_table_of_ingredients_names_differences():
    worths = [
        Worth(name="the recipe", losses=(1.8, 1.9), step_ms=10.0, chosen={}),
        Worth(name="without it", losses=(2.0, 2.0), step_ms=9.0, chosen={"learning_rate": 3e-3}),
    ]
    first, second = ingredients_table("pydoc", worths).splitlines()[-2:]
    assert first == "| the recipe | 1.8500 ± 0.0707 |  | 10.0 |"
    assert second == "| without it (learning_rate 0.003) | 2.0000 ± 0.0000 | +0.1500 | 9.0 |"


def test_our_contestant_is_a_whole_run_and_its_loss_that_of_the_saved_weights(tmp_path):
    from fastchargpt.loading import load

    corpus, data = get_corpus("pydoc", tmp_path)
    found = entrants(data, corpus, None, tmp_path)
    assert list(found) == ["fastchargpt"]
    finish = found["fastchargpt"]()
    saved = json.loads((tmp_path / "ours" / "last" / "config.json").read_text())
    assert finish.val_loss == pytest.approx(saved["info"]["val_loss"], abs=1e-4)
    assert finish.val_loss < 2.4
    assert finish.seconds > 0.5
    assert load(tmp_path / "ours")[0].config.n_embd == 64


def test_a_contestant_that_fails_is_told_with_its_last_line(tmp_path):
    corpus, _ = get_corpus("pydoc", tmp_path)
    with pytest.raises(TrainingError, match=r"ended with status 2: .*no-such-corpus"):
        entrants("no-such-corpus", corpus, None, tmp_path)["fastchargpt"]()


@pytest.mark.slow
@pytest.mark.skipif("FASTCHARGPT_NANOGPT" not in os.environ, reason="FASTCHARGPT_NANOGPT names no checkout of nanoGPT")
def test_the_peer_trains_on_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setattr("fastchargpt.bench.speedrun.DEMO", dict(_SHORT))
    corpus, data = get_corpus("stdlib", tmp_path)
    finish = entrants(data, corpus, Path(os.environ["FASTCHARGPT_NANOGPT"]), tmp_path)["nanoGPT"]()
    assert 1.5 < finish.val_loss < 4.5


_SHORT = dict(device="cpu", compile=False, eval_iters=1, log_interval=1, block_size=64, batch_size=4, n_layer=1)
_SHORT |= dict(n_head=2, n_embd=32, max_iters=10, eval_interval=10, lr_decay_iters=10, dropout=0.0)


def test_the_files_hold_what_was_measured_and_no_place(tmp_path):
    runs = {"pydoc": {"fastchargpt": [Finish(seconds=4.0, val_loss=1.9)]}}
    paths = write(tmp_path / "race.json", {"device": "a CPU", "compile_seconds": 7.0}, runs, {})
    assert [path.name for path in paths] == ["race.json", "race.md"]
    assert json.loads(paths[0].read_text())["races"]["pydoc"]["fastchargpt"] == [{"seconds": 4.0, "val_loss": 1.9}]
    assert "takes 7.0 s more" in paths[1].read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["shakespear"], "no corpus 'shakespear' to race on (did you mean 'shakespeare'?)"),
        (["--rounds=-1"], "must not be negative"),
        (["--peer=nanogpt=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    assert main(["bench", "speedrun", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_an_unknown_corpus_names_the_known(tmp_path):
    with pytest.raises(ConfigError, match="shakespeare, pydoc, stdlib"):
        get_corpus("enwik8", tmp_path)
