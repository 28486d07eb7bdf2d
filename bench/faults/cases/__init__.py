"""The cases; importing this package registers them all."""

from cases import (  # noqa: F401
    abuse, crowd, failover, frozen, names, overload, refusals, reload, replicas, smuggling, streams, stuck, wire,
)  # fmt: skip
