"""A judge behind an OpenAI-compatible endpoint, over the standard library alone.

The key comes from an environment variable and goes nowhere but into the request's header: not to another host (no
redirect is followed), not in the clear (plain http is for loopback only), not into a message or a recipe.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from hf_scratch_gpt.alignment.judges import Comparison, read_letter

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_LARGEST_REPLY = 1_000_000  # bytes; a verdict is one letter


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class EndpointJudge:
    """Asks `POST {url}/chat/completions`.

    Args:
        url (`str`): The endpoint's base, such as `https://host/v1`.
        model (`str`): Name of the model there.
        key_variable (`str`): Environment variable that holds the key; empty for none.
        template (`str`): What the judge reads, see `judges.JUDGE_PROMPT`.
        timeout (`float`): Seconds for one request.
        retries (`int`): Further tries after a failure that may pass.
        requests (`int`): Requests at a time.
        first_wait (`float`, *optional*, defaults to `1.0`): Seconds before the second try; doubled for each further.

    Raises:
        ValueError: for a URL that is not http(s), sends the key in the clear, or without the key's variable.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str,
        template: str,
        timeout: float,
        retries: int,
        requests: int,
        first_wait: float = 1.0,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"'judge_url' is '{url}', expected http(s)://host/...")
        if not model:
            raise ValueError("'judge_name' is missing: the name of the model at 'judge_url'")
        is_local = parts.hostname in _LOOPBACK
        self.key = os.environ.get(key_variable, "") if key_variable else ""
        if key_variable and not self.key:
            raise ValueError(f"the environment variable '{key_variable}' ('judge_key_variable') is not set")
        if self.key and parts.scheme == "http" and not is_local:
            raise ValueError(f"'judge_url' is '{url}': a key is sent over https only; plain http is for loopback")
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.template, self.timeout, self.retries = model, template, timeout, retries
        self.requests, self.first_wait = requests, first_wait
        proxies = [urllib.request.ProxyHandler({})] if is_local else []
        self._open = urllib.request.build_opener(_NoRedirect, *proxies).open

    def prefer(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """1 for A, 0 for B, `None` for a reply that says neither.

        Raises:
            OSError: if the endpoint cannot be reached or refuses, after all tries.
            ValueError: if what it sends is no chat completion.
        """
        with ThreadPoolExecutor(self.requests) as pool:
            return list(pool.map(self._ask, comparisons))

    def _ask(self, comparison: Comparison) -> float | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": comparison.text(self.template)}],
            "temperature": 0,
            "max_tokens": 16,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url}: sent no chat completion, but {reply[:80]!r}") from error
        return read_letter(content) if isinstance(content, str) else None

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url, body, headers)
            try:
                with self._open(request, timeout=self.timeout) as response:
                    return response.read(_LARGEST_REPLY)
            except urllib.error.HTTPError as error:
                if error.code not in _TRY_AGAIN or attempt == self.retries:
                    raise OSError(f"{self.url}: answered {error.code} {error.reason}{_tries(attempt)}") from None
                wait = _asked_wait(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                if attempt == self.retries:
                    reason = getattr(error, "reason", error)
                    raise OSError(f"{self.url}: cannot be reached: {reason}{_tries(attempt)}") from None
                wait = None
            time.sleep(self.first_wait * 2**attempt if wait is None else wait)
        raise AssertionError("the last try returns or raises")


def _tries(attempt: int) -> str:
    return f" ({attempt + 1} tries)" if attempt else ""


def _asked_wait(header: str | None) -> float | None:
    """Seconds that the endpoint asks to wait, at most a minute; `None` if it does not say, or says a date."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(header))) if header is not None else None
    except ValueError:
        return None
