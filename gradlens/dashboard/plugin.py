"""The tab **GradLens** for TensorBoard: routes over `views`, and the files of the pages.

Each answer has an ETag, made of the run's files and the question: what has not changed is not sent again. At most `AT_ONCE`
requests read at a time, each within `MAX_BYTES` of rows; a matrix is read for `SECONDS` at a time. What is wrong with a run
is told in an answer with the field `error`, which the page shows; what is wrong with a request is a 4xx.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import werkzeug
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from gradlens.dashboard import memory, wire
from gradlens.errors import GradlensError

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".js": "application/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
AT_ONCE = 4
SECONDS, PATIENT = 0.5, 2.0  #: in which a first answer about a matrix comes, and one that a page waits for
LARGE = 0.2  #: seconds: an answer that took longer has read many rows
MAX_BYTES = 512 << 20  #: of the rows of one answer
MAX_POINTS = 5000

_log = logging.getLogger(__name__)

Ask = Callable[["_Asked"], Any]


class BadRequestError(GradlensError, ValueError):
    """A question that is not understood."""


class GradlensPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """What TensorBoard asks of a plugin."""

    plugin_name = "gradlens"

    def __init__(self, context: Any) -> None:
        self._logdir = context.logdir or ""
        self._server: _Server | None = None
        self._guard = threading.Lock()

    def is_active(self) -> bool:
        """Whether there is a run to show."""
        return bool(self._logdir) and "://" not in self._logdir and bool(self._runs().names())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab, and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="GradLens", disable_reload=True)

    def data_plugin_names(self) -> tuple[str, ...]:
        """No event data is read."""
        return ()

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Each route with what answers it."""
        routes: dict[str, Callable[..., Any]] = {f"/{name}": self._route(name) for name in _Server.QUESTIONS}
        routes["/static/*"] = wrappers.Request.application(_static)
        return routes

    def _runs(self) -> Any:
        return self._serving().catalog

    def _serving(self) -> _Server:
        with self._guard:
            if self._server is None:
                self._server = _Server(self._logdir)
            return self._server

    def _route(self, name: str) -> Callable[..., Any]:
        @wrappers.Request.application
        def route(request: wrappers.Request) -> werkzeug.Response:
            return self._serving().answer(name, request)

        return route  # type: ignore[no-any-return]


def _files() -> dict[str, Path]:
    """The files that are served, by path: what was there at the start, so that no path leads elsewhere."""
    return {
        path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.suffix in TYPES and path.is_file()
    }


_FILES = _files()


def _static(request: wrappers.Request) -> werkzeug.Response:
    path = _FILES.get(request.path.partition("/static/")[2])
    if path is None or request.method not in ("GET", "HEAD"):
        return http_util.Respond(request, "there is no such file", "text/plain", 404)
    content = path.read_bytes()
    return _respond(request, content, TYPES[path.suffix], hashlib.blake2b(content, digest_size=12).hexdigest())


def _respond(request: wrappers.Request, content: bytes, kind: str, etag: str | None) -> werkzeug.Response:
    headers = [] if etag is None else [("ETag", f'"{etag}"')]
    if etag is not None and etag in request.if_none_match:
        return werkzeug.Response(status=304, headers=[*headers, ("Cache-Control", "no-cache, must-revalidate")])
    encoding = None
    if kind == "application/octet-stream" and "gzip" in request.headers.get("Accept-Encoding", "") and len(content) > 1000:
        content, encoding = gzip.compress(content, 1, mtime=0), "gzip"
    return http_util.Respond(request, content, kind, content_encoding=encoding, headers=headers)


