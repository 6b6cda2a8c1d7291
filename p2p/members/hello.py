"""The hello of the heartbeat: what is asked, and what may be answered."""

import json
import ssl
from dataclasses import dataclass

from weightstream.p2p.identity import (
    MOST_ZONE_CHARACTERS,
    PEER_NAME,
    Identity,
    instance_of,
    is_node_name,
)
from weightstream.p2p.members.addresses import Address
from weightstream.p2p.members.line import Answer, Line, LineError, request

PATH = "/v1/hello"
_MOST_BODY_BYTES = 16 << 10
_MOST_BRACKETS = 32
"""A hello has one. Python that runs at the parser's deepest point fails: finalizers, by chance."""
_MOST_VERSION_CHARACTERS = 64


class RefusedError(LineError):
    """The peer is there, but one of the two does not believe the other: settings differ."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who answered."""

    node: str
    zone: str
    version: str
    instance: str = ""
    """Which process of that node; empty when it did not say."""


def hello_line(identity: Identity, address: Address) -> Line:
    """Return a line for hellos to an address."""
    return Line(address, identity.client_context(), PEER_NAME, _MOST_BODY_BYTES)


def hello_request(identity: Identity, address: Address) -> bytes:
    """Return one request, signed where requests are."""
    signed = identity.sign("GET", PATH)
    headers = {"Host": str(address)} | ({"Authorization": signed} if signed else {})
    return request("GET", PATH, headers)


def parse_hello(answer: Answer, certificate: bytes | None) -> Hello:
    """Return who answered; raises `LineError` for what is no hello."""
    if answer.status in (401, 403):
        raise RefusedError(f"refuses this node: {answer.status} {answer.said}".strip())
    if answer.status != 200:
        raise LineError(f"answered {answer.status}")
    if answer.body.count(b"[") + answer.body.count(b"{") > _MOST_BRACKETS:
        raise LineError("its hello is nested")
    try:
        found = json.loads(answer.body)
    except ValueError as error:
        raise LineError("its hello is no JSON") from error
    if not isinstance(found, dict) or not is_node_name(found.get("node")):
        raise LineError("its hello names no node")
    zone = _text(found, "zone", MOST_ZONE_CHARACTERS)
    version = _text(found, "version", _MOST_VERSION_CHARACTERS)
    said = _text(found, "instance", 64)
    return Hello(found["node"], zone, version, instance_of(certificate) if certificate else said)


def why(error: Exception) -> Exception:
    """Return a failure as a refusal, if it is one by TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return RefusedError(f"its certificate is of another secret: {error.verify_message}")
    alert = str(getattr(error, "reason", ""))
    if isinstance(error, ssl.SSLError) and ("ALERT" in alert or "VERSION" in alert):
        return RefusedError(f"TLS with it fails ({alert}): another secret, or encryption off there")
    return error


def _text(found: dict[str, object], name: str, most: int) -> str:
    text = found.get(name, "")
    if not isinstance(text, str) or len(text) > most or not (text.isprintable()):
        raise LineError(f"its hello has a bad {name}")
    return text
