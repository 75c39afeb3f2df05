"""Numbers that help shows and that modules far from it use: defaults that are no setting of a recipe.

They stand here because help must not import what uses them: torch takes seconds.
"""

from __future__ import annotations

import math
from typing import Final

SHARD_BYTES: Final = 5 * 10**9
"""A container in a folder that is larger is cut into files of this size."""

N_WINDOWS: Final = 128
N_LINES: Final = 2048
"""Examples that `calibrate` runs."""
N_WINDOWS_COMPARED: Final = 32
N_LINES_COMPARED: Final = 512
"""Examples on which `report --model` compares."""
WINDOW_LENGTH: Final = 512
LINE_LENGTH: Final = 256
"""Most tokens of an example."""
WINDOWS_AT_ONCE: Final = 4
LINES_AT_ONCE: Final = 32
"""Examples that run together."""

STATES_BELOW: Final = ((4e6, 2048), (64e6, 1024), (math.inf, 256))
"""Trellis states by the number of weights: doubling them finds 0.03 dB, and the time of the search doubles."""

FULL_WIDTH: Final = 4096
"""Inputs wider than this keep blocks of their second moments only."""
BLOCK_WIDTH: Final = 512
"""Width of these blocks."""

IN_FLIGHT_BYTES: Final = 128 << 20
"""Dense bytes of the tensors being worked on at one time, unless a single tensor is larger."""
BASE_MEMORY_BYTES: Final = 400 << 20
"""Memory of a process that has torch loaded."""
