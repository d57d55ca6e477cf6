"""Checkpoints of random weights, which differ from released ones in nothing but their values.

    synthesize("vila1.5-3b", Path("vila1.5-tiny"))

family.py      what a family is made of; `tiny` makes it small
families.py    the families by name
components.py  names and shapes of a family's tensors
weights.py     their random values
tokenizers/    tokenizers of each kind
configs.py     JSON files
layouts.py     which tensors lie where
formats.py     16 bits, and AWQ's formats
files.py       writing files larger than memory
"""

from __future__ import annotations

from models.checkpoints.synthesis.families import FAMILIES
from models.checkpoints.synthesis.family import Family, tiny
from models.checkpoints.synthesis.formats import OUTPUT_FORMATS
from models.checkpoints.synthesis.layouts import HF_NAMES
from models.checkpoints.synthesis.synthesize import DEFAULT_FORMATS, GROUP_SIZES, synthesize

__all__ = [
    "DEFAULT_FORMATS",
    "FAMILIES",
    "GROUP_SIZES",
    "HF_NAMES",
    "OUTPUT_FORMATS",
    "Family",
    "synthesize",
    "tiny",
]
