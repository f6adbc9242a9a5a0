"""The report of a run: what each file adds, what is refused, and that a browser shows all of it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.core.storage import write_json
from diffusers_graft.errors import FileError
from diffusers_graft.evaluation.costs import Benchmark, find_break_even
from diffusers_graft.reporting.charts import _smooth, _thin
from diffusers_graft.reporting.report import try_report
from diffusers_graft.reporting.samples import save_samples
from diffusers_graft.search.planner import Choice, Survey

from ..models import SCHEDULER, batches, tiny_dit
from ..test_trainer import trainer

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RULES = {"self_attention[1::2]": "neighborhood", "feed_forward[0]": "linear_mlp"}
ROW = {"tokens": 64, "depth": 8, "parameters": 1_600_000, "flops": 120_000_000}


def write_log(folder):
    rows = []
    for step in range(10, 60, 10):
        sites = {
            f"self_attention[{site}]": {"error": site / step, "held_out": {"step": step, "error": 0.1}}
            for site in (1, 3)
        }
        rows.append({"stage": "one", "step": step, "loss": 1 / step, "sites": sites})
        rows.append({"stage": "two", "step": step, "loss": 2 / step, "held_out": {"step": step, "loss": 0.3}})
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """A folder with every file that a report reads."""
    folder = tmp_path_factory.mktemp("run")
    model = testbed.load()
    plan = dg.plan_graft(model, RULES)
    model.set_graft(plan)
    scores = {
        "original": dg.Scores({"denoising_loss": 0.2242, "fid": 1.5}, {"samples": 1000, "sampling": {"steps": 12}}),
        "<b>graft</b>": dg.Scores({"denoising_loss": 0.2401}, {"samples": 1000, "sampling": {"steps": 12}}),
    }
    model.save_graft(folder, scores=scores)
    write_log(folder)
    pictures = torch.linspace(-1, 1, 2 * 256).reshape(2, 1, 16, 16)
    save_samples(folder, 500, pictures, pictures.flip(-1), conditions=["a <red> circle", "B"], seeds=[7, 8])
    choices = [
        Choice(edit, 0.01 * (i + 1), {"latency": 0.05, "flops": 0.1, "parameters": 0.0})
        for i, edit in enumerate(plan.edits)
    ]
    Survey("DiTTransformer2DModel", tuple(choices)).save(folder / "survey.json")
    rows = []
    for tokens in (64, 256):
        for name, ratio in (("original", 1.0), ("grafted", 64 / tokens)):
            times = {"milliseconds": 4.2 * ratio, "ratio": ratio, "low": ratio, "high": ratio + 0.1}
            rows.append({**ROW, "tokens": tokens, "name": name, **times})
    parts = {"text_encoder": 1.0, "transformer": 5.0, "autoencoder": 2.0, "scheduler_and_rest": 0.5}
    pipeline = [{"name": "grafted", "milliseconds": 8.5, **parts}]
    Benchmark(rows, break_even=find_break_even(rows), pipeline=pipeline, protocol={"threads": 2}).save(
        folder / "benchmark.json"
    )
    locality = {"site": "self_attention[0]", "band": [[0.5, 0.7], None], "neighborhood": [[0.2, 0.4], None]}
    bucket = {"mean": 0.0, "variance": 2.0}
    analysis = {
        "localities": [{**locality, "uniform_band": 0.3, "uniform_neighborhood": 0.1}],
        "activations": [{"site": "self_attention[0]", "buckets": [bucket, None]}],
        "blocks": [{"path": "blocks.0", "similarity": [0.9, None], "linear_error": None}],
    }
    write_json(folder / "analysis.json", analysis)
    (folder / "recipe.yaml").write_text("model: testbed:letters\n")
    return folder


@pytest.fixture(scope="module")
def text(full_run):
    """The report of that folder, as a file is read back."""
    return dg.report(full_run).read_text()


class Page(HTMLParser):
    """Cells of tables, addresses of pictures and identifiers of sections of a page."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.sources, self.rows, self.links = [], [], [], []
        self.is_in_row = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "img":
            self.sources.append(values["src"])
        if tag == "tr":
            self.rows.append([])
            self.is_in_row = True
        self.links += [values[name] for name in ("href", "src") if values.get(name)]

    def handle_endtag(self, tag):
        if tag == "tr":
            self.is_in_row = False

    def handle_data(self, data):
        if self.is_in_row and data.strip():
            self.rows[-1].append(data.strip())


def test_every_file_has_its_section_and_nothing_is_fetched(text):
    page = Page(text)
    assert page.sections == ["edits", "samples", "quality", "cost", "survey", "training", "analysis", "protocol"]
    assert len(page.sources) == 6  # two pairs with their difference
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert ["original", "0.2242", "1.5"] in page.rows
    assert any(row[:2] == ["256", "grafted"] and "0.25" in row for row in page.rows)
    assert "4 of 8" not in text  # feed-forwards are edited, too
    assert "5 of 16" in text
    assert "sampling.steps" in text
    assert "breaks even at" in text
    assert ["grafted", "8.5", "1", "5", "2", "0.5"] in page.rows


