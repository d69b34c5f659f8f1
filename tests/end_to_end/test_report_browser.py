"""The page of a run in a real headless Chromium: light, dark, and on a phone."""

import shutil

import pytest
import torch
from reference.tiny_run import make_run, make_words_run, write_record

import polyak
from polyak.reference_run.flatness import measure_landscape
from polyak.reference_run.run import Run
from polyak.report.page import write_report
from polyak.report.search import write_search

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    write_record(folder)
    measure_landscape(Run(folder))
    return write_report(folder)


@pytest.fixture(scope="module")
def words_report(tmp_path_factory):
    return write_report(make_words_run(tmp_path_factory.mktemp("runs") / "words"))


@pytest.fixture
def opened(browser, report, request):
    scheme, width = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    seen = {"console": [], "requests": []}
    page.on("console", lambda message: seen["console"].append(message.text))
    page.on("pageerror", lambda error: seen["console"].append(str(error)))
    page.on("request", lambda sent: seen["requests"].append(sent.url))
    page.goto(report.as_uri())
    yield page, seen
    page.close()


def views(*pairs):
    return pytest.mark.parametrize("opened", pairs, indirect=True, ids=str)


@views(("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390))
def test_quiet_and_as_wide_as_the_screen(opened, report):
    page, seen = opened
    assert seen == {"console": [], "requests": [report.as_uri()]}
    width, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= screen
    boxes = page.eval_on_selector_all(
        ".pictures svg, .hero svg", "all => all.map(svg => svg.getBoundingClientRect().toJSON())"
    )
    boxes = [
        box for box in boxes if box["width"]
    ]  # the first picture is drawn for narrow screens too
    assert len(boxes) == 25
    assert all(box["width"] > 250 and box["height"] > 100 for box in boxes)
    assert all(box["left"] >= 0 and box["right"] <= screen for box in boxes)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_no_box_is_wider_than_its_place_unless_it_shows_that_it_scrolls(
    browser, report, words_report, scheme, width
):
    from matplotlib.image import imread

    for address in (report, words_report):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(address.as_uri())
        wide = page.evaluate(
            """() => [...document.querySelectorAll('main *:not(svg *)')]
                .filter(box => box.getClientRects().length && box.scrollWidth > box.clientWidth + 1)
                .filter(box => getComputedStyle(box).display !== 'inline').map(box => box.className || box.tagName)"""
        )
        if width == 1280:
            assert wide == []
        assert {*wide} <= {"scroll"}
        assert page.locator("th .unit").count() > 4
        for at in range(wide.count("scroll")):
            path = address.parent / "table.png"
            page.locator(".scroll").nth(at).screenshot(path=path)
            paper, *_, edge = imread(path)[2, 200:, :3].mean(axis=-1)  # above the words
            assert abs(edge - paper) > 0.08  # a shade, where more of the table is
        page.close()


def luminance(colour):
    channels = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@views(("light", 1200), ("dark", 1200))
def test_text_and_the_lines_of_the_pictures_stand_out(opened):
    page, _ = opened
    paper, *inks = page.evaluate(
        """() => {
            const style = (element) => getComputedStyle(element);
            return [
                style(document.body).backgroundColor,
                ...[...document.querySelectorAll('p, td, h1, h2, figcaption')].map(e => style(e).color),
                ...[...document.querySelectorAll('svg *')].map(e => style(e).fill)
                    .filter(fill => fill === style(document.body).color),
            ]
        }"""
    )
    light, dark = luminance("rgb(255, 255, 255)"), luminance(paper)
    assert (dark < 0.05) == (page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches"))
    assert len(inks) > 100  # among them the text of the pictures, which follows the page
    for ink in inks:
        low, high = sorted([luminance(ink), dark])
        assert (high + 0.05) / (low + 0.05) > 4.5, (ink, paper, light)


@views(("dark", 1200))
def test_a_screenshot_is_not_blank(opened, tmp_path):
    page, _ = opened
    from matplotlib.image import imread

    page.screenshot(path=tmp_path / "page.png", full_page=True)
    pixels = imread(tmp_path / "page.png")
    assert pixels.shape[0] > 3000
    assert pixels[..., :3].std() > 0.05


@pytest.fixture(scope="module")
def search_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    model = torch.nn.Linear(2, 1)
    with polyak.Recorder(model, folder / "record", interval=10, captures=5) as recorder:
        for step in range(160):
            torch.nn.init.constant_(model.weight, step)
            recorder.update()
    trajectory = polyak.Trajectory(folder / "record")

    def val_loss(state):
        return (state["weight"][0, 0] - 80).abs() + torch.arange(50) / 50

    options = {"families": ("windows", "half-lives"), "cache": False}
    found = trajectory.search(val_loss, **options), trajectory.stop(val_loss, cache=False)
    return write_search(found, folder / "page.html"), found[0]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_page_of_a_search_and_its_slider(browser, search_page, scheme, width):
    path, found = search_page
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, requests = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".pictures svg").count() == 3
    box = page.locator(".slider").first
    assert "the best" in box.locator("output").inner_text()
    last = box.locator("input").get_attribute("max")
    seen = set()
    for at in range(int(last) + 1):
        box.locator("input").fill(str(at))
        seen.add(box.locator("output").inner_text())
        inside = box.locator(".span").bounding_box()
        track = box.locator(".track").bounding_box()
        assert inside["width"] > 0
        assert track["x"] - 1 <= inside["x"]
        assert inside["x"] + inside["width"] <= track["x"] + track["width"] + 1
    windows = [one for one in found.scored if one.start is not None]
    assert len(seen) == len(windows)
    assert any(f"score {found.best.score:.5g}" in text for text in seen)
    assert (said, requests) == ([], [path.as_uri()])
    page.close()
