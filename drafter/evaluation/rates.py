"""How fast earlier evaluations went on this device: for estimates, never for figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from drafter.files import write_atomic
from drafter.target import Target


class Rates:
    """Seconds per token of earlier evaluations on this device, for estimates only.

    Args:
        folder: Holds `rates.json`; None remembers nothing.
        target: What the rates are of, with its dtype and device.
    """

    def __init__(self, folder: Path | None, target: Target) -> None:
        self._path = folder and folder / "rates.json"
        device = target.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(target.device)
        self._key = f"{target.fingerprint}/{target.dtype}/{device}"

    def get(self, kind: str) -> float | None:
        """Returns seconds per token of `generate`, `replay` or `decode`, if it was measured."""
        found = self._read().get(self._key, {}).get(kind)
        return float(found) if found is not None else None

    def put(self, kind: str, seconds: float, tokens: int) -> None:
        """Keeps a measured rate."""
        if self._path and tokens and seconds > 0:
            rates = self._read()
            rates.setdefault(self._key, {})[kind] = seconds / tokens
            write_atomic(self._path, json.dumps(rates, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text()) if self._path else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
