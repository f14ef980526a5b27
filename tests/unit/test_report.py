import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from poa.cli.main import main
from poa.deploy.report import Subject, points_of, render
from poa.deploy.report.curves import MAX_POINTS, charts_of, thinned
from poa.deploy.report.health import heat_map
from poa.deploy.report.scale import number, prefix_of, scale_of
from poa.family import read_card
from tests.report_pages import NASTY, accuracy_of, make_family, metric_lines, write_costs, write_results, write_run

VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Tags with their attributes, visible text, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def inside(self, tag):
        return "".join(text for name, text in self.texts if name == tag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "run")
    write_results(folder / "results.csv", read_card(run))
    write_costs(folder / "costs.csv", read_card(run))
    return folder


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def subject_of(folder, results=True, profiles=True, **changes):
    card = read_card(folder / "run")
    results = (folder / "results.csv",) if results else ()
    profiles = (folder / "costs.csv",) if profiles else ()
    points = points_of(card, results, profiles)
    given = {"metrics": tuple(metric_lines()), "results": results, "profiles": profiles}
    return Subject(folder / "run", card, points, **(given | changes))


def test_thinning_keeps_first_last_and_every_extreme():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[31_337], values[4_242] = 99.0, -99.0
    kept = thinned(values)
    assert len(kept) <= MAX_POINTS + 2
    assert {0, 4_242, 31_337, len(values) - 1} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thinned(values[:MAX_POINTS]).tolist() == list(range(MAX_POINTS))


def test_charts_hold_the_runs_curves_without_those_that_are_zero_or_the_same():
    charts = {
        chart.title: chart
        for chart in charts_of(
            [line | {"backbone_lr": line["lr"]} if "lr" in line else line for line in metric_lines()]
        )
    }
    assert max(charts["Loss"].curves[0].values) > 40
    assert [curve.label for curve in charts["Loss of the intact network"].curves] == ["global"]
    assert [curve.label for curve in charts["Learning rate"].curves] == ["learning rate"]
    assert charts["k-NN while training"].curves[1].values == (25.0, 25.0, 25.0)
    assert [curve.label for curve in charts["RankMe while training"].curves] == ["w16-d1", "w40-d3"]
    for chart in charts.values():
        for curve in chart.curves:
            for x, y in chart.points(curve):
                assert chart.frame.left <= x <= chart.frame.width - chart.frame.right
                assert chart.frame.top <= y <= chart.frame.height - chart.frame.bottom


def test_numbers_that_are_none_leave_a_gap():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3}, {"step": 4, "loss": 1.0}]
    (chart,) = charts_of(lines)
    assert chart.curves[0].steps == (1.0, 4.0)


def test_page_stays_small_for_a_long_run(folder):
    short = len(render(subject_of(folder)))
    long = len(render(subject_of(folder, metrics=tuple(metric_lines(20_000)))))
    assert long < short + 40_000


