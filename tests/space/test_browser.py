"""The page in a real browser: Debian's Chromium, the real command, a Hub stand-in on loopback.

Screenshots go to $SPACE_SCREENSHOTS, to be looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub_stand_in import HubStandIn

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]

CHROMIUM = "/usr/bin/chromium"
WIDTHS = {"desktop": 1280, "phone": 390}
COMMAND = "from mergekit_unconstrained.cli import main; main()"
SLOW = 120_000
NAMELESS = """() => [...document.querySelectorAll(
    "input, textarea, select, button, [role=textbox], [role=slider]")]
  .filter(e => e.offsetParent)
  .filter(e => !((e.labels && e.labels.length && e.labels[0].innerText.trim())
    || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
    || e.innerText.trim() || e.title))
  .map(e => e.outerHTML.slice(0, 200))"""
SCRIPT = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


@dataclass
class Served:
    """A running page, the Hub behind it, and everything the server has said."""

    url: str
    hub: HubStandIn
    log: Path
    work: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def served(tmp_path_factory, models_dir) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("browser")
    log, work = folder / "log.txt", folder / "work"
    (folder / "secret").mkdir()
    shutil.copytree(models_dir / "llama/base", folder / "secret" / "model")
    (models_dir / "linked").symlink_to(folder / "secret" / "model")
    (models_dir / SCRIPT.replace("/", "")[:60]).mkdir()
    with HubStandIn(folder / "hub") as hub, log.open("wb") as out:
        hub.put_folder("acme/qwen-math", models_dir / "qwen2/expert1")
        hub.put_folder("acme/qwen-code", models_dir / "qwen2/expert2")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = ["--work-dir", str(work), "--models-dir", str(models_dir)]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "space", "--port", str(port), *places],
            env={**os.environ, **hub.environment(folder / "home")},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(lambda: answers(port), process, log)
            yield Served(f"http://127.0.0.1:{port}/", hub, log, work, process)
        finally:
            process.terminate()
            process.wait(30)
            (models_dir / "linked").unlink()


def wait_for(ready: Callable[[], bool], process: Any, log: Path) -> None:
    for _ in range(600):
        if ready():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.fail("Chromium is missing: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, served) -> Iterator[Callable[..., Any]]:
    opened = []

    def at(width: str = "desktop") -> Any:
        context = chromium.new_context(viewport={"width": WIDTHS[width], "height": 900})
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.goto(served.url)
        page.wait_for_selector("#experts input")
        page.wait_for_timeout(1500)
        opened.append(context)
        return page

    yield at
    for context in opened:
        context.close()


def choose(page: Any, base: str, *experts: str) -> None:
    page.fill("#base input", base)
    page.keyboard.press("Enter")
    for name in experts:
        page.fill("#experts input", name)
        page.keyboard.press("Enter")
        page.wait_for_timeout(400)
    page.keyboard.press("Tab")


def recipe(page: Any) -> dict[str, Any]:
    """The recipe that is shown."""
    found = yaml.safe_load(page.inner_text("#recipe .cm-content"))
    return found if isinstance(found, dict) else {}


def last_attention(page: Any) -> float | None:
    """The weight of llama/expert1 in the attention of the last layer, where a table says it."""
    text = recipe(page).get("parameters", {}).get("coefficients")
    table = yaml.safe_load(text) if text else {}
    layers = table.get("experts", {}).get("llama/expert1", {}).get("layers", {})
    return layers[3]["attention"] if 3 in layers else None


def until(page: Any, ready: Callable[[], bool], what: str) -> None:
    for _ in range(SLOW // 250):
        if ready():
            return
        page.wait_for_timeout(250)
    raise AssertionError(f"{what}: {page.inner_text('body')}")


def picture(page: Any, name: str) -> None:
    """A screenshot for people, and that nothing stands out over the right edge."""
    folder = os.environ.get("SPACE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_from_two_parents_to_a_private_repository(open_page, served, width):
    page = open_page(width)
    picture(page, f"{width}-1-empty")
    choose(page, "llama/base", "llama/expert1", "llama/expert2")
    page.wait_for_selector("#verdict >> text=merged layer by layer")
    until(page, lambda: len(recipe(page).get("models", ())) == 2, "one expert is missing")
    assert "not legal advice" in page.inner_text("#verdict")
    page.wait_for_selector("#recipe-state >> text=Checked")
    assert [m["parameters"]["weight"] for m in recipe(page)["models"]] == [0.5, 0.5]

    page.wait_for_selector('[aria-label="range slider for llama/expert2: weight everywhere"]')

    # By keyboard alone: open the sliders, move one.
    opener = page.get_by_role("button", name="expert1: by depth and kind")
    opener.focus()
    page.keyboard.press("Enter")
    slider = page.get_by_label("range slider for attention, last (llama/expert1)")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    until(page, lambda: last_attention(page) == pytest.approx(0.7), "the recipe did not follow")
    assert page.locator("#heatmap img").get_attribute("alt").startswith("Weight of every expert")
    picture(page, f"{width}-2-weights")

    name = f"alice/{width}"
    page.fill("#repository input, #repository textarea", name)
    page.click("#merge-button")
    page.wait_for_selector("#progress >> text=Merged")
    page.wait_for_selector("#card >> text=merged into")
    assert "coefficients" in page.inner_text("#card")
    until(page, lambda: page.locator(f"#card >> text={name}").count() > 0, "no name in the card")
    kept = Path(page.inner_text("#progress code"))
    assert kept.parent == served.work / "results"
    page.get_by_role("button", name="Push").click()
    page.wait_for_selector("#pushed >> text=Pushed.")
    picture(page, f"{width}-3-pushed")
    assert page.evaluate(NAMELESS) == []

    assert served.hub.repo(name).private
    config = yaml.safe_load(served.hub.content(name, "mergekit_config.yml"))
    assert config["parameters"]["operator"] == "task_arithmetic"
    assert served.hub.content(name, "model.safetensors")
    assert b"layers: 4" in served.hub.content(name, "coefficients.yml")

    page.close()
    time.sleep(3)
    assert (kept / "model.safetensors").is_file()


def test_models_of_the_hub_are_found_and_looked_at_without_a_weight(open_page, served):
    page = open_page()
    page.fill("#search input, #search textarea", "qwen")
    page.click("#search-button")
    page.wait_for_selector("text=2 found")
    before = len(served.hub.requests)
    choose(page, "llama/base", "acme/qwen-math")
    page.wait_for_selector("#verdict >> text=cannot be merged; they can be fused")
    page.wait_for_selector("#recipe-state >> text=Checked")
    assert recipe(page)["merge_method"] == "distribution_fusion"
    assert page.locator("#merge-button").is_disabled()
    fetched = [r for r in served.hub.requests[before:] if r.path.endswith("model.safetensors")]
    assert fetched
    shadows = list((served.work / "shadows").rglob("model.safetensors"))
    assert shadows
    assert all(s.stat().st_blocks * 512 < 64 * 1024 for s in shadows)
    page.get_by_role("button", name="Commands for big ones").click()
    page.wait_for_timeout(800)
    assert "hf jobs uv run" in page.inner_text("body")
    picture(page, "desktop-4-fusion")


def test_a_mixture_asks_for_the_base_of_the_other_group(open_page, served):
    page = open_page()
    choose(page, "llama/base", "llama/expert1", "qwen2/expert1", "qwen2/expert2")
    page.wait_for_selector("#verdict >> text=choose it under")
    page.wait_for_selector("#bases input")
    page.fill("#bases input", "qwen2/base")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.wait_for_selector("#recipe-state >> text=Checked")
    assert recipe(page)["merge_method"] == "unconstrained"
    bases = {m["model"]: m.get("parameters", {}).get("base") for m in recipe(page)["models"]}
    assert bases["qwen2/expert2"] == "qwen2/base"
    assert "needs a look" in page.inner_text("#verdict")
    picture(page, "desktop-5-mixture")


@pytest.mark.parametrize(
    "name",
    ["../secret/model", "/etc", "linked", "~/x", SCRIPT, "x" * 300, "a/b+c/d", "$(touch pwned)"],
)
def test_hostile_names_are_refused_and_stay_text(open_page, served, name):
    page = open_page()
    choose(page, name, "llama/expert1")
    page.wait_for_selector("#verdict .mku-bad")
    told = page.inner_text("#verdict")
    assert re.search(r"no model's name|link|the limit|no folder|outside", told), told
    assert "pwned" not in page.title()
    assert page.locator("#verdict img, #verdict script").count() == 0
    assert page.locator("#merge-button").is_disabled()


def test_hostile_recipes_are_refused(open_page, served):
    page = open_page()
    page.get_by_role("button", name="A recipe of your own").click()
    cases = {
        "merge_method: layerwise\nbase_model: /etc\nmodels: [{model: llama/expert1}]\n": "no model",
        "a: &a [x]\nb: [*a, *a]\n": "aliases",
        "[" * 2000: "nested",
        "!!python/object/apply:os.system ['touch pwned']\n": "YAML",
        "merge_method: layerwise\nbase_model: llama/base\nmodels:\n- model: llama/expert1\n"
        "  parameters: {wieght: 1}\n": "weight",
        f"merge_method: '{SCRIPT.replace(chr(39), '')}'\n": "no such method",
    }
    for text, told in cases.items():
        page.fill("#own textarea", text)
        page.click("#own-check")
        until(page, lambda told=told: told in page.inner_text("#own-state"), told)
    page.fill("#own textarea", "# " + "x" * 200_000)
    assert len(page.input_value("#own textarea")) <= 64 * 1024  # the page does not take more
    assert "pwned" not in page.title()
    assert not list(Path().glob("pwned"))


def test_somebodys_own_recipe_takes_the_place_of_the_sliders(open_page, served):
    page = open_page()
    choose(page, "llama/base", "llama/expert1")
    page.wait_for_selector("#recipe-state >> text=Checked")
    page.get_by_role("button", name="A recipe of your own").click()
    text = (
        "merge_method: layerwise\nbase_model: llama/base\n"
        "models: [{model: llama/expert2, parameters: {weight: 0.125}}]\n"
    )
    page.fill("#own textarea", text)
    page.click("#own-check")
    page.wait_for_selector("#own-state >> text=All right")
    page.click("#own-use")
    until(page, lambda: recipe(page)["models"][0]["model"] == "llama/expert2", "not taken")
    page.click("#own-drop")
    until(page, lambda: recipe(page)["models"][0]["model"] == "llama/expert1", "not back")


def test_a_merge_can_be_cancelled(open_page, served):
    page = open_page()
    choose(page, "llama/base", "llama/expert1")
    page.wait_for_selector("#recipe-state >> text=Checked")
    page.click("#merge-button")
    cancel = page.get_by_role("button", name="Cancel")
    until(page, cancel.is_enabled, "no way to cancel")
    cancel.click()
    page.wait_for_selector("#progress >> text=Stopped")
    assert page.locator("#push-button").is_disabled()


def test_a_public_push_needs_the_licences_checked(open_page, served):
    page = open_page()
    choose(page, "llama/base", "qwen2/expert2")
    page.wait_for_selector("#verdict >> text=needs a look")
    page.get_by_label("Private repository").uncheck()
    page.fill("#repository input, #repository textarea", "alice/open")
    assert page.locator("#push-button").is_disabled()


def test_files_of_the_machine_are_not_served(open_page, served, models_dir):
    import urllib.error
    import urllib.request

    weights = models_dir / "llama/base/model.safetensors"
    for path in ("/etc/passwd", str(weights), str(served.log), "../../../../etc/passwd"):
        for way in ("gradio_api/file=", "file="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{served.url}{way}{path}", timeout=30)
            assert refused.value.code in (403, 404)
            refused.value.close()


def test_the_page_is_for_this_machine_alone_and_tells_no_secret(served):
    text = served.log.read_bytes()
    assert b"127.0.0.1" in text
    assert b"0.0.0.0" not in text
    assert b"public link" not in text
    assert str(served.work / "results").encode() in text
    for token in (served.hub.token, served.hub.read_token):
        assert token.encode() not in text
        for log in served.work.rglob("log.txt"):
            assert token.encode() not in log.read_bytes()
