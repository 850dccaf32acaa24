"""The report of the kept results in headless Chromium, which must be there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import report
from tests.waiting import LIMIT

_ROOT = Path(__file__).parents[2]
# Says in the page's title what the browser made of it.
_LOOK = """
<script>
  addEventListener("load", () => {
    const root = document.documentElement;
    document.title = [
      performance.getEntriesByType("resource").length,
      root.scrollWidth - root.clientWidth,
      document.querySelectorAll("h2").length,
      [...document.querySelectorAll("svg")].filter(
        (x) => x.getBoundingClientRect().width > 200).length,
    ].join(" ");
  });
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = tmp_path_factory.mktemp("browser") / "results"
    shutil.copytree(_ROOT / "results/article_16_epochs", results)
    path = report.write_report(results)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", f"{_LOOK}</body>"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_and_fetches_nothing(page, width, scheme):
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},900",
            *(["--force-dark-mode"] if scheme == "dark" else []),
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout).group(1)
    fetched, too_wide, headings, drawn = map(int, title.split())
    text = page.read_text(encoding="utf-8")
    assert (fetched, too_wide) == (0, 0)
    assert headings == text.count("<h2 ") > 5
    assert drawn == text.count("<svg") > 5
