"""The page in a real browser: each control and state, by mouse and by keyboard, at three widths; axe finds no fault."""

import json
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playing import playground
from playwright.sync_api import Page, expect, sync_playwright
from serving import Running, endless

import lora_lite as ll
from lora_lite.play.playground import Playground

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WIDTHS = {390: 844, 820: 1180, 1440: 900}
NEEDED = "Debian's Chromium is not on this machine: apt-get install chromium"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason=NEEDED)]
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running(tiny_chat: str) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        running = Running(playground(tiny_chat), patch)
        yield running
        running.stop()


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Page]:
    """The page, opened. Afterwards: nothing was logged as an error, and nothing was asked of another host."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    errors: list[str] = []
    urls: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: urls.append(request.url))
    visit(page, running)
    yield page
    context.close()
    for entry in httpx.get(f"{running.address}api/state").json()["adapters"]:  # on the thread that owns the model
        httpx.post(f"{running.address}api/remove", json={"adapter": entry["id"]})
    refusals = "Failed to load resource: the server responded with a status of 4"
    assert not [error for error in errors if not error.startswith((refusals, "Failed to load resource: net::"))]
    own = (running.address, "data:", f"blob:{running.address.rstrip('/')}")
    assert not [url for url in urls if not url.startswith(own)]


def visit(page: Page, running: Running, fragment: str = "") -> None:
    page.goto("about:blank")
    page.goto(f"{running.address}{fragment}")
    expect(page.locator("body[data-ready]")).to_be_attached()


def fit(page: Page, preset: str = "Formal / casual") -> None:
    page.get_by_label("Preset").select_option(preset)
    page.get_by_role("button", name="Fit", exact=True).click()
    expect(page.get_by_role("heading", name=preset)).to_be_visible()
    expect(page.locator("#progress")).to_be_hidden()


def measured(page: Page) -> None:
    """All figures of the adapters are there."""
    expect(page.locator("#cards")).not_to_contain_text("measuring")
    expect(page.locator("#damage-text")).to_contain_text("nats a token")


def write(page: Page) -> None:
    page.get_by_role("button", name="Write").click()
    done(page)


def done(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Done")


def swept(page: Page, count: int) -> None:
    expect(page.locator("#sweep-rows .figures", has_text="nats a token")).to_have_count(count)


def mapped(page: Page) -> None:
    expect(page.locator("#map-table button:enabled")).to_have_count(12)


def text(page: Page, column: str) -> str:
    return page.locator(f"#t-{column}").inner_text()


def no_fault(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


# ---- each control -----------------------------------------------------------------------------------


def test_it_opens_empty_and_says_what_to_do(page: Page) -> None:
    expect(page).to_have_title("lora-lite play")
    expect(page.locator("#model")).to_contain_text("tiny, 2 blocks, float32")
    expect(page.locator("#none")).to_be_visible()
    expect(page.locator("#damage")).to_be_hidden()
    expect(page.get_by_role("button", name="Sweep")).to_be_hidden()
    options = page.get_by_label("Preset").locator("option").all_inner_texts()
    assert options == ["My own", "French / English", "Formal / casual", "Terse / wordy", "Past / present"]
    write(page)
    assert text(page, "base").split("[")[0] == text(page, "adapted").split("[")[0] != ""


def test_columns_colours_and_the_strip(page: Page) -> None:
    fit(page)
    page.get_by_label("Scale of Formal / casual, as a number").fill("2")
    page.get_by_label("Scale of Formal / casual, as a number").blur()
    page.get_by_label("Tokens").fill("12")
    write(page)
    tokens = page.locator("#t-adapted .k")
    expect(tokens).to_have_count(12)
    assert "KL" in (tokens.first.get_attribute("title") or "")
    levels = {(token.get_attribute("class") or "")[-2:] for token in tokens.all()}
    assert levels - {"k0"}
    expect(page.locator("#t-base .k")).to_have_count(0)
    expect(page.locator("#strip i.answer")).to_have_count(12)
    page.get_by_text("As a table").click()
    expect(page.locator("#kl-table tbody tr")).to_have_count(page.locator("#strip i").count())
    expect(page.locator("#strip-text")).to_contain_text("Most at")
    thickness = "e => getComputedStyle(e).textDecorationThickness"
    assert page.locator(".legend .k4").evaluate(thickness) == "4px"  # not by colour alone
    assert page.locator(".legend .k1").evaluate(thickness) == "1px"


def test_the_slider_is_live_and_has_its_budget(page: Page) -> None:
    fit(page)
    measured(page)
    slider = page.get_by_role("slider", name="Scale of Formal / casual")
    expect(page.locator(".tick")).to_have_count(2)
    expect(page.locator("#cards")).to_contain_text(re.compile(r"Budget of 0\.1 nats: c = −.*, c = "))
    expect(page.locator("#cards")).to_contain_text(re.compile(r"Effect on lines it hasn’t seen: [+−]?\d"))
    write(page)
    before = text(page, "adapted")
    slider.fill("2")
    expect(page.locator("#t-adapted")).not_to_have_text(before)
    done(page)
    measured(page)
    expect(page.locator("#meter.over")).to_be_visible()
    expect(page.locator("#damage-text")).to_contain_text("times the budget")
    assert float(page.get_by_role("meter").get_attribute("aria-valuenow") or 0) > 0.1
    page.get_by_role("button", name="Set to the budget").click()
    measured(page)
    expect(page.locator("#meter.over")).to_have_count(0)
    budget = float(slider.input_value())
    assert 0 < budget < 2
    page.get_by_label("Budget").fill("0.01")
    page.get_by_label("Budget").blur()
    measured(page)
    page.get_by_role("button", name="Set to the budget").click()
    assert 0 < float(slider.input_value()) < budget
    page.get_by_label("again when a slider moves").uncheck()
    done(page)
    before = text(page, "adapted")
    slider.fill("-2")
    measured(page)
    assert text(page, "adapted") == before


def test_two_adapters_have_one_damage(page: Page) -> None:
    fit(page)
    fit(page, "Past / present")
    measured(page)
    assert page.locator(".card").count() == 2
    alone = page.locator(".facts p:first-child").all_inner_texts()
    together = float(re.search(r"[\d.]+", page.locator("#damage-text").inner_text())[0])  # type: ignore[index]
    assert together >= min(float(re.search(r"[\d.]+", line)[0]) for line in alone)  # type: ignore[index]


def test_a_system_prompt_stands_beside_it(page: Page) -> None:
    expect(page.locator("#a-system")).to_be_hidden()
    fit(page)
    page.get_by_text("Compare with a system prompt").click()
    page.get_by_label("System prompt, of the base alone").fill("Speak like a sailor.")
    write(page)
    assert text(page, "system") != text(page, "base")
    expect(page.locator("#f-system")).to_contain_text(re.compile(r"Damage [\d.]+ nats, effect [+−]?[\d.]+"))
    expect(page.locator("#f-adapted")).to_contain_text(re.compile(r"Damage [\d.]+ nats, effect [+−]?[\d.]+"))
    expect(page.locator("#system-figures")).to_contain_text("at the same tokens")
    page.get_by_label("System prompt, of the base alone").fill("")
    write(page)
    expect(page.locator("#a-system")).to_be_hidden()


def test_a_sweep_has_a_row_for_each_scale(page: Page) -> None:
    fit(page)
    page.get_by_text("Sweep one scale").click()
    page.get_by_label("From", exact=True).fill("-2")
    page.get_by_label("To", exact=True).fill("2")
    page.get_by_label("Steps").fill("3")
    page.get_by_label("Tokens").fill("6")
    page.get_by_role("button", name="Sweep").click()
    swept(page, 3)
    rows = page.locator("#sweep-rows .figures").all_inner_texts()
    assert [row.split(",")[0] for row in rows] == ["c = −2", "c = 0", "c = 2"]
    assert "KL 0 nats" in rows[1]


def test_the_map_is_walked_by_arrows_and_fits_on_a_click(page: Page) -> None:
    fit(page)
    page.get_by_role("button", name="Draw the map").click()
    mapped(page)
    cells = page.locator("#map-table button")
    assert cells.count() == 12
    label = cells.first.get_attribute("aria-label") or ""
    assert re.fullmatch(r"block 0, c = −1: effect [+−]?[\d.e-]+, KL [\d.]+(, over the budget)?", label)
    assert page.locator("#map-table button[tabindex='0']").count() == 1
    page.locator("#map-table button[tabindex='0']").focus()
    there, walked = page.locator("#map-table button:focus"), []
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowRight"):  # the second leads nowhere
        page.keyboard.press(key)
        walked.append((there.get_attribute("aria-label") or "").partition(":")[0])
    cells_walked = [(0, "−1"), (0, "−1"), (0, "−0.5"), (1, "−0.5"), (1, "−1"), (1, "−0.5")]
    assert walked == [f"block {block}, c = {c}" for block, c in cells_walked]
    name = there.get_attribute("aria-label") or ""
    page.keyboard.press("Enter")
    layer, c = re.match(r"block (\d), c = ([−\d.]+)", name).groups()  # type: ignore[union-attr]
    expect(page.locator(".card .says")).to_have_text(f"steer, block {layer}")
    assert float(page.get_by_role("slider").input_value()) == float(c.replace("−", "-"))
    assert page.get_by_label("Block", exact=True).input_value() == layer


def test_an_ablation_and_the_other_direction(page: Page) -> None:
    page.get_by_label("Method").select_option("Ablation")
    page.get_by_label("Direction").select_option("Principal, of pairs")
    page.get_by_label("Block", exact=True).fill("0")
    fit(page)
    expect(page.locator(".card .says")).to_have_text("abliteration, the direction of block 0")


@pytest.mark.parametrize(("format", "ending"), [("lora-lite file", "safetensors"), ("GGUF control vector", "gguf")])
def test_it_saves(format: str, ending: str, page: Page, tiny_chat: str, tmp_path: Path) -> None:
    page.get_by_label("Block", exact=True).fill("1")  # llama.cpp has no place for a vector at block 0
    fit(page)
    measured(page)
    page.get_by_text("Save, rename, remove").click()
    page.get_by_label("Format").select_option(format)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == f"formal-casual.{ending}"
    download.value.save_as(tmp_path / f"a.{ending}")
    assert ll.load(ll.load_base(tiny_chat, "float32"), tmp_path / f"a.{ending}").variant == "steer"


def test_it_saves_a_folder_or_says_why_not(page: Page, tmp_path: Path) -> None:
    page.get_by_label("Method").select_option("Ablation")
    fit(page)
    measured(page)
    page.get_by_text("Save, rename, remove").click()
    page.get_by_label("Format").select_option("PEFT folder (zip)")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_contain_text("rank=")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator("#problem")).to_be_hidden()
    page.get_by_label("As a LoRA of rank").fill("1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path / "a.zip")
    assert len(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == 2


def test_names_change_and_adapters_go(page: Page, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    original = running.play.rename

    def slow(name: str, label: str) -> None:
        time.sleep(0.6)  # the address is written in between, with the old name
        original(name, label)

    monkeypatch.setattr(running.play, "rename", slow)
    fit(page)
    measured(page)
    page.get_by_text("Save, rename, remove").click()
    page.locator(".card").get_by_label("Name").fill("Sir ")
    page.get_by_role("button", name="Rename").click()
    expect(page.get_by_role("heading", name="Sir")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "h-adapters"
    expect(page.locator("#status")).to_have_text("Renamed to Sir.")
    expect(page).to_have_url(re.compile("c=%7B%22Sir%22"))  # the address has the new name
    page.get_by_text("Save, rename, remove").click()
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#none")).to_be_visible()
    expect(page.locator(".card")).to_have_count(0)


# ---- keys, links, errors ----------------------------------------------------------------------------


def test_it_works_by_keys_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    names: list[str] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
        if names[-1] == "map-go":
            break
    wanted = ["copy", "prompt", "temperature", "seed", "tokens", "write", "stop", "live", "preset", "label", "method"]
    wanted += ["direction", "layer", "positive", "negative", "fit-go", "map-go"]
    assert [name for name in names if name in wanted] == wanted
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.get_by_label("Tokens").fill("200")
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("write a shorter prompt, or ask for fewer tokens")
    page.get_by_label("Tokens").fill("64")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#strip i.answer").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_a_link_opens_the_same_page_and_fits_on_a_click_alone(page: Page, running: Running) -> None:
    page.get_by_label("Prompt", exact=True).fill("Sing of a # & a %.")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_text("Compare with a system prompt").click()
    page.get_by_label("System prompt, of the base alone").fill("Be brief.")
    page.get_by_label("More like this").fill("One day.\nTwo days.\nThree days.\nFour days.")
    page.get_by_label("Less like this").fill("One year.\nTwo years.\nThree years.\nFour years.")
    page.locator("#label").fill("Days")
    page.get_by_label("Block", exact=True).fill("1")
    page.get_by_role("button", name="Fit", exact=True).click()
    page.get_by_label("Scale of Days, as a number").fill("-1.25")
    page.get_by_label("Scale of Days, as a number").blur()
    page.get_by_role("button", name="Copy link").click()
    fragment = page.evaluate("location.hash")
    assert parse_qs(fragment[1:])["c"] == [json.dumps({"Days": -1.25}, separators=(",", ":"))]
    httpx.post(f"{running.address}api/remove", json={"adapter": next(iter(running.play.entries))})
    visit(page, running, fragment)
    expect(page.locator("#status")).to_contain_text("This link has sentences for Days: press Fit to make it.")
    assert page.locator(".card").count() == 0
    assert page.get_by_label("Prompt", exact=True).input_value() == "Sing of a # & a %."
    fields = {"#seed": "5", "#temperature": "0.7", "#system": "Be brief.", "#label": "Days", "#layer": "1"}
    assert {field: page.locator(field).input_value() for field in fields} == fields
    assert page.get_by_label("Less like this").input_value().splitlines()[3] == "Four years."
    page.get_by_role("button", name="Fit", exact=True).click()
    expect(page.get_by_role("slider", name="Scale of Days")).to_have_value("-1.25")
    visit(page, running, "#c=%7Bbroken&p=still")
    expect(page.get_by_role("alert")).to_contain_text("The scales in this link can’t be read")
    assert page.get_by_label("Prompt", exact=True).input_value() == "still"
    visit(page, running, "#p=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&name=%3Cb%3Ex%3C%2Fb%3E")
    write(page)
    page.get_by_role("button", name="Fit", exact=True).click()
    expect(page.get_by_role("heading", name="<b>x</b>")).to_be_visible()
    assert page.locator("img, .card b").count() == 0


def test_errors_are_sentences(page: Page) -> None:
    page.get_by_label("More like this").fill("Only one.")
    page.get_by_role("button", name="Fit", exact=True).click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("the positive list has 1 sentences: wanted 2 to 200")
    expect(alert).to_be_in_viewport()  # also where the page was scrolled to its end
    page.get_by_label("More like this").fill("Same.\nSame.")
    page.get_by_label("Less like this").fill("Same.\nSame.")
    page.get_by_role("button", name="Fit", exact=True).click()
    expect(alert).to_contain_text("both sides have the same centre")
    page.get_by_role("button", name="Draw the map").click()
    expect(alert).to_contain_text("write four lines or more on each side")
    page.get_by_label("Prompt", exact=True).fill("word " * 790)
    page.get_by_role("button", name="Write").click()
    expect(alert).to_contain_text("wanted 1 to 512. write a shorter one")
    no_fault(page)


def test_a_server_that_has_gone(browser: Any, tiny_chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Running(playground(tiny_chat), monkeypatch)
    page = browser.new_page()
    visit(page, own)
    closed = threading.Event()
    monkeypatch.setattr(own.play, "write", lambda *given, **options: endless(closed))
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#strip i").first).to_be_visible()
    own.stop()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server doesn’t answer.")  # in the middle of a text
    assert closed.is_set()
    page.get_by_role("button", name="Dismiss").click()
    page.get_by_role("button", name="Write").click()
    expect(alert).to_contain_text("The server doesn’t answer.")
    page.close()


# ---- what it looks like -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_scheme(width: int, scheme: Any, page: Page) -> None:
    page.set_viewport_size({"width": width, "height": WIDTHS[width]})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    no_fault(page)
    fit(page)
    measured(page)
    page.get_by_role("slider").fill("2")
    page.get_by_text("Compare with a system prompt").click()
    page.get_by_label("System prompt, of the base alone").fill("Speak like a sailor.")
    page.get_by_label("Tokens").fill("16")
    write(page)
    for summary in ("As a table", "Sweep one scale", "Save, rename, remove"):
        page.get_by_text(summary).click()
    page.get_by_role("button", name="Sweep", exact=True).click()
    swept(page, 5)
    page.get_by_role("button", name="Draw the map").click()
    mapped(page)
    measured(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    no_fault(page)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_first_token_of_the_real_model(browser: Any, smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure, not a bound: it depends on the machine and what else runs on it."""
    from transformers import AutoTokenizer

    play = Playground(ll.load_base(smollm2), AutoTokenizer.from_pretrained(smollm2), "SmolLM2")
    running, page = Running(play, monkeypatch), browser.new_page()
    visit(page, running)
    fit(page)
    page.get_by_label("Tokens").fill("8")
    milliseconds = []
    for _ in range(5):
        page.get_by_role("button", name="Write").click()
        done(page)
        milliseconds.append(int(page.evaluate("document.body.dataset.first")))
        page.evaluate("document.getElementById('status').textContent = ''")
    print(f"\nfrom the click to the first token of both columns, ms: {milliseconds}", end="")
    assert text(page, "base")
    page.close()
    running.stop()


