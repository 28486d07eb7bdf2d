"""What a scripted upstream has been told to do, and what it has written down."""

import asyncio
from dataclasses import dataclass

from client import WORDS


@dataclass
class Step:
    status: int = 200
    code: str | None = None
    retry_after: int | None = None
    # reset, close, silence (accepts and says nothing), crash (the process ends): before any byte of an answer.
    before: str | None = None
    delay: float = 0.0
    # Between the head and the first token; `early` says what comes with the head: nothing, opening, comment.
    ttft: float = 0.0
    early: str = "nothing"
    itl: float = 0.002
    tokens: int = WORDS
    pad: int = 0
    done: bool = True
    # Cut: at token `cut_at` by fin, rst, half (end of sending, still reading) or clean (ends as HTTP says it should).
    cut_at: int | None = None
    cut: str = "fin"
    # Stall: at token `stall_at` for so many seconds, then resume or close.
    stall_at: int | None = None
    stall_s: float = 0.0
    stall_then: str = "close"
    malformed_at: int | None = None
    # Tokens until the order `release`, then for a random part of `gate_s`.
    gate_s: float | None = None
    body: str | None = None
    # close: the answer has neither length nor chunks.
    framing: str = "chunked"
    # Requests whose prompt has this text end the process.
    crash_on: str | None = None
    refuse_prefill: bool = False
    slow: float = 1.0


class Upstream:
    def __init__(self, name):
        self.name = name
        self.plan = [Step()]
        self.health = 200
        self.slots = None
        self.log = []
        self.attempts = {}
        self.connections = set()
        self.accepted = 0
        self.released = asyncio.Event()

    def behave(self, plan, health=200, slots=None):
        self.plan = [Step(**step) for step in plan]
        self.health = health
        self.slots = asyncio.Semaphore(slots) if slots else None

    def step(self, request_id):
        count = self.attempts[request_id] = self.attempts.get(request_id, 0) + 1
        return count, self.plan[min(count, len(self.plan)) - 1]
