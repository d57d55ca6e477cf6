"""The demo model: a LLaVA-layout model of 4.3 million parameters, trained here from nothing.

It answers questions about drawn shapes, colours, counts, positions and numbers, so that a new
user sees true answers within a minute and the tests have a model that really looks at pictures.
Its checkpoint loads through exactly the code that loads real checkpoints.

    python -m models.demo.train       # 40 minutes on 2 CPU cores; --schedule long: two hours
    python -m models.demo.evaluate    # accuracy and loss on held-out pictures, 16-bit and 4-bit

    scenes.py       what a picture shows, and how it is drawn
    sampling.py     random scenes, backgrounds, canvas sizes, JPEG
    phrasings.py    the many ways in which one question can be asked
    questions.py    what can be asked of a scene, and the true answers
    dialogue.py     questions -> prompts as clients send them
    tokenizer.py    trains the BPE
    labels.py       what lies on each patch, for two auxiliary losses
    roles.py        which words and patches a question is about, for another
    packing.py      pictures and dialogues -> training rows
    batches.py      rows, made ahead in a process of their own
    network.py      the model as it is trained
    optimizer.py    Muon and AdamW on float32 masters
    progress.py     how much is known, while training
    train.py        the schedule
    export.py       the trained model -> the checkpoint's files, 16-bit and 4-bit
    held_out.py     questions that training has not seen
    teacher.py      the loss of true answers under a stored checkpoint
    evaluate.py     held-out questions through `models.load_engine`
    checkpoint/     the model, with its card

For tests and examples, a picture whose content is known:

    from models.demo import DEMO_CHECKPOINT, SceneObject, draw, simple_scene

    simple_scene("red", "circle")                        # one object in the middle of 336 x 336
    draw([SceneObject("circle", "red", x=0.25, y=0.5),
          SceneObject("star", "blue", x=0.75, y=0.5)], size=(320, 240), background="white")
    draw_number("42", size=(200, 100))
"""

from __future__ import annotations

from pathlib import Path

from models.demo.scenes import COLOURS, SHAPES, SceneObject, draw, draw_number, simple_scene

DEMO_CHECKPOINT = Path(__file__).parent / "checkpoint" / "llava-demo"
"""The folder that `load_engine` takes."""

__all__ = [
    "COLOURS",
    "DEMO_CHECKPOINT",
    "SHAPES",
    "SceneObject",
    "draw",
    "draw_number",
    "simple_scene",
]
