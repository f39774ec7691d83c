"""What do all configs share? They are frozen, and know no key but their own."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Values only; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
