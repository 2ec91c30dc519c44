"""Results read back, judged by ratio and band, and drawn."""

import html.parser
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastchargpt.bench.charts import chart
from fastchargpt.bench.report import to_html, to_markdown, write_report
from fastchargpt.bench.runs import Row, Run, changes, load_run, rivalries
from fastchargpt.bench.settings import Start
from fastchargpt.cli.main import main
from fastchargpt.errors import ConfigError
from fastchargpt.machine import processor_seconds


def entry(contest: str, contestant: str, median: float, *, spread: float = 0.05, **facts: Any) -> dict[str, Any]:
    figures = {"median_s": median, "p20_s": median * (1 - spread), "p80_s": median * (1 + spread)}
    return {
        "name": "test_x",
        "fullname": "bench/test_bench_tokenizers.py::test_x",
        "param": None,
        "stats": {"median": median, "q1": median, "q3": median},
        "extra_info": {"subject": contest.split()[0], "contest": contest, "contestant": contestant, **figures, **facts},
    }


def attention(contestant: str, time: int, median: float, side: str) -> dict[str, Any]:
    flops = 7 * time**2 * 64
    facts = {"what": "both", "dtype": "fp32", "head_dim": 64, "time": time, "side": side, "peak_bytes": 4 * time**2}
    rates = {"flops": flops, "bytes": 11 * time * 256, "flops_per_s": flops / median}
    return entry(f"attention both fp32 T{time}", contestant, median, **facts, **rates)


