"""The routes as TensorBoard calls them, without a server: WSGI applications and a client."""

import json
from types import SimpleNamespace
from urllib.parse import urlencode

from werkzeug.test import Client

from gradlens.dashboard import wire
from gradlens.dashboard.plugin import GradlensPlugin


class Tab:
    """The plugin over a log directory."""

    def __init__(self, logdir):
        self.plugin = GradlensPlugin(SimpleNamespace(logdir=str(logdir)))
        self._apps = self.plugin.get_plugin_apps()

    def get(self, route, headers=None, method="GET", path=None, **query):
        """A response."""
        app = self._apps[f"/{route}"]
        url = (path or f"/data/plugin/gradlens/{route}") + ("?" + urlencode(query) if query else "")
        return Client(app).open(url, method=method, headers=headers or {})

    def ask(self, route, **query):
        """What a page gets: an object, or a header and arrays."""
        response = self.get(route, **query)
        assert response.status_code == 200, response.get_data(as_text=True)
        if response.content_type == "application/octet-stream":
            return wire.unpack(response.get_data())
        return json.loads(response.get_data())
