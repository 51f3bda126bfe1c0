"""The five things that a model can have or lack, and that are found out of the loaded model: what a refusal names."""

from __future__ import annotations

INPUT_CUTS = "input cuts"
"""Tokens can be taken out of the rows that its decoder is given, which is hiding them from attention."""
LAYER_CUTS = "layer cuts"
"""Tokens can be taken out of the rows between two decoder layers."""
DECODER_SIGNALS = "decoder signals"
"""Queries, keys and values of its decoder layers can be read, with their rotation and scale."""
TOWER_SIGNALS = "tower signals"
"""Signals of the blocks of its vision tower can be read."""
TOWER_CUTS = "tower cuts"
"""Tokens can be taken out of the rows between two blocks of its vision tower."""

CAPABILITIES = (INPUT_CUTS, LAYER_CUTS, DECODER_SIGNALS, TOWER_SIGNALS, TOWER_CUTS)
