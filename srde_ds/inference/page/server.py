"""Serves the page."""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from srde_ds.inference.page.blocks import chat_blocks, chat_theme
from srde_ds.inference.page.style import CSS
from srde_ds.inference.page.visit import ChatPage

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class _Server(uvicorn.Server):
    """Ends even while pages are open, without reporting an error."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def chat_server(page: ChatPage, *, title: str, password: str | None, host: str = "127.0.0.1") -> uvicorn.Server:
    """A server of the page, to be run on a socket that listens at `host`."""
    # Gradio must not report anything to anybody, nor keep a history in the browser.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    auth: dict[str, Any] = {}
    if password is not None:
        auth = {"auth": _checks(password), "auth_message": "Enter any user name, and the chat's password."}
    application = FastAPI(openapi_url=None)
    if password is None:  # other sites must not reach it through a host name of theirs
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=(*LOOPBACK_NAMES, host))
    gr.mount_gradio_app(
        application,
        chat_blocks(page, title=title),
        "/",
        css=CSS,
        theme=chat_theme(),
        ssr_mode=False,
        footer_links=[],
        max_file_size=1,  # nothing is uploaded
        **auth,
    )
    return _Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))


def _checks(password: str) -> Callable[[str, str], bool]:
    expected = password.encode("utf-8")
    return lambda _, given: hmac.compare_digest(given.encode("utf-8", "replace"), expected)
