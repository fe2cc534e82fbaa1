"""figures/explorer.png, the picture of figures/explorer.html that README.md shows: python tests/explorer_picture.py"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def main():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium found: install the package chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 1240, "height": 800}, device_scale_factor=1.5, color_scheme="light")
        page.goto((FIGURES / "explorer.html").as_uri())
        page.wait_for_function("maps !== null")
        page.screenshot(path=FIGURES / "explorer.png")
        opened.close()


if __name__ == "__main__":
    main()
