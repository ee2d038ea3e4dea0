"""The real TensorBoard server on this machine, and a real browser before it."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fetch(url, data=None, method="GET"):
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with LOCAL.open(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(ask, what, seconds=60):
    """The first true answer; errors of a server that is not yet there count as no answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, LookupError):
            if answer := ask():
                return answer
        time.sleep(0.2)
    raise TimeoutError(f"waited {seconds} s for {what}")


class Server:
    """`tensorboard --logdir`; `fast` says whether its data server, written in Rust, reads the files."""

    def __init__(self, logdir, *, fast):
        self.url = f"http://127.0.0.1:{free_port()}"
        host, port = self.url.removeprefix("http://").split(":")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", host, "--port", port,
             "--load_fast", "true" if fast else "false"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, route, **query):
        return fetch(f"{self.url}/data/{route}?{urllib.parse.urlencode(query)}")

    def loaded(self, run, tag, step):
        """Wait until a scalar is known up to this step: files are read piece by piece."""
        wait_for(lambda: self.ask("plugin/scalars/scalars", run=run, tag=tag)[-1][1] == step, f"{tag} of step {step}")
        return self

    def close(self):
        self._process.terminate()
        self._process.wait(20)


class Browser:
    """Headless Chromium, driven over the WebDriver protocol."""

    @staticmethod
    def missing():
        """Why there is none, or an empty text."""
        lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
        return f"{' and '.join(lacking)} not installed (Debian: chromium chromium-driver)" if lacking else ""

    def __init__(self, profile, size=(1400, 1000)):
        self._url = f"http://127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={self._url.rpartition(':')[2]}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: fetch(f"{self._url}/status")["value"]["ready"], "chromedriver")
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
        ]  # fmt: skip
        options = {"args": arguments, "binary": shutil.which("chromium")}
        made = self._post("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}, session="")
        self._session = made["sessionId"]

    def _post(self, path, body, session=None):
        session = f"/{self._session}" if session is None else session
        return fetch(f"{self._url}/session{session}{path}", json.dumps(body).encode(), "POST")["value"]

    def open(self, url):
        self._post("/url", {"url": "about:blank"})
        self._post("/url", {"url": url})

    def run(self, script):
        """What the JavaScript returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def text(self):
        """All text on the page, in components too."""
        return self.run(
            "const out = [];"
            "const walk = node => {"
            "  if (node.nodeType === 3) out.push(node.textContent);"
            "  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) return;"
            "  if (node.shadowRoot) walk(node.shadowRoot);"
            "  node.childNodes.forEach(walk);"
            "};"
            "walk(document.body);"
            "return out.join(' ').replace(/\\s+/g, ' ');"
        )

    def shows(self, words, seconds=60):
        """Wait until the page shows all of the words; the text."""
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: all(word in self.text() for word in words), f"{words}", seconds)
        text = self.text()
        missing = [word for word in words if word not in text]
        assert not missing, f"the page does not show {missing}: {text[:2000]}"
        return text

    def command(self, name, **parameters):
        """A command of Chromium's own debugging protocol, such as the size of a phone's screen."""
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def errors(self):
        """What the page has complained of on its console."""
        entries = self._post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self):
        """The page as PNG."""
        answer = fetch(f"{self._url}/session/{self._session}/screenshot")
        return base64.b64decode(answer["value"])

    def close(self):
        with contextlib.suppress(OSError):
            fetch(f"{self._url}/session/{self._session}", method="DELETE")
        self._process.terminate()
        self._process.wait(20)