@pytest.mark.parametrize(
    ("values", "may_log"),
    [
        ([0.5639, 0.5754], False),
        ([3.0, 900.0], True),
        ([5.0, 5.0], True),
        ([-2.0, 0.0], True),
        ([], False),
        ([0.0], True),
    ],
)
def test_axes_hold_all_values_and_have_ticks_inside(values, may_log):
    scale = scale_of(values, may_log=may_log)
    assert all(0 <= scale.share(value) <= 1 for value in values)
    assert len(scale.ticks) >= 2
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_234_567, "1,235,000"),
        (0.00123, "0.00123"),
        (57.0, "57"),
        (100, "100"),
        (0, "0"),
        (2e-5, "2e-05"),
        (900, "900"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert number(float(f"{value:.4g}")) == text


def test_unit_of_a_column_suits_its_smallest_number():
    assert prefix_of([57_700.0, 313_000.0]) == (1e3, "k")
    assert prefix_of([511_608.0, 2.6e6]) == (1e6, "M")
    assert prefix_of([10.0, 5e6]) == (1.0, "")


def test_columns_hold_every_subnetwork_in_the_order_of_the_space(folder):
    points = subject_of(folder).points
    card = read_card(folder / "run")
    assert points.names == tuple(map(str, card.space.subnets))
    assert points.sizes[0].values == tuple(map(card.num_params, card.space.subnets))
    knn, rankme = points.qualities
    assert (knn.name, knn.values[3], knn.values[4]) == ("knn/accuracy", accuracy_of(3), None)
    assert rankme.name == "health/rankme"
    assert points.left_out == ("w16-d1 untrained",)
    board, server = points.devices
    assert board.sources[:2] == ("measured", "interpolated")
    assert board.fit_error == 0.031
    assert server.fit_error is None
    assert server.options == " --device server --runtime torch"


def test_heat_map_has_a_row_for_each_width_and_levels_that_rise(folder):
    subject = subject_of(folder)
    found = heat_map(subject.card.space, subject.points.qualities[0])
    assert [width for width, _ in found.rows] == [16, 24, 32, 40]
    assert found.depths == ("1", "2", "3")
    cells = [cell for _, row in found.rows for cell in row]
    assert cells[4] == ("–", "")
    known = sorted((float(cell.text), cell.level) for cell in cells if cell.level != "")
    assert [level for _, level in known] == sorted(level for _, level in known)
    assert (known[0][1], known[-1][1]) == (0, 9)


def test_page_is_well_formed_and_needs_no_other_file(folder):
    html = render(subject_of(folder))
    page = Page(html)
    assert page.open == []
    assert page.of("link") == [{"rel": "icon", "href": "data:,"}]
    assert not any("src" in attrs for attrs in page.of("script"))
    assert set(re.findall(r"\w+://[^\"' ]*", html)) == {"http://www.w3.org/2000/svg"}
    assert [len(page.of(tag)) for tag in ("h1", "main", "nav", "noscript")] == [1, 1, 1, 1]
    anchors = {attrs["href"][1:] for attrs in page.of("a")}
    assert anchors <= {attrs["id"] for _, attrs in page.tags if "id" in attrs}


def test_policy_names_the_style_and_the_script_and_nothing_else(folder):
    html = render(subject_of(folder))
    (policy,) = [attrs["content"] for attrs in Page(html).of("meta") if "http-equiv" in attrs]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    found = {}
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        found[kind] = f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"} | found
    assert " style=" not in re.sub(r"<script>.*</script>", "", html, flags=re.S)


def test_data_of_the_page_is_the_tables(folder):
    data = data_of(render(subject_of(folder)))
    assert data["hasQuality"] is True
    assert [column["name"] for column in data["sizes"]] == ["num_params", "flops"]
    assert {column["name"] for column in data["devices"][0]["columns"]} == {
        "latency_ms",
        "latency_p95_ms",
        "file_size_mb",
        "peak_memory_mb",
    }
    assert data["qualities"][0]["values"][4] is None
    assert data["devices"][1]["sources"] == ["measured"] * 12


def test_page_without_tables_says_which_commands_give_them(folder):
    html = render(subject_of(folder, results=False, profiles=False, metrics=()))
    page, data = Page(html), data_of(html)
    commands = page.inside("code")
    assert f"poa evaluate sweep {folder / 'run'}" in commands
    assert f"poa profile {folder / 'run'}" in commands
    assert "The run directory has the curves" in page.inside("p")
    assert data["hasQuality"] is False
    assert data["qualities"][0]["name"] == "num_params"
    assert not page.of("polyline")


def test_odd_names_stay_text(folder):
    family = make_family(source=NASTY, method=NASTY)
    family.save(folder / "odd", overwrite=True)
    card = read_card(folder / "odd")
    lines = ({"step": 1, f"loss/intact/{NASTY}": 1.0}, {"step": 2, f"loss/intact/{NASTY}": 2.0})
    subject = Subject(
        folder / NASTY, card, points_of(card, (), ()), metrics=lines, config=NASTY, command=f"poa report {NASTY}"
    )
    html = render(subject)
    page = Page(html)
    assert page.of("img") == []
    assert len(page.of("script")) == 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert NASTY in page.inside("dd")
    assert NASTY in page.inside("pre")
    assert NASTY.partition("/")[2].partition(">")[0] in data_of(html)["run"]


def test_pictures_show_three_networks_and_count_bad_images(folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for place in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(images / f"{place}&.png")
    (images / "bad<b>.png").write_bytes(b"no image")
    out = tmp_path / "page.html"
    call = ["report", str(folder / "run"), "--out", str(out), "--images", str(images), "--num-images", "3"]
    assert main(call) == 1
    assert "--max-bad-share" in capsys.readouterr().err
    assert not out.exists()
    assert main([*call, "--max-bad-share", "0.5"]) == 0
    page = Page(out.read_text())
    pictures = page.of("img")
    assert len(pictures) == 3 * (1 + 2 * 3)
    for each in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(each["src"].removeprefix("data:image/webp;base64,"))))
        assert max(image.size) <= 128
        assert each["alt"]
    assert "bad<b>.png" in page.inside("p")
    first = out.read_bytes()
    assert main([*call, "--max-bad-share", "0.5"]) == 0
    assert out.read_bytes() == first


def test_command_writes_the_page_of_a_run_and_of_a_family(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(folder / "run"), "--out", str(out)]) == 0
    assert f"The page: {out}" in capsys.readouterr().out
    page = Page(out.read_text())
    assert "ViT family, w16-d1 to w40-d3" in page.inside("title")
    assert "2.14.1" in page.inside("dd")
    assert "train: {seed: 7}" in page.inside("pre")
    assert page.of("polyline")
    assert main(["report", str(folder / "run" / "family"), "--out", str(out)]) == 0
    assert not Page(out.read_text()).of("polyline")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-images", "3"], "need --images"),
        (["--image-column", "picture"], "need --images"),
        (["--images", "digits:test", "--num-images", "0"], "num_images must be 1 to 16"),
        (["--results", "missing.csv"], "cannot read the results"),
        (["--profile", "missing.csv"], "cannot read the profile"),
    ],
)
def test_mistakes_are_named_and_leave_no_page(folder, tmp_path, capsys, options, words):
    out = tmp_path / "page.html"
    assert main(["report", str(folder / "run"), "--out", str(out), *options]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_damaged_metrics_are_named(folder, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for text in ('{"step": 1, "lo', "[1]\n", '{"loss": 1}\n'):
        (run / "metrics.jsonl").write_text(text)
        assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 1
        assert "metrics.jsonl is damaged" in capsys.readouterr().err


def test_tables_of_another_family_are_refused(folder, tmp_path, capsys):
    other = make_family()
    with_other_weights = next(iter(other.supernet.parameters()))
    with_other_weights.data.add_(1.0)
    other.save(tmp_path / "other")
    call = ["report", str(tmp_path / "other"), "--out", str(tmp_path / "page.html")]
    assert main([*call, "--profile", str(folder / "costs.csv")]) == 1
    assert "no row of this family" in capsys.readouterr().err
