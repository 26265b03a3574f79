"""`rung label`: makes a labeling folder or opens it again, prints a link for each person, and serves the page."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rung.console import interruptible, print_lines, print_status
from rung.errors import ConfigError, PlanError
from rung.human_labels.candidates import read_items
from rung.human_labels.items import items_that_name_models
from rung.human_labels.store import LINK_KEY_FILE, LabelSettings, LabelStore, is_label_folder, require_same
from rung.human_labels.tasks import LEAST_ANSWERS, LabelKind, assign, make_tasks

DEFAULT_OVERLAP, DEFAULT_REPEAT = 0.2, 0.05
"""A fifth of the tasks for agreement: 40 of 200, whose kappa has an interval of about 0.2 to either side."""
DEFAULT_SCALE = 5
MAX_PEOPLE = 100
MAX_TASKS = 200_000
SHUTDOWN_SECONDS = 10


@dataclass(frozen=True)
class LabelRequest:
    """What people are asked, who they are and where the page is."""

    kind: LabelKind
    sources: Sequence[str] = ()
    """Files and run folders with answers; none where the folder exists already."""
    people: int = 1
    names: Sequence[str] = ()
    """Names of the people; by default person 1, person 2 and so on."""
    overlap: float | None = None
    """Share of the tasks that every person gets, from which agreement is measured; default: 0.2, for `correct` 0."""
    repeat: float | None = None
    """Share of its tasks that a person gets twice, from which consistency is measured; default: 0.05, for `correct`
    0."""
    scale: int | None = None
    """Of `rate` alone: the highest score; default: 5."""
    guide: str = ""
    """What people are told: what a good answer is."""
    limit: int | None = None
    """Label the first items only."""
    seed: int = 0

    def settings(self, source: str) -> LabelSettings:
        """The settings of a folder, with the defaults of the kind; `source` is the hash of the items."""
        is_correction = self.kind == "correct"
        overlap, repeat = (0.0, 0.0) if is_correction else (DEFAULT_OVERLAP, DEFAULT_REPEAT)
        return LabelSettings(
            self.kind,
            self.people,
            overlap if self.overlap is None else self.overlap,
            repeat if self.repeat is None else self.repeat,
            self.scale or DEFAULT_SCALE,
            self.guide,
            self.seed,
            source,
        )


@dataclass(frozen=True)
class PageRequest:
    """Where the page is."""

    host: str = "127.0.0.1"
    port: int = 0
    url: str | None = None
    """Address under which people reach the page, for example behind a proxy; it stands in the links."""


def label(folder: Path, request: LabelRequest, page: PageRequest) -> None:
    """Serve the page of a labeling folder until SIGINT or SIGTERM; the folder is made if it does not exist.

    Prints one link a person on stdout. Raises `ConfigError` for a folder with other labels, `DataError` for rows that
    cannot be read.
    """
    _require_installed()
    from rung.web.server import listen

    if page.url is not None and (
        urlsplit(page.url).scheme not in ("http", "https") or urlsplit(page.url).path.strip("/")
    ):
        raise ConfigError("not the address of a page", where="--url", given=page.url, hint="https://labels.example.org")

    store = open_or_create(folder, request)
    with listen(page.host, page.port) as listening:
        try:
            _serve(store, listening, page)
        finally:
            store.close()


def open_or_create(folder: Path, request: LabelRequest) -> LabelStore:
    """The labels of a folder, made from the sources of the request if there are none yet."""
    if not request.sources:
        if not is_label_folder(folder):
            raise ConfigError("no FILE is named, and this folder holds no labels yet", where=str(folder))
        store = LabelStore.open(folder)
        if store.settings.kind != request.kind:
            hint = f"rung label {store.settings.kind} -o {folder} opens it"
            raise ConfigError("this folder holds labels of another kind", where=str(folder), hint=hint)
        return store
    if not 1 <= request.people <= MAX_PEOPLE:
        raise ConfigError("so many people cannot be served", where="--people", given=request.people, allowed="1 to 100")
    if request.names and (len(set(request.names)) != request.people or "" in request.names):
        raise ConfigError("names are one for each person", where="--names", given=", ".join(request.names))
    if request.scale is not None and request.kind != "rate":
        raise ConfigError("a scale is of ratings", where="--scale", given=request.scale, hint="rung label rate")
    items = read_items(request.sources, request.limit)
    settings = request.settings(sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest())
    if is_label_folder(folder):
        store = LabelStore.open(folder)
        require_same(store.settings, settings, folder)
        return store
    if folder.exists() and not folder.is_dir():
        raise ConfigError("this is a file, and labels are a folder", where="--output", given=str(folder))
    # what a start that was killed leaves: the key of the links, and files that begin with a dot
    if folder.exists() and any(p.name != LINK_KEY_FILE and p.name[0] != "." for p in folder.iterdir()):
        raise ConfigError("this folder holds other files", where=str(folder), hint="name a new folder with --output")
    tasks = make_tasks(request.kind, items)
    if not tasks:
        summary = f"no item has the {LEAST_ANSWERS[request.kind]} distinct answers that are needed to {request.kind}"
        raise ConfigError(summary, where="FILE", given=", ".join(request.sources))
    if len(tasks) > MAX_TASKS:
        raise ConfigError(
            "so many tasks are years of work", given=f"{len(tasks):,}", allowed=f"{MAX_TASKS:,}", hint="set --limit"
        )
    _print_notes(request.kind, items, tasks)
    names = list(request.names) or [f"person {i + 1}" for i in range(request.people)]
    slots = assign(tasks, request.people, settings.overlap, settings.repeat, request.seed)
    return LabelStore.create(folder, settings, items, names, slots)


def _print_notes(kind: LabelKind, items: Sequence[Any], tasks: Sequence[Any]) -> None:
    if alone := sum(len(item.answers) < LEAST_ANSWERS[kind] for item in items):
        print_status(f"{alone} of {len(items)} items have fewer than {LEAST_ANSWERS[kind]} distinct answers: not asked")
    if naming := items_that_name_models(items):
        print_status(f"{len(naming)} items have an answer that names a model, which is not blind (first: {naming[0]})")
    asked = len({task.item.id for task in tasks})
    print_status(f"{len(tasks):,} task{'s' * (len(tasks) > 1)} from {asked:,} item{'s' * (asked > 1)}")


def _require_installed() -> None:
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise PlanError("the labeling page needs a web server", hint="pip install 'rung[web]'")


def _serve(store: LabelStore, listening: socket.socket, page: PageRequest) -> None:
    import uvicorn

    from rung.labeling.app import make_app
    from rung.web.server import server_options

    port = listening.getsockname()[1]
    base = page.url.rstrip("/") if page.url else f"http://{_shown_host(page.host)}:{port}"
    app = make_app(store, lambda host: is_known_host(host, page))
    # without a proxy nobody else may say which address a request comes from
    options = {**server_options(SHUTDOWN_SECONDS), "proxy_headers": page.url is not None}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    print_lines(f"{name}: {base}/enter/{store.token(person)}" for person, name in enumerate(store.people))
    print_status("the page is served until Ctrl-C; every vote is on the disk at once")

    def finish() -> None:
        server.should_exit = True

    # in a thread: in the main thread uvicorn would take the signals
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    with interruptible("once the requests that were begun are answered", finish):
        thread.start()
        thread.join()


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104
        host = socket.gethostname()
    return f"[{host}]" if ":" in host else host


def is_known_host(host: str, page: PageRequest) -> bool:
    """Whether the page answers under a host name: this machine's, that of `url`, or an address where it is not local.

    A numeric address cannot be bound to another machine, as a name can (DNS rebinding).
    """
    from rung.web.access import is_loopback

    names = {page.host, urlsplit(page.url).hostname if page.url else None}
    if is_loopback(host) or host in names:
        return True
    if is_loopback(page.host):
        return False
    if host == socket.gethostname().lower():
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