class _Asked:
    """A request's arguments, each checked."""

    def __init__(self, request: wrappers.Request) -> None:
        self._args = request.args

    def text(self, name: str, default: str | None = None) -> str:
        value = self._args.get(name, default)
        if value is None or len(value) > 4000:
            raise BadRequestError(f"give {name}= as a text of at most 4,000 characters")
        return value

    def number(self, name: str, default: int | None = None, low: int = 0, high: int = 1 << 62) -> int | None:
        value = self._args.get(name)
        if value is None or value == "":
            return default
        try:
            number = int(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high or len(value) > 20:
            raise BadRequestError(f"{name}= is a whole number from {low} to {high}, not {value!r:.50}")
        return number

    def steps(self) -> slice:
        last = self.number("to")
        return slice(self.number("from", 0), None if last is None else last + 1)


class _Server:
    """What is kept between requests: the list of runs and the matrices."""

    QUESTIONS = (
        "runs", "run", "version", "map", "extreme", "table", "timelines", "scalars", "histogram", "weights", "partials",
    )  # fmt: skip

    def __init__(self, logdir: str) -> None:
        from gradlens.dashboard.catalog import Catalog
        from gradlens.dashboard.maps import Maps

        self.catalog, self.maps = Catalog(logdir), Maps()
        self._logdir = logdir
        self._summaries: dict[str, tuple[str, dict[str, Any]]] = {}
        self._reading = threading.BoundedSemaphore(AT_ONCE)

    def answer(self, question: str, request: wrappers.Request) -> werkzeug.Response:
        """The answer, whatever happens: an error is one too."""
        if request.method not in ("GET", "HEAD"):
            return http_util.Respond(request, {"error": "only GET is answered"}, "application/json", 405)
        try:
            asked = _Asked(request)
            if question == "runs":
                return _respond(request, wire.text(self._runs()), "application/json", None)
            return self._of_run(question, request, asked)
        except Exception as error:  # noqa: BLE001 - whatever a file of others brings about is told on the page
            return self._failed(request, question, error)

    def _of_run(self, question: str, request: wrappers.Request, asked: _Asked) -> werkzeug.Response:
        path = self.catalog.path(asked.text("run"))
        version = self.catalog.version(path)
        if question == "version":
            return _respond(request, wire.text({"version": version}), "application/json", None)
        etag = hashlib.blake2b(f"{version} {request.full_path}".encode(), digest_size=12).hexdigest()
        if etag in request.if_none_match:
            return _respond(request, b"", "application/json", etag)
        with self._reading:
            begin = time.monotonic()
            answer = getattr(self, f"_{question}")(_open(path), asked)
            if time.monotonic() - begin > LARGE:
                memory.release()
        if not isinstance(answer, tuple):
            return _respond(request, wire.text({"version": version, **answer}), "application/json", etag)
        header, arrays = answer
        partial = header.get("complete") is False
        data = wire.pack({"version": version, **header}, arrays)
        return _respond(request, data, "application/octet-stream", None if partial else etag)

    def _failed(self, request: wrappers.Request, question: str, error: Exception) -> werkzeug.Response:
        from gradlens.dashboard.catalog import UnknownRunError

        code = 404 if isinstance(error, UnknownRunError) else 400 if isinstance(error, BadRequestError) else 200
        if not isinstance(error, GradlensError):
            _log.warning("gradlens: the question %r failed", question, exc_info=error)
        text = str(error) if isinstance(error, GradlensError) else f"{type(error).__name__}: {error}"
        content = wire.text({"error": text[:2000], "kind": type(error).__name__})
        return http_util.Respond(request, content, "application/json", code)

    # --- questions ----------------------------------------------------------------------------------------------------

    def _runs(self) -> dict[str, Any]:
        """All runs at once; what is told of each as far as time allows, the rest when asked again."""
        names, end = self.catalog.names(), time.monotonic() + SECONDS
        listed = []
        for name in names:
            version, told = self._summary(name, in_time=time.monotonic() < end)
            listed.append({"name": name, "version": version, **told})
        known = {name: self._summaries[name] for name in names if name in self._summaries}
        self._summaries = known
        complete = all("parameters" in each or "error" in each for each in listed)
        return {"logdir": self._logdir, "runs": listed, "complete": complete, "all": self.catalog.complete}

    def _summary(self, name: str, in_time: bool) -> tuple[str | None, dict[str, Any]]:
        from gradlens.dashboard import views

        known = self._summaries.get(name)
        if not in_time:
            return known or (None, {})
        try:
            path = self.catalog.path(name)
            version = self.catalog.version(path)
            if known is not None and known[0] == version:
                return version, {**known[1], "live": known[1].get("live") and views.is_live(_open(path))}
            told = views.summary(_open(path))
        except Exception as error:  # noqa: BLE001 - a damaged run is listed as such among the others
            return None, {"error": f"{type(error).__name__}: {error}"[:500]}
        self._summaries[name] = version, told
        return version, told

    def _run(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        return views.overview(run)

    def _map(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import maps

        quantity = maps.quantity(asked.text("quantity", "rms"))
        seconds = PATIENT if asked.number("again", 0) else SECONDS
        return self.maps.scan(run, quantity, asked.text("stage", "used"), time.monotonic() + seconds)

    def _extreme(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import maps, views

        quantity, stage = maps.quantity(asked.text("quantity", "rms")), asked.text("stage", "used")
        first, stop = asked.number("from", 0) or 0, asked.number("to", 0) or 0
        return views.extreme(run, quantity, stage, asked.text("parameter"), first, stop)

    def _table(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        return views.table(run, asked.number("step"), asked.text("stage", "") or None)

    def _timelines(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        charts = asked.text("charts").split(",")
        points = asked.number("points", 1000, 10, MAX_POINTS) or 1000
        return views.timelines(run, asked.text("parameter"), charts, asked.text("stage", "used"), asked.steps(), points)

    def _scalars(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        return views.scalars(run, asked.steps(), asked.number("points", 1000, 10, MAX_POINTS) or 1000)

    def _histogram(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        return views.histogram(run, asked.text("parameter"), asked.text("stage", "used"))

    def _weights(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        return views.weights(run, asked.text("parameter"), asked.number("step"))

    def _partials(self, run: Any, asked: _Asked) -> Any:
        from gradlens.dashboard import views

        return views.matrix(run, asked.text("parameter"), asked.number("step"))


def _open(path: Path) -> Any:
    from gradlens.store.run import Run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a crash has torn is told on the page
        return Run(path, max_bytes=MAX_BYTES)
