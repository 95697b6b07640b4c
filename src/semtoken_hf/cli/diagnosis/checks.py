"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "fault", "absent"]


@dataclass(frozen=True)
class Check:
    """One line of `semtoken doctor`.

    Attributes:
        group: heading it stands under.
        name: of what was looked at.
        status: absent: not there, and nothing here needs it.
        found: what there is.
        advice: what to do, or why it is so.
    """

    group: str
    name: str
    status: Status
    found: str
    advice: str = ""


__all__ = ["Check", "Status"]
