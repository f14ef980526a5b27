"""The report's page in a real browser, without a network."""

import itertools
import json
import os
import shlex
import shutil

import pytest

from poa.cli.main import main
from poa.deploy.report import points_of
from poa.deploy.select import SettingFilter, constraint, join, select
from poa.family import read_card
from tests.report_pages import NASTY, SETTINGS, accuracy_of, write_costs, write_results, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SET = """
function set(id, value, kind) {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event(kind, { bubbles: true }));
}
const text = (id) => document.getElementById(id)?.textContent ?? null;
"""
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance(colour) {
  const linear = (share) => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = rgba(colour).map((each) => linear(each / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function paper(element) {
  for (let each = element; each; each = each.parentElement) {
    const colour = getComputedStyle(each).backgroundColor;
    if (rgba(colour)[3] === 255) return colour;
  }
}
const found = [];
for (const element of document.querySelectorAll("body *:not(script)")) {
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
  if (!element.getClientRects().length || element.closest("noscript, title")) continue;
  const style = getComputedStyle(element);
  const [a, b] = [luminance(element.closest("svg") ? style.fill : style.color), luminance(paper(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  found.push([contrast, `${element.tagName} ${element.getAttribute("class")} ${element.textContent.slice(0, 30)}`]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    missing = [name for name, found in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if found is None]
    if missing and not os.environ.get("POA_REQUIRE_BROWSER"):
        pytest.skip(f"not installed here: {', '.join(missing)}")
    assert not missing, f"POA_REQUIRE_BROWSER is set, and {', '.join(missing)} is not installed"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "run")
    card = read_card(run)
    results, costs = write_results(folder / "results.csv", card), write_costs(folder / "costs.csv", card)
    tables = ["--results", str(results), "--profile", str(costs)]
    assert main(["report", str(run), "--out", str(folder / "whole.html"), *tables]) == 0
    assert main(["report", str(run), "--out", str(folder / "bare.html")]) == 0
    return folder


@pytest.fixture
def opened(browser, folder):
    """Opens a page of that name anew, at that width and with that preference of the reader."""

    def opened(name="whole", width=1200, colours="light", *, has_script=True):
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not has_script})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": colours}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get((folder / f"{name}.html").as_uri())
        return browser

    return opened


def by_id(page, name):
    return page.find_element("id", name)


@pytest.mark.parametrize("name", ["whole", "bare"])
def test_page_makes_no_request_and_no_error(opened, name):
    page = opened(name)
    page.execute_script("document.getElementById('theme').click()")
    requests = [
        event["params"]["request"]["url"]
        for event in (json.loads(entry["message"])["message"] for entry in page.get_log("performance"))
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in requests) == 1
    assert page.get_log("browser") == []


def test_page_forbids_every_request(opened):
    page = opened()
    blocked = page.execute_async_script(
        """
        const done = arguments[0], blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          blocked.push(event.effectiveDirective);
          if (blocked.length === 3) done(blocked.sort());
        });
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/a.png" }));
        fetch("http://127.0.0.1:9/b").catch(() => {});
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        """
    )
    assert blocked == ["connect-src", "img-src", "script-src-elem"]
    assert page.title != "owned"


def test_pick_and_runner_up_are_those_of_poa_select(opened, folder):
    card = read_card(folder / "run")
    points = points_of(card, [folder / "results.csv"], [folder / "costs.csv"])
    plans, expected = [], []
    for (number, device), (place, quality) in itertools.product(enumerate(SETTINGS), enumerate(points.qualities)):
        joined = join(
            card, [folder / "costs.csv"], [folder / "results.csv"], quality.name, SettingFilter(device=device)
        )
        columns = [*points.sizes, *points.devices[number].columns]
        limits = [
            [(column, float(f"{value * (0.97, 1.01)[turn % 2]:.4g}"))]
            for column in columns
            for turn, value in enumerate(column.known[::2])
        ]
        limits += [
            [(columns[0], float(f"{size * 1.1:.3g}")), (columns[2], float(f"{latency:.3g}"))]
            for size, latency in itertools.product(columns[0].known[::3], columns[2].known[::3])
        ]
        for budget in limits:
            plans.append([number, place, [[column.name, limit] for column, limit in budget]])
            found = select(joined.rows, [constraint(column.name, f"{limit}{column.unit}") for column, limit in budget])
            runner_up = found.runner_ups[0].row.subnet if found.runner_ups else None
            expected.append([found.pick.subnet, runner_up] if found.pick else ["Nothing fits.", None])
    shown = opened().execute_script(
        SET
        + """
        document.getElementById("plot").style.display = "none";
        let now = [];
        return arguments[0].map(([device, quality, limits]) => {
          if (now[0] !== device) set("device", device, "change");
          if (now[1] !== quality) set("quality", quality, "change");
          now = [device, quality];
          document.getElementById("unlimited").click();
          for (const button of document.querySelectorAll("#limits button")) button.click();
          for (const [cost, limit] of limits) {
            set("cost", cost, "change");
            set("limit", limit, "input");
          }
          const other = document.querySelector("b#runner-up");
          return [text("pick"), other ? other.textContent : null];
        });
        """,
        plans,
    )
    assert len(plans) > 200
    assert ["Nothing fits.", None] in expected
    assert [pair for pair in zip(plans, shown, expected, strict=True) if pair[1] != pair[2]] == []


def test_slider_gives_a_larger_network_for_a_larger_budget_and_the_commands_say_so(opened):
    page = opened("bare")
    picks = page.execute_script(
        SET
        + """
        set("cost", "num_params", "change");
        return [0, 300, 600, 1000].map((part) => {
          set("slider", part, "input");
          return [text("pick"), text("export-command"), text("select-command"), document.getElementById("limit").value];
        });
        """
    )
    assert picks[0][:2] == ["Nothing fits.", None]
    sizes = [pick for pick, *_ in picks[1:]]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == "w40-d3"
    for pick, export, chosen, limit in picks[1:3]:
        assert f" {pick} --to timm --out exports" in export
        assert f"--quality params --max-params {float(limit):g}k" in chosen
    assert "--max" not in picks[-1][2]
    assert "poa profile" in page.find_element("id", "choose").text


def test_nothing_fits_names_the_limit_that_helps(opened):
    page = opened()
    answer = page.execute_script(
        SET
        + """
        set("cost", "file_size_mb", "change");
        set("limit", 0.001, "input");
        return text("answer");
        """
    )
    assert "Nothing fits." in answer
    assert "file size of" in answer


def test_axes_switch(opened):
    page = opened()
    titles = page.execute_script(
        SET
        + """
        return ["num_params", "flops", "latency_ms", "file_size_mb", "peak_memory_mb"].flatMap((cost) =>
          ["0", "1"].map((quality) => {
            set("cost", cost, "change");
            set("quality", quality, "change");
            return [...document.querySelectorAll("#front .axis")].map((each) => each.textContent).join(" | ")
              + " | " + document.querySelectorAll("#front .point").length;
          }));
        """
    )
    assert titles[0] == "k-NN accuracy, % | parameters, k | 11"
    assert titles[1] == "RankMe | parameters, k | 12"
    assert [title.split(" | ")[1] for title in titles[2::2]] == [
        "FLOPs, k",
        "latency, ms",
        "file size, MB",
        "peak memory, MB",
    ]


def test_figures_are_shown_under_the_pointer_and_by_keyboard(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = opened()
    point = page.find_element("css selector", "#front .point[data-name='w16-d2']")
    page.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", point)
    ActionChains(page).move_to_element(point).perform()
    shown = by_id(page, "tip").text
    assert "w16-d2" in shown
    assert f"{accuracy_of(1):.0%}".removesuffix("%") + ".00 %" in shown
    assert "interpolated, ± 3.1 %" in shown
    page.execute_script("document.querySelector('#front .point[tabindex=\"0\"]').focus()")
    names = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT):
        page.switch_to.active_element.send_keys(key)
        names.append(by_id(page, "tip").text.split("\n")[0])
    assert names[0] == names[2] != names[1]
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not by_id(page, "tip").is_displayed()


def test_curves_show_their_values_under_the_pointer(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    page = opened()
    figure = page.find_element("css selector", "figure[data-chart='0']")
    page.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", figure)
    before = figure.find_element("css selector", ".legend").text
    ActionChains(page).move_to_element(figure.find_element("css selector", "svg")).perform()
    after = figure.find_element("css selector", ".legend").text
    assert "900" in before
    assert before != after


@pytest.mark.parametrize("name", ["whole", "bare"])
@pytest.mark.parametrize("width", [320, 375, 768])
def test_page_is_never_wider_than_the_screen(opened, name, width):
    page = opened(name, width)
    inside, whole = page.execute_script(
        "const { clientWidth, scrollWidth } = document.documentElement; return [clientWidth, scrollWidth]"
    )
    assert whole <= inside <= width


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_text_has_contrast_aa(opened, colours):
    page = opened("whole", colours=colours)
    page.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    found = page.execute_script(CONTRASTS)
    assert len(found) > 100
    assert found[0][0] >= 4.5, found[:5]


def test_colours_follow_the_reader_and_the_button(opened):
    ink = "return getComputedStyle(document.body).color"
    seen = {}
    for colours in ("light", "dark"):
        page = opened(colours=colours)
        seen[colours] = page.execute_script(ink)
        by_id(page, "theme").click()
        seen[f"{colours}, switched"] = page.execute_script(ink)
    assert seen["light"] == seen["dark, switched"] != seen["dark"] == seen["light, switched"]


def test_copy_button_answers(opened):
    page = opened()
    button = page.find_element("css selector", ".command button")
    page.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", button)
    button.click()
    page.execute_async_script("setTimeout(arguments[0], 100)")
    assert button.text in ("Copied", "Selected")


def test_without_javascript_charts_and_tables_are_there(opened):
    page = opened(has_script=False)
    assert len(page.find_elements("css selector", "#networks details:first-of-type tbody tr")) == 12
    assert len(page.find_elements("css selector", "#front circle")) == 11
    assert page.find_elements("css selector", "figure.chart polyline")
    assert page.find_elements("css selector", ".heat td")
    assert not by_id(page, "controls").is_displayed()
    assert page.find_element("css selector", "noscript p").is_displayed()


def test_names_with_odd_characters_inject_nothing(opened, folder):
    run = write_run(folder / NASTY.replace("/", ""), source=NASTY, method=NASTY)
    results = write_results(folder / f"{NASTY.replace('/', '')}.csv", read_card(run))
    assert main(["report", str(run), "--out", str(folder / "odd.html"), "--results", str(results)]) == 0
    page = opened("odd")
    assert page.title != "owned"
    assert page.find_elements("css selector", "img") == []
    assert len(page.find_elements("css selector", "script")) == 2
    assert page.get_log("browser") == []
    assert shlex.split(by_id(page, "export-command").text)[2] == str(run)
