"""`peer.toml`: what one peer keeps for itself. Paths are relative to the file's folder."""

import ipaddress
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from p2pfl.core.charter import check_name
from p2pfl.core.settings import Settings

_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HostName = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=253)]
"""RFC 1123, section 2.1."""


class LoggingConfig(Settings):
    """What a peer writes for those who keep it running.

    Attributes:
        level: the least serious lines that are written; off: none beside the trace.
        format: lines for people, or one JSON object a line.
        file: relative to the folder of `peer.toml`; empty: stderr, which a service manager keeps.
        file_bytes: after which a file is put aside and a new one begun.
        files: that are kept beside it.
        trace_bytes: the same for the trace, of which one is kept beside it. Measured: 500 bytes a round among eight
            members, so the default holds the last 128,000 rounds at least.
    """

    level: Literal["off", "debug", "info", "warning", "error"] = "off"
    format: Literal["text", "json"] = "text"
    file: str = ""
    file_bytes: Annotated[int, Field(ge=10_000)] = 10_000_000
    files: Annotated[int, Field(ge=1, le=100)] = 5
    trace_bytes: Annotated[int, Field(ge=10_000)] = 64_000_000


class MetricsConfig(Settings):
    """Where a peer answers those who watch it.

    Attributes:
        port: of the HTTP endpoint; 0: none.
        address: that it binds.
        exposed: allows addresses that others may reach. Nobody is asked who they are there.
        names: host names that requests may be for, beside addresses; a web page with such a name could read the answer.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    address: str = "127.0.0.1"
    exposed: bool = False
    names: list[HostName] = Field(default_factory=list, max_length=16)

    @model_validator(mode="after")
    def _check_address(self) -> "MetricsConfig":
        try:
            address = ipaddress.ip_address(self.address)
        except ValueError as error:
            raise ValueError(f"address: {self.address!r} is no IP address; write 127.0.0.1") from error
        if not address.is_loopback and not self.exposed:
            raise ValueError(
                f"address: {self.address} is not a loopback address, and whoever reaches it may read the metrics; "
                "write 127.0.0.1, or exposed = true if a firewall stands before it"
            )
        return self


class PeerConfig(Settings):
    """One peer's own settings.

    Attributes:
        name: this member's name in the charter.
        charter: the charter's file.
        identity: the file of the private key.
        passphrase_file: the file of the key's passphrase; if empty, see `p2pfl.node.store.ask_passphrase`.
        run: the folder for this peer's trace and model.
        listen: multiaddresses to bind.
        announce: multiaddresses that others reach this peer at; `charter join` writes them into the draft. If they
            differ from the charter's later, the peer tells the other members where it is now.
        relay: whether this peer leads members to members that cannot be dialled, who announce an address over it. What
            they send passes through it encrypted end to end.
        mdns: whether this peer tells the local network that it is there, and looks for other members on it. Off unless
            asked for: whoever is on that network learns the peer id and the address.
        seed: draws the order of the training examples.
        threads: of local steps and evaluations. One by default: where peers share a machine, more take longer, and for
            small models, too. The last bits of what steps give depend on it.
        evaluate_every: rounds between evaluations on the held-out data.
        history_every: rounds between copies of the model in `history.f32`, for drawing the consensus distance; 0: none.
        stop_seconds: for a round to end in once the peer was asked to stop; then it leaves in the middle of it. A
            guess: the customary deadlines.round, and what leaving takes.
        logging: what it writes for operators.
        metrics: where it answers monitoring.
        data: handed to the task as it is. The last table of a new file, to which members add their lines.
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
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    history_every: Annotated[int, Field(ge=0)] = 0
    stop_seconds: Annotated[float, Field(gt=0, le=86400)] = 75.0
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    data: dict[str, Any] = Field(default_factory=dict)

    _check_name = field_validator("name")(check_name)
