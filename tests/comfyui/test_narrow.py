"""The sidebar in a real browser, in 300 pixels and on a phone's width, and by keyboard alone. It needs no ComfyUI: its modules talk to stubs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.comfyui.conftest import skip_loudly

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    modules = Path(os.environ.get("PLAYWRIGHT_CORE", "~/pw/node_modules/playwright-core")).expanduser()
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not modules.is_dir() or not shutil.which("node") or not browser:
        skip_loudly("no Node, playwright-core or Chromium")
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("narrow.mjs")), str(tmp_path_factory.mktemp("narrow") / "run.png")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PLAYWRIGHT_CORE": str(modules), "CHROMIUM": str(browser)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("view", ["list", "run"])
@pytest.mark.parametrize("width", ["300", "360"])
def test_nothing_reaches_beyond_a_narrow_sidebar_and_all_controls_have_names(seen, view, width):
    assert seen[view][width]["beyond"] == [] and seen[view][width]["unnamed"] == [] and seen["faults"] == []
    assert seen[view][width]["controls"] >= {"list": 2, "run": 8}[view]


def test_the_focus_goes_into_an_opened_run_and_back_to_its_card(seen):
    assert seen["focus"] == ["ct-card", "ct-back", "ct-card"]
