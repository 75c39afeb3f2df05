"""How a checkpoint is to be opened: what the user asked for, and what another process needs to open it likewise."""

from __future__ import annotations

from dataclasses import dataclass, field

from pqcli.limits import Limits


@dataclass(frozen=True)
class Asked:
    """Limits of what its headers may cost; whether modules are read as state dicts, and training state is left out."""

    limits: Limits = field(default_factory=Limits)
    from_module: bool = False
    model_only: bool = False
