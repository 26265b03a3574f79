"""The web application of a labeling folder: links, tasks and votes.

A person's link sets a cookie that no script can read. A vote needs that cookie and the secret word of the person's
forms, so that no other page can send one, and is on the disk before it is acknowledged. `run.py` serves it.
"""

from __future__ import annotations

import asyncio
import hmac
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from rung.errors import DataError
from rung.human_labels.store import LabelStore, StaleVoteError
from rung.human_labels.votes import MAX_NOTE, Vote, parse_vote
from rung.labeling.page import done_page, first_open_position, message_page, static_file, task_page
from rung.web.access import AccessControl, AccessError, is_loopback
from rung.web.attempt_limit import AttemptLimit

MAX_FIELDS = 100
BODY_SECONDS = 30
COOKIE_SECONDS = 90 * 24 * 3600
MAX_SECONDS = 24 * 3600.0
"""Of one task: what a page claims beyond it is no time that was spent on the task."""
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # not no-referrer: forms without a script would be sent with the origin null, which is another host's
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
STALE = "This task was answered in another tab. Your click here was not stored; what is stored is shown below."
NOT_STORED = "The vote could not be stored: {}. Nothing of it was kept; send it again."


class RefusalError(Exception):
    """A request that is not answered, with a status and what a person is told."""

    def __init__(self, status: int, title: str, text: str) -> None:
        super().__init__(text)
        self.status, self.title, self.text = status, title, text


def make_app(store: LabelStore, is_known_host: Callable[[str], bool] = is_loopback) -> Starlette:
    """The application of an open folder, which answers under the host names that `is_known_host` accepts."""
    handlers = Handlers(store)
    routes = [
        Route("/", handlers.start),
        Route("/enter/{token}", handlers.enter),
        Route("/task/{number}", handlers.task, methods=["GET", "POST"]),
        Route("/undo", handlers.undo, methods=["POST"]),
        Route("/done", handlers.done),
        Route("/label.css", handlers.style),
        Route("/label.js", handlers.script),
    ]
    errors: Mapping[Any, Callable[..., Any]] = {
        RefusalError: _refusal,
        AccessError: lambda request, error: _refused(error),
        ClientDisconnect: lambda request, error: Response(status_code=400),
        HTTPException: _http_error,
        Exception: _other_error,
    }
    access = Middleware(AccessControl, refuse=_refused, is_known_host=is_known_host)
    return Starlette(routes=routes, exception_handlers=errors, middleware=[access])