# ---- states that cross ------------------------------------------------------------------------------


def move(page: Page, label: str, c: float) -> None:
    field = page.get_by_label(f"Scale of {label}, as a number")
    field.fill(str(c))
    field.blur()


def test_a_cell_fits_what_the_map_was_drawn_of(page: Page, running: Running) -> None:
    page.get_by_label("Preset").select_option("French / English")
    lines = page.get_by_label("More like this").input_value().splitlines()
    page.get_by_role("button", name="Draw the map").click()
    mapped(page)
    expect(page.locator("#map-of")).to_have_text("Of French / English: steering vector, mean difference.")
    page.get_by_label("Preset").select_option("Formal / casual")
    page.get_by_label("Method").select_option("Ablation")
    page.locator("#map-table button").first.click()
    expect(page.locator(".card h3 span").first).to_have_text("French / English")
    (entry,) = running.play.entries.values()
    assert entry.recipe is not None
    assert (entry.label, entry.recipe.method, entry.recipe.layer) == ("French / English", "steer", 0)
    assert list(entry.recipe.lines.positive) == lines
    expect(page.get_by_role("slider")).to_have_value("-1")
    assert page.get_by_label("Method").input_value() == "abliteration"  # the form stays as it was written


def test_the_map_is_hatched_by_the_budget_of_now(page: Page) -> None:
    fit(page)
    measured(page)
    page.get_by_role("button", name="Draw the map").click()
    mapped(page)
    hatched = page.locator("#map-table button.over")
    for budget, count in (("0.001", 12), ("10", 0)):
        page.locator("#budget").fill(budget)
        page.locator("#budget").blur()
        expect(hatched).to_have_count(count)
        assert page.locator("#map-table button[aria-label*='over the budget']").count() == count


