"""A real JupyterLab and a headless Chromium for the tests that need them, each started only when asked for."""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage"]
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}

# A shell's background jobs ignore Ctrl-C and their children inherit that; the tests of interrupts need it to be heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Lab:
    base: str
    token: str
    root: Path  # the folder that JupyterLab serves

    def call(self, path, method="GET"):
        return urllib.request.urlopen(urllib.request.Request(f"{self.base}{path}?token={self.token}", method=method), timeout=5).read()


def wait_until_up(lab, process, log, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try: return lab.call("/api/status")
        except OSError:
            if process.poll() is not None: break
            time.sleep(.25)
    raise RuntimeError(f"JupyterLab did not start; end of its log:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab of its own configuration, whose kernels import the synthlab of this checkout."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'synthlab[lab]'")
    root, conf = tmp_path_factory.mktemp("lab_root"), tmp_path_factory.mktemp("lab_conf")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    folders = {f"JUPYTER_{k}_DIR": str(conf / k) for k in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": str(conf / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(conf / "spaces"), "IPYTHONDIR": str(conf / "ipython")}
    (conf / "CONFIG" / "labconfig").mkdir(parents=True)
    (conf / "CONFIG" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(QUIET))
    port, token, log = free_port(), secrets.token_hex(16), conf / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(log, "w") as out:
        process = subprocess.Popen(command, env={**os.environ, **folders, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=True, cwd=root)
    server = Lab(f"http://127.0.0.1:{port}", token, root)
    try:
        wait_until_up(server, process, log)
        yield server
        server.call("/api/shutdown", "POST")
        process.wait(20)
    finally:
        if process.poll() is None: os.killpg(process.pid, 9)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    "The system's Chromium, headless; nothing is downloaded."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'synthlab[dev]'")
    if not CHROMIUM: pytest.skip("no Chromium on this machine: install it (apt-get install chromium) or point CHROMIUM at one")
    with playwright.sync_playwright() as pw:
        context = pw.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("chromium")), executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                        viewport={"width": 1400, "height": 1000})
        yield context
        context.close()


@dataclass
class Watch:
    "What a page asked for from outside and what it complained about."
    outside: list = field(default_factory=list)
    errors: list = field(default_factory=list)

    def follow(self, page, *own):
        page.on("request", lambda r: None if r.url.startswith(("data:", "blob:", "about:", *own)) else self.outside.append(r.url))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        return page

    def clean(self):
        assert not self.outside, f"requests to other places: {self.outside}"
        assert not self.errors, f"errors in the browser's console: {self.errors}"


@pytest.fixture
def watch():
    return Watch()
