"""A task on text: the next character after eight. Use it as `next_character.py:NextCharacter`.

With `[data] path`, the file that a peer names, in UTF-8; without, a short text that is in here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from p2pfl import Data, Examples, Task

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,'-"
"""All peers need the same. Other characters become spaces, and several spaces become one."""

CONTEXT = 8
HELD_OUT = 0.2
LONGEST = 1_000_000
"""Characters that are read of a file: each takes 64 bytes as an example."""

TEXT = """
Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and
dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether
that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that
war. We have come to dedicate a portion of that field, as a final resting place for those who here gave their lives
that that nation might live. It is altogether fitting and proper that we should do this. But, in a larger sense, we can
not dedicate, we can not consecrate, we can not hallow this ground. The brave men, living and dead, who struggled here,
have consecrated it, far above our poor power to add or detract. The world will little note, nor long remember what we
say here, but it can never forget what they did here. It is for us the living, rather, to be dedicated here to the
unfinished work which they who fought here have thus far so nobly advanced. It is rather for us to be here dedicated to
the great task remaining before us, that from these honored dead we take increased devotion to that cause for which
they gave the last full measure of devotion, that we here highly resolve that these dead shall not have died in vain,
that this nation, under God, shall have a new birth of freedom, and that government of the people, by the people, for
the people, shall not perish from the earth.
"""
"""Abraham Lincoln's address at Gettysburg, 1863, in the copy that Bliss has; in the public domain."""


class NextCharacter(Task):
    """Characters become vectors, and those of a context one hidden layer (Bengio et al. 2003, JMLR 3)."""

    classes = tuple("(space)" if character == " " else character for character in ALPHABET)

    def model(self) -> nn.Module:
        """Take [n, 8] places in the alphabet, give [n, 31] logits."""
        return nn.Sequential(
            nn.Embedding(len(ALPHABET), 8), nn.Flatten(), nn.Linear(8 * CONTEXT, 64), nn.Tanh(),
            nn.Linear(64, len(ALPHABET)),
        )  # fmt: skip

    def data(self, settings: Mapping[str, object]) -> Data:
        """Read a text; its last fifth is held out, and each of `peers` takes a passage of the rest, by its `index`."""
        path = settings.get("path")
        contexts, following = examples_of(TEXT if path is None else read(Path(str(path))))
        peers, index = int(str(settings.get("peers", 1))), int(str(settings.get("index", 0)))
        split = round((1 - HELD_OUT) * len(following))
        # Contexts that reach across the split belong to nobody.
        train = Examples(contexts[: split - CONTEXT], following[: split - CONTEXT])
        start, end = len(train) * index // peers, len(train) * (index + 1) // peers
        own = Examples(train.inputs[start:end], train.targets[start:end])
        return Data(own, Examples(contexts[split:], following[split:]))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Plain SGD; on the text in here, 0.1 took three times as many rounds, 1.0 overfitted at once."""
        return torch.optim.SGD(parameters, lr=0.3)

    def read_inputs(self, path: Path) -> Tensor:
        """Read a text: a context for each of its characters but the first eight."""
        return examples_of(read(path))[0]


def read(path: Path) -> str:
    """Read a text, or as much of it as is allowed."""
    with path.open(encoding="utf-8") as file:
        return file.read(LONGEST)


def examples_of(text: str) -> tuple[Tensor, Tensor]:
    """Return contexts, int64 [n, 8], and the characters that follow them, int64 [n]."""
    kept = "".join(character if character in ALPHABET else " " for character in text.lower())
    places = torch.tensor([ALPHABET.index(character) for character in " ".join(kept.split())])
    if len(places) <= 4 * CONTEXT:
        raise ValueError(f"a text of {len(places)} characters; it needs more than {4 * CONTEXT}")
    return places.unfold(0, CONTEXT, 1)[:-1], places[CONTEXT:]
