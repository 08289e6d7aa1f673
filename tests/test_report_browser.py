"""The page of `greedy report` in a real browser."""

import re
import shutil

import chromium
import pytest
from command_line import said
from reported import RUNS

from greedy.runs.directory import RunDirectory
from greedy.runs.record import StageRecord

pytestmark = [
    pytest.mark.usefixtures("script"),
    pytest.mark.skipif(
        chromium.PROGRAM is None, reason="Chromium is not installed: apt-get install chromium"
    ),
]


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "one.html"
    said("report", runs / "predsim", "--to", page)
    return page


@pytest.fixture(scope="module")
def many(runs, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "many.html"
    said("report", *(runs / name for name in [*RUNS, "partial"]), "--to", page)
    return page


def complaints(browser):
    """Returns the messages of the console and the requests to the network, except for the page
    itself."""
    methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    asked = (
        each["params"]["request"]["url"]
        for each in browser.events
        if each["method"] == "Network.requestWillBeSent"
    )
    return [each for each in browser.events if each["method"] in methods] + [
        url for url in asked if not url.startswith(("file:///", "data:"))
    ]


@pytest.mark.parametrize("page", ["one", "many"])
def test_every_chart_is_drawn_and_nothing_is_complained_of(request, browser, page):
    page = request.getfixturevalue(page)
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page.read_text())
    browser.events.clear()
    browser.size(1280, 900)
    browser.open_report(page)
    drawn = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map(chart => [chart.id,"
        " [...chart.querySelectorAll('svg [aria-roledescription$=mark]')].length]))"
    )
    assert drawn and min(drawn.values()) > 0, drawn
    assert drawn.keys() == browser.evaluate("JSON.parse(document.all.charts.textContent)").keys()
    assert complaints(browser) == []
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    assert browser.evaluate(broken) == 0


def test_what_there_is_stands_on_the_page(browser, many):
    browser.size(1280, 900)
    browser.open_report(many)
    text = browser.evaluate("document.body.innerText")
    for heading in (
        "Side by side",
        "Error by stage",
        "Error over epochs",
        "Memory of a training step",
        "Disk by stage and encoding",
        "Time by stage",
        "Similarity of one test batch after each stage",
        "Confusion matrix of the test images",
        "The most confidently wrong test images",
        "To repeat it",
    ):
        assert heading in text
    assert "the paper: 8.5 %" in browser.evaluate("document.body.textContent")
    assert "Stage 3 is not begun." in text
    assert browser.evaluate("document.querySelectorAll('#run1 .mistakes img').length") == 20
    assert browser.evaluate("document.querySelectorAll('#run1 .matrices img').length") == 5
    assert browser.evaluate("document.querySelectorAll('article').length") == 5


# However long drawing takes: until the tooltip tells of the epoch.
FOUND = """new Promise(done => {{
  const look = () => {{
    const cells = {cells};
    if (cells[1] === "{epoch}" && cells.length > 3) done(cells); else setTimeout(look, 50);
  }};
  look();
}})"""


def test_the_pointer_reads_the_errors_of_an_epoch(runs, tmp_path, browser):
    page = tmp_path / "report.html"
    said("report", runs / "sim", "--to", page)
    browser.size(1280, 2000)
    browser.open_report(page)
    box = browser.evaluate(
        "document.querySelector('#run1-curves .mark-rule').getBoundingClientRect().toJSON()"
    )
    middle = (box["top"] + box["bottom"]) / 2
    shown = []
    for x in (box["left"] + 5, box["right"] - 5):  # the first epoch, and the last
        for step in (0, 1):
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=middle)
        cells = "[...document.querySelectorAll('#vg-tooltip-element td')].map(e => e.textContent)"
        shown.append(browser.evaluate(FOUND.format(cells=cells, epoch=1 + len(shown))))
    stage = RunDirectory.open(runs / "sim").record(3).metrics
    assert shown[0][:3] == ["epoch", "1", "3, output, train"] and len(shown[0]) == 4
    assert shown[1] == [
        "epoch",
        "2",
        "3, output, test",
        f"{stage.test_error_percent:.2f}",
        "3, output, train",
        f"{stage.train_error_percent:.2f}",
    ]


CONTRAST = """(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parse(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parse(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("body *")].filter((e) =>
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length
    && !e.closest("script, [id$=confusion] .mark-text.role-mark")).map((e) => {
      const style = getComputedStyle(e), ink = e.closest("svg") ? style.fill : style.color;
      const pair = [light(ink), light(behind(e))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), e.textContent.trim().slice(0, 40)];
    }).sort((a, b) => a[0] - b[0]);
})()"""


def test_texts_can_be_read_in_light_and_in_dark(browser, one):
    browser.size(1280, 900)
    pictures = []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open_report(one)
        contrasts = browser.evaluate(CONTRAST)
        assert len(contrasts) > 100
        assert contrasts[0][0] >= 4.5, contrasts[:5]
        pictures.append(browser.screenshot())
    assert pictures[0] != pictures[1]
    background = "getComputedStyle(document.body).backgroundColor"
    label = "getComputedStyle(document.querySelector('.chart text')).fill"
    dark = browser.evaluate(background), browser.evaluate(label)
    browser.scheme("light")  # while the page is open: its charts are drawn again
    redrawn = f"new Promise(done => setTimeout(() => drawing.then(() => done({label})), 50))"
    light = browser.evaluate(background), browser.evaluate(redrawn)
    assert light[0] != dark[0] and light[1] != dark[1]


def test_a_phone_need_not_scroll_sideways(browser, many):
    browser.size(390, 844)
    browser.open_report(many)
    widths = "[document.scrollingElement.scrollWidth, innerWidth]"
    assert browser.evaluate(widths) == [390, 390]
    beyond = browser.evaluate(
        "[...document.querySelectorAll('.chart svg text')].filter(text => {"
        " const box = text.getBoundingClientRect();"
        " return box.width && (box.right > innerWidth || box.left < 0); }).map(t => t.textContent)"
    )
    assert beyond == []


def test_names_are_text_and_nothing_else(runs, tmp_path, browser):
    evil = "</script><img src=x onerror=\"document.title='caught'\">{{ 7 * 7 }}"
    path = shutil.copytree(runs / "sim", tmp_path / "<b>bold&amp;")
    for number in range(4):
        record = StageRecord.read(path / f"stage{number}")
        names = [evil, *record.class_names[1:]]
        record.model_copy(update={"class_names": names}).write(path / f"stage{number}")
    page = tmp_path / "report.html"
    said("report", path, "--to", page)
    browser.events.clear()
    browser.open_report(page)
    assert browser.evaluate("document.title") == "<b>bold&amp;, greedy report"
    assert browser.evaluate("document.querySelector('h1').textContent") == "<b>bold&amp;"
    assert evil in browser.evaluate("document.body.textContent")
    assert complaints(browser) == []
