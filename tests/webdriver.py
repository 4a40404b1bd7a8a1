"""A browser for tests: the W3C WebDriver protocol over urllib, as far as it is needed here. Debian: chromium-driver."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of an element reference, WebDriver section 12.1
KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Up": "\ue013", "Down": "\ue015", "Tab": "\ue004", "Space": "\ue00d"}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """A headless Chromium with a console that can be read."""

    def __init__(self, *switches):
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.driver.stdout if "started successfully on port" in line)
        self.base = "http://127.0.0.1:" + line.split("port ")[1].strip(" .\n")
        options = {
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=en", *switches],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += "/session/" + self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, method, path, body=None):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.base + path, data, method=method), timeout=60) as r:
                return json.load(r)["value"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(json.load(e)["value"]["message"]) from e

    def open(self, url):
        self.call("POST", "/url", {"url": url})

    def run(self, script, *args):
        """The value of a function's body."""
        return self.call("POST", "/execute/sync", {"script": script, "args": args})

    def find(self, selector):
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self.call("POST", f"/element/{self.find(selector)}/click")

    def keys(self, *names, held=()):
        """Key strokes into whatever has the focus."""
        strokes = [KEYS.get(name, name) for name in names]
        down, up = ([{"type": kind, "value": KEYS[h]} for h in held] for kind in ("keyDown", "keyUp"))
        actions = [*down, *({"type": t, "value": k} for k in strokes for t in ("keyDown", "keyUp")), *up]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def drag(self, points, kind="mouse"):
        """Press at the first point, go along the others, let go."""
        moves = [{"type": "pointerMove", "x": int(x), "y": int(y), "duration": 40} for x, y in points]
        path = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": path}
        self.call("POST", "/actions", {"actions": [pointer]})

    def resize(self, width, height):
        """The page's own size, exactly."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def devtools(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def console(self):
        """Warnings and errors since the last look."""
        return [e for e in self.call("POST", "/se/log", {"type": "browser"}) if e["level"] in ("WARNING", "SEVERE")]

    def wait(self, script, *args, seconds=10):
        """Until the function's body is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *args)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.02)
        return value

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.communicate()


def available():
    return bool(CHROMIUM and DRIVER) and os.name == "posix"
