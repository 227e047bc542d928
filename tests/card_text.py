"""Reading the generated blocks of a card."""

import re

from fs_psm_hf.cards.merge import parse_blocks, split_card


def blocks(text):
    return {name: block for name, block in parse_blocks(split_card(text)[3], "old")[0] if name}


def names_of_blocks(text):
    return re.search(r"<!-- fs-psm blocks: ([^;]*);", text)[1].split(", ")
