"""Matching and packing: rollouts in, training segments and packs out. Never imports torch."""
