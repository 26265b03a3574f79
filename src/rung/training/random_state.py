"""States of torch's random generators: what a resumed run needs to draw the dropout that it would have drawn.

Dropout draws from the generator of the device that it runs on, so on a card the processor's state alone says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CPU_STATE, CARD_STATE = "rng", "rng_card"


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The state of the processor's generator, and of the card's where the run is on one."""
    states = {CPU_STATE: torch.get_rng_state()}
    return states | {CARD_STATE: torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore what `generator_states` gave; a run that goes on elsewhere has no state for its card."""
    torch.set_rng_state(states[CPU_STATE])
    if device.type == "cuda" and CARD_STATE in states:
        torch.cuda.set_rng_state(states[CARD_STATE], device)
