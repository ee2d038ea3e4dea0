"""The tab in a real browser, before a real TensorBoard: what a person does, and what they see."""

import json
import urllib.parse

from tests.writers.served import fetch, wait_for


class Page:
    """The tab's frame within TensorBoard's page."""

    def __init__(self, server, browser):
        self.server, self.browser = server, browser

    def open(self, dark=False, **state):
        """A deep link; waits until it is drawn."""
        parts = [f"p.gradlens.{name}={urllib.parse.quote(str(value), safe='')}" for name, value in state.items()]
        self.browser._post("/frame", {"id": None})
        self.browser.open(f"{self.server.url}/?darkMode={str(dark).lower()}#{'&'.join(['gradlens', *parts])}")
        wait_for(lambda: self.browser.run("return document.querySelector('iframe') !== null"), "the tab's frame")
        self.browser._post("/frame", {"id": 0})
        self.until("document.querySelector('main > *, .problem:not([hidden])') !== null", "the first view")
        self.settled()
        return self

    def settled(self):
        """Wait until nothing is being asked for."""
        self.until("!document.querySelector('main[aria-busy], progress:not([hidden])')", "answers")
        count = "performance.getEntriesByType('resource').length"
        self.until(f"window.__seen === (window.__seen = {count})", "a quiet network")

    def js(self, expression):
        """What it is in the frame."""
        return self.browser.run(f"return {expression}")

    def until(self, expression, what=None, seconds=40):
        """Wait until it is true."""
        return wait_for(lambda: self.js(expression), what or expression, seconds)

    def all(self, selector):
        """The texts of all elements."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    def say(self, selector):
        """The text of one."""
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def hash(self):
        """What the address says that people see."""
        text = self.js("window.parent.location.hash")
        pairs = (part.partition("=") for part in text.lstrip("#").split("&") if part.startswith("p.gradlens."))
        return {name.removeprefix("p.gradlens."): urllib.parse.unquote(value) for name, _, value in pairs}

    def place(self, selector, x=0.5, y=0.5, nth=0):
        """Where on the whole page a point of an element is."""
        self.js(f"document.querySelectorAll({json.dumps(selector)})[{nth}].scrollIntoView({{block: 'center'}})")
        left, top, width, height = self.js(
            f"(() => {{ const r = document.querySelectorAll({json.dumps(selector)})[{nth}].getBoundingClientRect();"
            " const f = window.frameElement.getBoundingClientRect();"
            " return [r.left + f.left, r.top + f.top, r.width, r.height]; })()"
        )
        return left + x * width, top + y * height

    def mouse(self, kind, x, y, count=1, pressed=False):
        """A real event of the mouse."""
        more = {} if kind == "mouseMoved" and not pressed else {"button": "left", "buttons": 1}
        self.browser.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=count, **more)

    def click(self, selector, x=0.5, y=0.5, nth=0, count=1):
        """A real click on a point of an element."""
        at = self.place(selector, x, y, nth)
        self.mouse("mouseMoved", *at)
        for n in range(1, count + 1):
            self.mouse("mousePressed", *at, count=n)
            self.mouse("mouseReleased", *at, count=n)

    def hover(self, selector, x=0.5, y=0.5, nth=0):
        """The mouse over a point of an element."""
        at = self.place(selector, x, y, nth)
        self.mouse("mouseMoved", at[0] - 3, at[1])
        self.mouse("mouseMoved", *at)

    def drag(self, selector, start, stop, nth=0):
        """From one point of an element to another."""
        a, b = self.place(selector, *start, nth), self.place(selector, *stop, nth)
        self.mouse("mouseMoved", *a)
        self.mouse("mousePressed", *a)
        for share in (0.3, 0.6, 1.0):
            self.mouse("mouseMoved", a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]), pressed=True)
        self.mouse("mouseReleased", *b)

    def press(self, *keys):
        """Real keys, to whatever has the focus."""
        for key in keys:
            name = " " if key == "Space" else key
            text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
            more = {"text": text} if text else {}
            code = {"Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39}.get(key, 0)
            self.browser.command("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **more)
            self.browser.command("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def write(self, selector, text):
        """Text into a field, as if typed."""
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.browser.command("Input.insertText", text=text)

    def served(self, route, **query):
        """An answer of the server itself."""
        return fetch(f"{self.server.url}/data/plugin/gradlens/{route}?{urllib.parse.urlencode(query)}")
