"""Model cards: rendered from a folder's config and results, and merged into the card that a human has edited."""

from .merge import merge_card
from .render import render_card
from .write import write_card


__all__ = ["merge_card", "render_card", "write_card"]
