"""A person at the labeling page without a browser: opens a link, reads the task, sends the form."""

from __future__ import annotations

import http.client
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urlencode, urlsplit

import uvicorn

from rung.human_labels.store import LabelStore
from rung.labeling.app import make_app
from rung.web.server import server_options


class Page(HTMLParser):
    """What a person reads of a page: the answers by their letters, the prompt, and the fields of the form."""

    def __init__(self, text: str, status: int, address: str) -> None:
        super().__init__()
        self.text, self.status, self.address = text, status, address
        self.fields: dict[str, str] = {}
        self.answers: list[str] = []
        self.prompt = self.message = self.progress = ""
        self.tags: list[str] = []
        self.last = ""
        self._into: list[str] = []
        self._is_in_answer = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        classes = (given.get("class") or "").split()
        if tag == "input" and given.get("type") == "hidden":
            self.fields[str(given["name"])] = given.get("value") or ""
        if given.get("name") == "last":
            self.last = given.get("value") or ""
        if tag == "section" and "answer" in classes:
            self.answers.append("")
            self._is_in_answer = True
        into = "message" if "message-line" in classes and "hidden" not in given else ""
        into = into or ("progress" if given.get("id") == "how-far" else "")
        if tag in ("p", "code"):
            self._into.append(into or ("answers" if self._is_in_answer else "prompt"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "code") and self._into:
            self._into.pop()
        if tag == "section":
            self._is_in_answer = False

    def handle_data(self, data: str) -> None:
        into = self._into[-1] if self._into else ""
        if into == "answers":
            self.answers[-1] += ("\n\n" if self.answers[-1] else "") + data
        elif into:
            setattr(self, into, getattr(self, into) + data)


@dataclass
class Person:
    """One person with a cookie. `host` is the Host header, and `headers` are sent with every request."""

    link: str
    headers: dict[str, str] = field(default_factory=dict)
    page: Page | None = None

    def __post_init__(self) -> None:
        self._port = urlsplit(self.link).port
        self._cookie = ""

    def enter(self) -> Page:
        """Open the link."""
        return self.get(urlsplit(self.link).path)

    def get(self, path: str) -> Page:
        """Open a page, also where it redirects to."""
        return self._ask("GET", path, None)

    def vote(self, **fields: object) -> Page:
        """Send the form of the task that is shown."""
        assert self.page is not None
        return self.post(self.page.address, {**self.page.fields, "seconds": "2.5", **fields})

    def undo(self) -> Page:
        """Take back the last vote."""
        assert self.page is not None
        return self.post("/undo", {**self.page.fields, "last": self.page.last})

    def post(self, path: str, fields: dict[str, object]) -> Page:
        """Send any form."""
        return self._ask("POST", path, urlencode(fields, errors="surrogatepass"))

    def raw(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """One request, without following."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        sent = {"cookie": self._cookie, **({"content-type": "application/x-www-form-urlencoded"} if body else {})}
        try:
            connection.request(method, path, body, {**sent, **self.headers, **headers})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: str | None) -> Page:
        status, headers, content = self.raw(method, path, body)
        if "set-cookie" in headers:
            self._cookie = headers["set-cookie"].partition(";")[0]
        if status == 303:
            return self._ask("GET", headers["location"], None)
        self.page = Page(content.decode(), status, path)
        return self.page


@contextmanager
def label_page(store: LabelStore) -> Iterator[list[Person]]:
    """The page of a folder on a free port in a thread of this process; its people, not entered yet."""
    server = uvicorn.Server(uvicorn.Config(make_app(store), port=0, **server_options(5)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield [Person(f"http://127.0.0.1:{port}/enter/{store.token(i)}") for i in range(len(store.people))]
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def label_command(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], list[Person]]]:
    """`rung label` as a process, and the people of the links that it prints."""
    from processes import start  # loads torch, which the page's own tests do without

    running = start("label", *arguments)
    people: list[Person] = []
    count = int(str(arguments[arguments.index("--people") + 1])) if "--people" in arguments else 1
    try:
        assert running.stdout is not None
        while len(people) < count:
            line = running.stdout.readline()
            assert line, running.communicate()[1]
            people.append(Person(line.rpartition(": ")[2].strip() if ": http" in line else ""))
        yield running, people
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()
