"""`peer.toml`: what one peer keeps for itself. Paths are relative to the file's folder."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from p2pfl.core.charter import check_name
from p2pfl.core.settings import Settings


class PeerConfig(Settings):
    """One peer's own settings.

    Attributes:
        name: this member's name in the charter.
        charter: the charter's file.
        identity: the file of the private key.
        passphrase_file: the file of the key's passphrase; if empty, the environment or the terminal is asked.
        run: the folder for this peer's trace and model.
        listen: multiaddresses to bind.
        announce: multiaddresses that others reach this peer at; `charter join` writes them into the draft. If they
            differ from the charter's later, the peer tells the other members where it is now.
        relay: whether this peer leads members to members that cannot be dialled, who announce an address over it. What
            they send passes through it encrypted end to end.
        mdns: whether this peer tells the local network that it is there, and looks for other members on it. Off unless
            asked for: whoever is on that network learns the peer id and the address.
        seed: draws the order of the training examples.
        evaluate_every: rounds between evaluations on the held-out data.
        history_every: rounds between copies of the model in `history.f32`, for drawing the consensus distance; 0: none.
        data: handed to the task as it is.
    """

    name: str
    charter: str = "charter.toml"
    identity: str = "identity.pem"
    passphrase_file: str = ""
    run: str = "run"
    listen: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("/ip4/0.0.0.0/tcp/4001",)
    announce: Annotated[tuple[str, ...], Field(strict=False)] = ()
    relay: bool = False
    mdns: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    history_every: Annotated[int, Field(ge=0)] = 0
    data: dict[str, Any] = Field(default_factory=dict)

    _check_name = field_validator("name")(check_name)