def test_words_of_a_stranger_are_no_markup(text):
    assert "a &lt;red&gt; circle" in text
    assert "<b>graft</b>" not in text


def test_the_layers_that_were_edited_are_filled(text):
    cells = re.findall(r'class="cell( new)?" style="--span: 1" title="(\w+)\[(\d+)\]', text)
    filled = {(kind, int(index)) for new, kind, index in cells if new}
    assert filled == {
        ("self_attention", 1),
        ("self_attention", 3),
        ("self_attention", 5),
        ("self_attention", 7),
        ("feed_forward", 0),
    }
    assert len(cells) == 16


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_shows_it_without_errors(text, tmp_path):
    # asked of the page itself, since a picture that fails to load is no error of the browser's
    probe = """<script>addEventListener("load", () => {
        const broken = [...document.images].filter(image => !image.naturalWidth).length;
        const wide = document.documentElement.scrollWidth > innerWidth;
        document.body.dataset.probe = `${document.images.length} pictures, ${broken} broken, wide ${wide}`;
    })</script>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", f"{probe}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=500,900"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 'data-probe="6 pictures, 0 broken, wide false"' in shown.stdout
    assert "CONSOLE" not in shown.stderr


def test_a_log_alone_makes_a_report(tmp_path):
    write_log(tmp_path)
    path = dg.report(tmp_path)
    assert path == tmp_path / "report.html"
    text = path.read_text()
    assert Page(text).sections == ["training"]
    assert text.count("<svg") == 2


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileError, match="There is no folder"):
        dg.report(tmp_path / "missing")
    with pytest.raises(FileError, match=r"is not the output folder of a run.*training\.jsonl"):
        dg.report(tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    with pytest.raises(FileError, match="is not the output folder of a run"):
        dg.report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("graft_config.json", '{"plan": {"edits": [{"operator": "mlp"}]}}'),
        ("graft_config.json", "{"),
        ("plan.json", '{"edits": [1]}'),
        ("scores.json", '{"original": {"protocol": {}}}'),
        ("benchmark.json", '{"rows": [{"tokens": 64}]}'),
        ("survey.json", '{"edits": 1}'),
        ("analysis.json", '{"localities": [{"site": "x"}]}'),
        ("training.jsonl", '{"stage": "one", "step": 1, "sites": {"a": 1}}\n'),
        ("samples.png", "no picture"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=re.escape(name)):
        dg.report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_scores_of_two_protocols_are_not_in_one_table(tmp_path):
    dg.Scores({"fid": 2.0}, {"samples": 8}).save(tmp_path / "scores.json", "original")
    dg.Scores({"fid": 3.0}, {"samples": 8}).save(tmp_path / "scores.json", "first")
    dg.Scores({"fid": 1.0}, {"samples": 50}).save(tmp_path / "scores.json", "second")
    text = dg.report(tmp_path).read_text()
    assert "do not compare" in text
    tables = text.partition('id="quality"')[2].partition("</section>")[0].split("<table>")[1:]
    assert [table.count('class="name"') for table in tables] == [2, 1]
    assert "original 2" not in text


def test_no_run_fails_over_its_report(tmp_path, caplog, monkeypatch):
    (tmp_path / "scores.json").write_text("[]")
    assert try_report(tmp_path) is None
    assert "No report was written" in caplog.text
    write_log(tmp_path)
    (tmp_path / "scores.json").unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: 1 / 0)
    assert try_report(tmp_path) is None
    assert "ZeroDivisionError" in caplog.text


def test_training_and_surveys_end_with_their_report(tmp_path):
    one = trainer(tmp_path / "trained")
    one.train()
    assert Page((tmp_path / "trained" / "report.html").read_text()).sections == ["edits", "training"]
    one.evaluate("after stage two")
    text = (tmp_path / "trained" / "report.html").read_text()
    assert Page(text).sections == ["edits", "quality", "training", "protocol"]
    assert "after stage two" in text
    model = tiny_dit()
    held_out = list(batches(1, size=2))
    dg.survey(
        model,
        {"self_attention[:]": ["identity"]},
        held_out,
        noise_scheduler=SCHEDULER,
        rounds=2,
        output_dir=tmp_path / "survey",
    )
    assert Page((tmp_path / "survey" / "report.html").read_text()).sections == ["survey"]


def test_samples_of_several_steps_show_the_last(tmp_path):
    pictures = torch.zeros(1, 3, 8, 8)
    save_samples(tmp_path, 10, pictures, pictures, conditions=["early"])
    save_samples(tmp_path, 1000, pictures, pictures + 1, conditions=["late"], seeds=[3])
    rows = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [(row["step"], row["folder"], row["conditions"]) for row in rows] == [
        (10, "step_000010", ["early"]),
        (1000, "step_001000", ["late"]),
    ]
    text = dg.report(tmp_path).read_text()
    assert "late · seed 3 · 49.8%" in text  # from 128 to 255, of 255
    assert "early" not in text


def test_lines_keep_their_ends():
    line = [(step, float(step)) for step in range(1001)]
    thinned = _thin(line)
    assert thinned[-1] == line[-1]
    assert len(thinned) <= 300
    assert _smooth(line) == line  # the mean over neighbours on both sides of a straight line is the line