def test_a_fit_that_was_given_up_after_it_was_put_on(
    page: Page, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(page)
    measured(page)
    original, put_on = running.play.fit, threading.Event()

    def silent(*given: Any) -> Iterator[dict[str, Any] | None]:
        for event in original(*given):
            if event is not None and event["kind"] == "fitted":
                put_on.set()
                while True:
                    time.sleep(0.01)
                    yield None
            yield event

    for given_up in ("page.keyboard", "another fit"):
        put_on.clear()
        monkeypatch.setattr(running.play, "fit", silent)
        page.get_by_role("button", name="Fit", exact=True).click()
        assert put_on.wait(20)
        monkeypatch.setattr(running.play, "fit", original)
        if given_up == "page.keyboard":
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Fit", exact=True).click()
        expect(page.locator("#status")).to_contain_text("Fitted")
        expect(page.get_by_role("alert")).to_be_hidden()
        measured(page)
        cards = page.locator(".card").evaluate_all("cards => cards.map((card) => card.id.slice(5))")
        assert cards == list(running.play.entries)
        assert len(cards) == 1
        page.evaluate("document.getElementById('status').textContent = ''")


def test_an_adapter_that_another_tab_took_away_goes_here_too(page: Page, running: Running) -> None:
    fit(page)
    measured(page)
    httpx.post(f"{running.address}api/remove", json={"adapter": next(iter(running.play.entries))})
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("alert")).to_contain_text("this adapter is not on the page any more")
    expect(page.locator(".card")).to_have_count(0)
    write(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_progress_is_of_the_last_fit(page: Page, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()
    monkeypatch.setattr(running.play, "fit", lambda *given: endless(closed))
    for _ in range(2):
        page.get_by_role("button", name="Fit", exact=True).click()
        expect(page.locator("#progress")).to_be_visible()
    assert closed.wait(20)
    page.wait_for_timeout(200)
    expect(page.locator("#progress")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#progress")).to_be_hidden()


def test_a_system_prompt_is_measured_on_the_lines_of_the_fit_that_is_on(page: Page) -> None:
    fit(page)
    fit(page, "Past / present")
    measured(page)
    move(page, "Formal / casual", 0)
    page.get_by_text("Compare with a system prompt").click()
    page.get_by_label("System prompt, of the base alone").fill("Speak like a sailor.")
    for column in ("#f-system", "#f-adapted"):
        expect(page.locator(column)).to_contain_text(re.compile(r"effect [+−]?[\d.]+ on Past / present"))
    move(page, "Past / present", 0)
    expect(page.locator("#f-system")).to_contain_text("Damage")
    expect(page.locator("#f-system")).not_to_contain_text("effect")
    move(page, "Formal / casual", 1)
    for column in ("#f-system", "#f-adapted"):
        expect(page.locator(column)).to_contain_text(re.compile(r"effect [+−]?[\d.]+ on Formal / casual"))
    expect(page.locator("#system-figures")).to_contain_text("the lines that Formal / casual hasn’t seen")
    move(page, "Past / present", 1)  # of two that are on, neither is shown
    expect(page.locator("#f-system")).not_to_contain_text("effect")
    expect(page.locator("#f-adapted")).to_contain_text("Damage")
    expect(page.locator("#f-adapted")).not_to_contain_text("effect")


def test_a_budget_that_is_not_reached_moves_nothing(page: Page, running: Running) -> None:
    visit(page, running, "#b=10")
    fit(page)
    measured(page)
    expect(page.locator("#status")).to_have_text("Formal / casual, budget of 10 nats: not reached at c = 2.")
    assert page.get_by_role("slider").input_value() == "0.5"


def test_a_link_keeps_the_scale_that_a_slider_starts_at(page: Page, running: Running) -> None:
    fit(page)
    measured(page)
    move(page, "Formal / casual", 0.5)
    page.get_by_role("button", name="Copy link").click()
    visit(page, running, page.evaluate("location.hash"))
    measured(page)
    expect(page.locator("body[data-measured]")).to_be_attached()
    assert page.get_by_role("slider").input_value() == "0.5"
    page.get_by_role("button", name="Fit", exact=True).click()  # again, under the same name
    expect(page.locator("#status")).to_contain_text("Fitted")
    measured(page)
    assert page.get_by_role("slider").input_value() == "0.5"


def test_an_unknown_damage_is_no_number(page: Page, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(scales: dict[str, float], target: float) -> Iterator[dict[str, Any]]:
        yield {"kind": "damage", "kl": None}
        for name in scales:
            yield {"kind": "curve", "adapter": name, "points": [[1.0, None]]}

    monkeypatch.setattr(running.play, "measure", overflowing)
    fit(page)
    slider = page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuetext", "0.5, damage not measured")
    move(page, "Formal / casual", 1)
    expect(slider).to_have_attribute("aria-valuetext", "1, damage too large to measure")
    expect(page.locator(".facts")).to_contain_text("Damage alone: too large to measure.")
    expect(page.locator("#damage-text")).to_have_text("Too large to measure, over the budget.")
    expect(page.locator("#f-adapted")).to_have_text("Damage too large to measure")


def test_the_damage_of_another_scale_is_not_shown(
    page: Page, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, let_go = threading.Event(), threading.Event()

    def late(scales: dict[str, float], target: float) -> Iterator[dict[str, Any] | None]:
        if 1.0 in scales.values():
            asked.set()
            while not let_go.wait(0.01):
                yield None
            yield {"kind": "damage", "kl": 3.21}

    fit(page)
    measured(page)
    monkeypatch.setattr(running.play, "measure", late)
    move(page, "Formal / casual", 1)
    assert asked.wait(20)
    page.evaluate("""() => {
        const line = document.getElementById("damage-text");
        window.seen = [];
        new MutationObserver(() => window.seen.push(line.textContent)).observe(line, { childList: true });
    }""")
    move(page, "Formal / casual", 0.3)
    let_go.set()
    page.wait_for_timeout(600)
    seen = page.evaluate("window.seen")
    assert seen
    assert not [line for line in seen if "3.21" in line]


def test_an_error_outlives_the_rewrite_of_a_slider(
    page: Page, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(scales: dict[str, float], target: float) -> Iterator[dict[str, Any]]:
        raise ll.ConfigError("no figures today")
        yield {}

    fit(page)
    measured(page)
    write(page)
    before = text(page, "adapted")
    monkeypatch.setattr(running.play, "measure", refused)
    move(page, "Formal / casual", 2.5)
    expect(page.locator("#t-adapted")).not_to_have_text(before)
    done(page)
    expect(page.get_by_role("alert")).to_contain_text("no figures today")
    expect(page.locator(".facts")).to_contain_text("Damage alone: not measured.")
    expect(page.locator(".facts")).not_to_contain_text("measuring")
    expect(page.locator("#damage-text")).to_have_text("Not measured.")
    monkeypatch.undo()
    move(page, "Formal / casual", 1)  # a measurement that works takes its own error away
    measured(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    for typed, taken in (("20", "10"), ("0", "0.1"), ("0.0001", "0.001")):
        page.locator("#budget").fill(typed)
        page.locator("#budget").blur()
        expect(page.locator("#budget")).to_have_value(taken)


def test_a_scale_beyond_the_curve_beside_another_is_not_measured(page: Page) -> None:
    fit(page)
    fit(page, "Past / present")
    measured(page)
    move(page, "Formal / casual", 5)
    expect(page.locator(".facts").first).to_contain_text("Damage alone: not measured.")
    measured(page)


def test_a_number_under_the_hand_is_left_alone(page: Page) -> None:
    fit(page)
    field = page.get_by_label("Scale of Formal / casual, as a number")
    measured(page)
    field.fill("1.5")
    page.evaluate("document.getElementById('budget').dispatchEvent(new Event('change'))")  # all is measured again
    measured(page)
    page.wait_for_timeout(300)
    field.blur()
    expect(page.get_by_role("slider")).to_have_value("1.5")
    field.fill("9")
    page.keyboard.press("Enter")
    expect(field).to_have_value("8")


def test_a_click_takes_the_place_of_the_rewrite_that_a_slider_asked_for(page: Page) -> None:
    fit(page)
    measured(page)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/api/write") else None)
    write(page)
    page.evaluate("""() => {  // both within the time that a rewrite waits
        const field = document.querySelector(".card input[type=number]");
        field.value = 1.5;
        field.dispatchEvent(new Event("change"));
        document.getElementById("write").click();
    }""")
    done(page)
    page.wait_for_timeout(600)
    assert len(asked) == 2
    page.evaluate("""() => {
        const field = document.querySelector(".card input[type=number]");
        field.value = 1;
        field.dispatchEvent(new Event("change"));
        document.getElementById("stop").click();
    }""")
    page.wait_for_timeout(600)
    assert len(asked) == 2
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_done_is_said_when_the_table_is_there(page: Page, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    original, let_go = running.play.write, threading.Event()

    def lingering(*given: Any, **options: Any) -> Iterator[dict[str, Any] | None]:
        yield from original(*given, **options)
        while not let_go.wait(0.01):
            yield None

    monkeypatch.setattr(running.play, "write", lingering)
    page.get_by_role("button", name="Write").click()
    try:
        done(page)  # however long the server holds the connection after the last event
        assert page.locator("#kl-table tbody tr").count() == page.locator("#strip i").count() > 5
        page.keyboard.press("Escape")
        expect(page.locator("#t-adapted .end")).to_have_text("[cut at the limit]")
    finally:
        let_go.set()


def test_the_table_is_of_the_text_that_is_shown(page: Page) -> None:
    page.get_by_label("Tokens").fill("4")
    write(page)
    page.get_by_text("As a table").click()
    rows, bars = page.locator("#kl-table tbody tr"), page.locator("#strip i")
    page.get_by_label("Prompt", exact=True).fill("Another one, which is longer.")
    page.get_by_label("Tokens").fill("64")
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#strip i.answer").nth(5)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(rows).to_have_count(bars.count())
    assert page.locator("#strip i.answer").count() > 5


def test_a_link_that_is_pasted_into_the_same_tab_opens(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("Mine.")
    page.evaluate("window.kept = true")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")  # a place on the page is no link to another
    page.get_by_role("link", name="below").click()
    page.wait_for_timeout(300)
    assert page.evaluate("window.kept")
    page.evaluate("location.hash = 'p=Another.'")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Another.")


def test_a_link_tells_files_from_fits(page: Page, running: Running) -> None:
    visit(page, running, "#c=%7B%22my-lora%22:1,%22Terse / wordy%22:0.4%7D&set=Terse %2F wordy")
    expect(page.locator("#status")).to_have_text(
        "This link has sentences for Terse / wordy: press Fit to make it. It has a scale of my-lora too, "
        "which isn’t on this page."
    )


def test_a_long_name_leaves_room(page: Page) -> None:
    page.locator("#label").fill("A rather long name of forty letters, all")
    page.get_by_role("button", name="Fit", exact=True).click()
    expect(page.locator(".card .says")).to_have_text(re.compile("steer, block"))
    says = page.locator(".card .says").bounding_box()
    assert says is not None
    assert says["height"] < 30
