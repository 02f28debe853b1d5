"""Does the server's page work in a real browser? Headless Chromium uses it as a person does, on loopback.

    apt-get install chromium && python -m venv .venv-clients && .venv-clients/bin/pip install playwright
    coral serve --port 8000 &
    .venv-clients/bin/python checks/page_check.py http://127.0.0.1:8000 --pictures DIRECTORY

A prompt is written side by side, plain and CORAL: both texts must be the same, accepted tokens marked on one
side alone, and nothing may be fetched from elsewhere or end in an error of the console. Contrasts are
computed from what is shown, all that can be used has a name and is reached by the keyboard, and nothing is
wider than a phone. Pictures are taken of a desktop and a phone, light and dark.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

PROMPT = "Write a Python function that counts the words of a text."
WAYS = {
    "desktop-light": ((1120, 800), "light"),
    "desktop-dark": ((1120, 800), "dark"),
    "phone-light": ((390, 844), "light"),
    "phone-dark": ((390, 844), "dark"),
}
CONTRASTS = """() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => (v /= 255) <= .04045
    ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.localName + " " + e.textContent.slice(0, 30)]; });
}"""
UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, summary, [tabindex]")]
  .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim())
  .map((e) => e.outerHTML)"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--pictures", type=Path, default=Path())
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for name, ((width, height), scheme) in WAYS.items():
            size: Any = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1)
            heard = listen(page, options.url)
            page.goto(options.url)
            found = [*heard, *use(page, options.pictures / f"page-{name}.png"), *looks(page)]
            faults += [f"{name}: {fault}" for fault in [*found, *heard]]
            page.close()
        faults += stop(browser.new_page(), options.url)
        browser.close()
    print(*faults or ["the page works: same text, marks, names, keyboard, contrast, width"], sep="\n")
    return 1 if faults else 0


def listen(page: Page, url: str) -> list[str]:
    """Grows by what the console complains of, and by what is asked of other addresses."""
    heard: list[str] = []
    page.on("console", lambda said: heard.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:")) else heard.append(r.url))
    return heard


def use(page: Page, picture: Path) -> list[str]:
    """Ask side by side, with the keyboard alone; a picture is taken in the middle and one at the end."""
    page.wait_for_selector("#model[data-known]", timeout=60_000)
    page.screenshot(path=picture.with_stem(picture.stem + "-begin"))
    page.keyboard.type(PROMPT)  # the field has the focus
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.said')[0].textContent.length > 150", 60)
    page.screenshot(path=picture.with_stem(picture.stem + "-streaming"))
    page.wait_for_selector(".verdict", timeout=120_000)
    page.wait_for_timeout(500)
    page.screenshot(path=picture)
    texts = [said.inner_text() for said in page.query_selector_all(".said")]
    marks = [len(said.query_selector_all("mark")) for said in page.query_selector_all(".said")]
    faults = [] if len(texts) == 2 and texts[0] == texts[1] else [f"the texts differ: {texts}"]
    verdict = page.inner_text(".verdict")
    faults += [] if verdict.startswith("The same text") else [verdict]
    return faults + ([] if marks[0] > 0 == marks[1] else [f"marks on both sides: {marks}"])


def until(page: Page, true: str, seconds: float) -> None:
    """Wait; Playwright's own way is evaluated in the page, whose policy forbids that."""
    end = time.monotonic() + seconds
    while not page.evaluate(true):
        if time.monotonic() > end:
            raise TimeoutError(true)
        page.wait_for_timeout(50)


def looks(page: Page) -> list[str]:
    poor = [f"contrast {ratio:.2f} of {what}" for ratio, what in page.evaluate(CONTRASTS) if ratio < 4.5]
    unnamed = [f"has no name: {what}" for what in page.evaluate(UNNAMED)]
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return [*poor, *unnamed, *([f"{wide} pixels too wide"] if wide > 0 else [])]


def stop(page: Page, url: str) -> list[str]:
    """Escape ends an answer, and the conversation goes on."""
    page.goto(url)
    page.fill("#prompt", "Count from one to two hundred in words.")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.said')?.textContent.length > 20", 60)
    page.keyboard.press("Escape")
    until(page, "document.querySelector('.verdict')?.textContent === 'Stopped.'", 5)
    page.fill("#prompt", "Say yes.")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.said')[1]?.textContent.length > 0", 60)
    until(page, "document.getElementById('send').textContent === 'Send'", 60)
    return [] if page.query_selector(".error") is None else [page.inner_text(".error")]


if __name__ == "__main__":
    sys.exit(main())