class Handlers:
    """One method a route."""

    def __init__(self, store: LabelStore) -> None:
        self.store, self.wrong_links = store, AttemptLimit()
        # cookies are shared by all ports of a host: each folder has its own
        self._cookie = f"rung_label_{sha256(str(store.folder.resolve()).encode()).hexdigest()[:8]}"
        # one writer: SQLite has one, and waiting for its lock in several threads gains nothing
        self._writer = ThreadPoolExecutor(1, "labels")

    async def enter(self, request: Request) -> Response:
        """GET /enter/TOKEN: a person's link."""
        token = request.path_params["token"]
        self._person_of(token, request)
        response = _redirect("/")
        secure = request.url.scheme == "https"
        # lax, not strict: a link that is opened from a mail must work
        response.set_cookie(self._cookie, token, COOKIE_SECONDS, httponly=True, samesite="lax", secure=secure)
        return response

    async def start(self, request: Request) -> Response:
        """GET /: the first task without a vote."""
        person = self._person(request)
        position = first_open_position(self.store, person)
        return _redirect("/done" if position is None else f"/task/{position + 1}")

    async def task(self, request: Request) -> Response:
        """GET /task/N and POST /task/N: a task of a person, and the vote on it."""
        person = self._person(request)
        number = request.path_params["number"]
        position = int(number) - 1 if number.isascii() and number.isdecimal() and len(number) < 10 else -1
        if not 0 <= position < len(self.store.slots[person]):
            raise RefusalError(404, "No such task", f"There are {len(self.store.slots[person])} tasks for you.")
        if request.method == "GET":
            return _html(task_page(self.store, person, position))
        form = await self._form(request, person)
        slot, settings = self.store.slots[person][position], self.store.settings
        try:
            vote = parse_vote(settings.kind, slot.task, slot.shown, settings.scale, form)
        except DataError as error:
            message = f"{error.summary[:1].upper()}{error.summary[1:]}."
            return _html(task_page(self.store, person, position, message), 400)
        try:
            await self._cast(person, position, _integer(form.get("revision", "")), vote, form)
        except StaleVoteError:
            return _html(task_page(self.store, person, position, STALE), 409)
        following = first_open_position(self.store, person, position)
        return _redirect("/done" if following is None else f"/task/{following + 1}")

    async def undo(self, request: Request) -> Response:
        """POST /undo: take back the vote that the page names as the last one, and show its task again.

        A request that is sent twice takes back one vote: the second time it is not there any more.
        """
        person = self._person(request)
        form = await self._form(request, person)
        position, revision = (_integer(part) for part in form.get("last", "").partition("-")[::2])
        if position >= len(self.store.slots[person]):
            raise RefusalError(400, "Not a form", "The form does not say which vote is taken back.")
        now, cast, note = self.store.vote(person, position)
        if now == revision and cast is not None:
            with suppress(StaleVoteError):  # another tab was faster: its vote is shown
                await self._cast(person, position, revision, None, {"note": note})
        return _redirect(f"/task/{position + 1}")

    async def done(self, request: Request) -> Response:
        """GET /done: thanks, and what was skipped."""
        return _html(done_page(self.store, self._person(request)))

    async def style(self, request: Request) -> Response:
        """GET /label.css."""
        return Response(
            static_file("label.css"), media_type="text/css", headers={**HEADERS, "cache-control": "no-cache"}
        )

    async def script(self, request: Request) -> Response:
        """GET /label.js."""
        headers = {**HEADERS, "cache-control": "no-cache"}
        return Response(static_file("label.js"), media_type="text/javascript", headers=headers)

    async def _cast(
        self, person: int, position: int, revision: int, vote: Vote | None, form: Mapping[str, str]
    ) -> None:
        seconds, note = _seconds(form.get("seconds", "")), form.get("note", "").strip()[:MAX_NOTE]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self.store.cast, person, position, revision, vote, note, seconds)

    def _person(self, request: Request) -> int:
        token = request.cookies.get(self._cookie)
        if token is None:
            raise RefusalError(401, "Who are you?", "Open the link that you were given: it says who you are.")
        return self._person_of(token, request)

    def _person_of(self, token: str, request: Request) -> int:
        address = request.client.host if request.client else ""
        person = self.store.person_of(token)
        # who is in stays in; a link is not opened, right or wrong, while somebody guesses
        if self.wrong_links.is_blocked(address) and (person is None or request.url.path.startswith("/enter/")):
            raise RefusalError(429, "Too many wrong links", "Wait a minute, then open your link again.")
        if person is None:
            self.wrong_links.record_failure(address)
            raise RefusalError(401, "This link is wrong", "Ask for your link again: a part of it may be missing.")
        return person

    async def _form(self, request: Request, person: int) -> dict[str, str]:
        """The fields of a form, whose secret word must be that of the person."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/x-www-form-urlencoded":
            raise RefusalError(415, "Not a form", "The page sends its forms as application/x-www-form-urlencoded.")
        try:
            body = await asyncio.wait_for(request.body(), BODY_SECONDS)
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except TimeoutError:
            raise RefusalError(408, "Too slow", "The form did not come.") from None
        except ValueError:
            raise RefusalError(400, "Not a form", "The form cannot be read.") from None
        form = dict(pairs)
        word = form.get("form_token", "").encode(errors="replace")
        if not hmac.compare_digest(word, self.store.form_token(person).encode()):
            text = "This tab belongs to another person, whose link was opened in this browser. Open your link again."
            raise RefusalError(403, "Not your tab", text)
        return form


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RefusalError(400, "Not a form", "The form does not say which vote it replaces.")
    return int(text)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return round(seconds, 1) if 0.0 <= seconds <= MAX_SECONDS else None


def _html(page: str, status: int = 200) -> Response:
    # data may hold halves of characters, which no encoding knows
    return HTMLResponse(page.encode("utf-8", "replace"), status, headers=HEADERS)


def _redirect(path: str) -> RedirectResponse:
    return RedirectResponse(path, 303, headers=HEADERS)


def _refusal(request: Request, error: RefusalError) -> Response:
    return _html(message_page(error.title, error.text), error.status)


def _refused(error: AccessError) -> Response:
    return _html(message_page("Not answered", f"{error.message[:1].upper()}{error.message[1:]}."), error.status)


def _http_error(request: Request, error: HTTPException) -> Response:
    return _html(message_page("No such page", str(error.detail)), error.status_code)


def _other_error(request: Request, error: Exception) -> Response:
    if isinstance(error, sqlite3.Error):
        return _html(message_page("Not stored", NOT_STORED.format(error)), 503)
    return _html(message_page("An error", "The server could not answer. Nothing that was stored is lost."), 500)