def save(path: Path, entries: list[dict[str, Any]], **machine: Any) -> Path:
    facts = {"device": "A <CPU>, 2 cores", "device_type": "cpu", "threads": 2, "torch": "2.13.0", "quick": True}
    roof = {"roof": {"fp32": {"flops": 1e11, "bandwidth": 1e10}}}
    absent = [{"contest": "c", "contestant": "flex", "kind": "absent", "reason": "no backward | on a CPU"}]
    wrong = [{"contest": "c", "contestant": "liar", "kind": "wrong", "reason": "2 times off"}]
    content = {
        "machine_info": {"fastchargpt": {**facts, **roof, **machine}},
        "benchmarks": entries,
        "not_ranked": absent + wrong,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


ENTRIES = [
    *(attention("triton", time, time * 1e-6, "ours") for time in (64, 256, 1024)),
    *(attention("sdpa", time, time * (2e-6 if time < 1000 else 0.5e-6), "peer") for time in (64, 256, 1024)),
    entry("training demo", "nanogpt-fp32-eager", 0.010, side="ours", match="nanogpt", precision="fp32", loss=4.1),
    entry("training demo", "modern-fp32-eager", 0.005, side="ours", match="modern", precision="fp32"),
    entry("training demo", "peer-nanogpt", 0.012, side="peer", match="nanogpt", precision="fp32"),
]


class Reader(html.parser.HTMLParser):
    """Balanced tags, and nothing from elsewhere."""

    VOID = ("meta", "circle", "line", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_a_run_is_read(tmp_path: Path) -> None:
    run = load_run(save(tmp_path / "a.json", ENTRIES))
    assert run.subjects == ["attention", "training"]
    fastest = {name: rows[0].contestant for name, rows in run.contests("attention").items()}
    assert fastest == {
        "attention both fp32 T64": "triton",
        "attention both fp32 T256": "triton",
        "attention both fp32 T1024": "sdpa",
    }


def test_rivals_compute_the_same(tmp_path: Path) -> None:
    pairs = [
        (ours.contestant, peer.contestant) for ours, peer in rivalries(load_run(save(tmp_path / "a.json", ENTRIES)))
    ]
    assert pairs == [("triton", "sdpa")] * 3 + [("nanogpt-fp32-eager", "peer-nanogpt")]


@pytest.mark.parametrize(
    ("after", "spread", "rounds", "verdict"),
    [
        (1.0, 0.05, 400, "same"),
        (1.5, 0.05, 400, "slower"),
        (0.6, 0.05, 400, "faster"),
        (1.5, 0.4, 400, "same"),
        (1.07, 0.001, 400, "same"),
        (1.1, 0.001, 400, "slower"),
        (1.1, 0.001, 5, "same"),
        (0.8, 0.001, 5, "faster"),
    ],
)
def test_changes_are_judged_by_band(tmp_path: Path, after: float, spread: float, rounds: int, verdict: str) -> None:
    words: dict[str, Any] = {"spread": spread, "rounds": rounds}
    before = load_run(save(tmp_path / "a.json", [entry("x y", "z", 1.0, **words), entry("x y", "gone", 1.0)]))
    later = load_run(save(tmp_path / "b.json", [entry("x y", "z", after, **words), entry("x y", "new", 1.0)]))
    (change,) = changes(before, later)
    assert (change.verdict, change.ratio) == (verdict, pytest.approx(after))


@pytest.mark.parametrize(
    ("ours", "others", "verdict", "own"),
    [
        (1.3, (1.3, 1.25, 1.4), "same", 1.0),  # the machine was slower
        (1.3, (1.0, 1.0, 1.02), "slower", 1.3),
        (1.0, (0.7, 0.7, 0.75), "slower", 1 / 0.7),  # and here it was faster
        (0.7, (1.0, 0.99, 1.5), "faster", 0.7),  # one that was held up decides nothing
        (1.3, (), "slower", 1.3),
    ],
)
def test_what_moved_others_code_too_is_the_machines_doing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ours: float, others: tuple[float, ...], verdict: str, own: float
) -> None:
    names = [f"peer{i}" for i in range(len(others))]
    sides = ["reference", *["peer"] * len(others)]
    aside = entry("c other", "peer9", 1.0, rounds=99, side="peer")  # of another contest
    before = [entry("c d", "mine", 1.0, rounds=99, side="ours"), aside]
    before += [entry("c d", name, 1.0, rounds=99, side=side) for name, side in zip(names, sides, strict=False)]
    after = [entry("c d", "mine", ours, rounds=99, side="ours"), entry("c other", "peer9", 9.0, rounds=99, side="peer")]
    after += [
        entry("c d", name, ratio, rounds=99, side=side) for name, ratio, side in zip(names, others, sides, strict=False)
    ]
    found = changes(load_run(save(tmp_path / "a.json", before)), load_run(save(tmp_path / "b.json", after)))
    mine = next(change for change in found if change.after.contestant == "mine")
    assert (mine.verdict, mine.own, mine.ratio) == (verdict, pytest.approx(own), pytest.approx(ours))
    assert mine.excused == (verdict == "same")
    main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    told = capsys.readouterr().out
    assert ("the machine's doing 1.00x  c d: mine" in told) == mine.excused
    assert (f"{verdict} {own:.2f}x  c d: mine" in told) == (not mine.excused)


def test_the_page(tmp_path: Path) -> None:
    paths = [save(tmp_path / "before.json", ENTRIES), save(tmp_path / "after.json", ENTRIES)]
    page, markdown = write_report(paths, tmp_path / "out.html")
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.count["svg"] == 3  # time, memory, roofline
    assert reader.count["circle"] == 18
    assert "script" not in reader.count
    assert "A &lt;CPU&gt;" in text
    assert "prefers-color-scheme: dark" in text
    table = markdown.read_text(encoding="utf-8")
    for words in (
        "No GPU took part in this run",
        "within noise",
        "| 0.50x | slower |",
        "| 2.00x | faster |",
        "liar",
        "no backward \\| on",
    ):
        assert words in table, words
    widths = {line.count("|") - line.count("\\|") for line in table.split("## Ours")[1].split("\n\n")[2].splitlines()}
    assert len(widths) == 1
    assert table.index("liar") < table.index("flex")  # what is wrong comes before what is absent


@pytest.mark.parametrize(("others", "busy"), [(0.1, False), (1.4, True), (None, False)])
def test_other_work_on_the_machine_is_told(tmp_path: Path, others: float | None, busy: bool) -> None:
    run = load_run(save(tmp_path / "a.json", ENTRIES, others=others))
    assert ("the machine was busy" in to_markdown([run])) == busy


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_childs_work_is_not_other_work() -> None:
    start = Start()
    time.sleep(0.3)
    program = "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    all_of_it, own = (now - then for now, then in zip(processor_seconds() or (), start.worked or (), strict=True))
    assert own >= 0.5
    assert all_of_it > own - 0.1  # which is what the machine says of all its processes
    others = start.others()
    assert others is not None
    assert others >= 0


def test_a_gpu_run_says_so(tmp_path: Path) -> None:
    run = load_run(save(tmp_path / "a.json", ENTRIES, device_type="cuda", device="NVIDIA X", capability="9.0"))
    for text in (to_markdown([run]), to_html([run])):
        assert "No GPU" not in text
        assert "capability 9.0" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine_info": {}, "benchmarks": []}', '{"benchmarks": 3}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.json is not a result of"):
        load_run(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path / "absent.json")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.json", [entry("x y", "z", 1.0)])
    b = save(tmp_path / "b.json", [entry("x y", "z", 2.0)], torch="2.14.0")
    assert main(["bench", "compare", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "note: torch differs: 2.13.0 and 2.14.0" in out
    assert "slower 2.00x  x y: z" in out
    assert main(["bench", "compare", str(b), str(a)]) == 0
    assert main(["bench", "report", str(a), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.md").is_file()
    capsys.readouterr()
    for words, message in (
        (["report", str(a), "--out", "r.pdf"], "must end in .html"),
        (["report", str(a), str(a), str(a)], "one or two results"),
        (["attenton"], "did you mean 'attention'?"),
        (["--peer", "gpt5=/x"], "--peer takes nanogpt=PATH"),
        (["--peer", f"nanogpt={tmp_path}"], "needs a checkout with model.py in it"),
        (["--device", "cupu"], "did you mean 'cpu'?"),
        (["--quik"], "bench --help"),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_chart_of_nothing_and_of_one_point() -> None:
    style: dict[str, Any] = {"title": "t", "x_label": "x", "y_label": "y", "x_format": str, "y_format": str}
    assert chart({}, **style) == ""
    assert chart({"a": [(1.0, float("nan"))]}, **style) == ""
    assert chart({"a": [(64.0, 1e-3)]}, **style).count("<circle") == 1


def test_empty_run() -> None:
    run = Run(name="empty", machine={}, rows=[], not_ranked=[])
    assert "empty" in to_markdown([run])
    assert Row(subject="s", contest="c", contestant="x", median=1, p20=1, p80=1, facts={}).facts == {}
