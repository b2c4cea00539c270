"""A real JupyterLab in a real browser, on a throw-away root; used by the tests beside this file."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
KERNEL_IS_IDLE = """async () => {
    const notebook = window.jupyterapp.shell.currentWidget;
    await notebook.context.ready;
    const session = notebook.context.sessionContext.session;
    return !!(session && session.kernel && session.kernel.status === 'idle');
}"""
RUN_ALL = """() => {
    window.outcome = 'running';
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(
        done => { window.outcome = String(done); }, error => { window.outcome = 'error: ' + error; });
}"""
ERRORS = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.model.cells, found = [];
    for (let i = 0; i < cells.length; i++) {
        if (cells.get(i).type !== 'code') continue;
        for (const o of cells.get(i).outputs.toJSON())
            if (o.output_type === 'error') found.push([i, o.ename, o.evalue]);
    }
    return found;
}"""


def chromium():
    """Path of a chromium; skips where there is none, but never on CI, where these tests must run."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    if os.environ.get("CI"):
        pytest.fail("no chromium on CI: tests/browser/install_chromium.sh should have installed it")
    pytest.skip("no chromium here; install it, for instance with: apt-get install chromium")


@contextmanager
def browser_page(folder):
    """(page, console errors, requests that left this machine)."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(folder / "profile"), executable_path=path, headless=True, args=list(FLAGS),
            viewport={"width": 1280, "height": 1400},
        )
        page = context.pages[0]
        console, outside = [], []

        def told(message) -> None:
            # anywidget gives a model 2 s, says this, and draws it all the same; whether it is there the tests see for themselves
            if message.type == "error" and "[anywidget] Failed to initialize model" not in message.text:
                console.append(message.text)

        page.on("console", told)
        page.on("pageerror", lambda error: console.append(str(error)))
        local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:", "about:")
        page.on("request", lambda request: None if request.url.startswith(local) else outside.append(request.url))
        try:
            yield page, console, outside
        finally:
            context.close()


@contextmanager
def lab_server(folder, **environment):
    """URL of a JupyterLab that serves folder/root and knows none of this machine's settings."""
    settings = folder / "settings"
    for plugin, value in (
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}),
        ("notebook-extension/tracker", {"autoStartDefaultKernel": True, "windowingMode": "none"}),
    ):
        file = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = {f"JUPYTER_{n}_DIR": str(folder / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    # no token: only on the loopback and only for a throw-away root
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder / 'root'}",
               "--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | places | environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(f"{url}/api/status", timeout=2).read()
                    break
                except OSError:
                    if time.monotonic() > end or server.poll() is not None:
                        raise RuntimeError((folder / "server.log").read_text()[-2000:]) from None
                    time.sleep(0.3)
            yield url
        finally:
            server.terminate()
            server.wait(20)


def open_and_run(page, url, name, timeout=300):
    """Open a notebook and run all its cells; returns the errors in its outputs."""
    page.goto(f"{url}/lab/tree/{name}?reset")
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=60_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    end = time.monotonic() + 60
    while not page.evaluate(KERNEL_IS_IDLE):  # cells that are run before that are silently not run
        assert time.monotonic() < end, "the kernel did not start"
        page.wait_for_timeout(200)
    page.evaluate(RUN_ALL)
    page.wait_for_function("() => window.outcome !== 'running'", timeout=1000 * timeout)
    return page.evaluate(ERRORS)
