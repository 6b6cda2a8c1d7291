"""One row of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, what that limits and the command that lifts it."""

    group: str
    name: str
    status: Status
    found: str
    limits: str = ""
    remedy: str = ""
