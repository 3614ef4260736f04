"""The scheduler's data: requests with their progress, and the scheduler output of one step."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from octavo.engine.block_pool import root_of
from octavo.images import ImagePatches
from octavo.messages import EngineRequest, FinishReason

__all__ = ["EncoderPart", "NewToken", "Request", "RequestImage", "ScheduledRequest", "SchedulerOutput", "Status"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class RequestImage(NamedTuple):
    """An image whose tokens are [start, stop) of a request. key: equal for equal images of requests that may share."""

    start: int
    stop: int
    key: bytes
    image: ImagePatches


class EncoderPart(NamedTuple):
    """What a step encodes of an image: part `part` of `parts`, the last of which makes its features."""

    image: RequestImage
    part: int = 0
    parts: int = 1


class Request:
    """The progress of one sequence. Only the scheduler changes it."""

    def __init__(self, request: EngineRequest, max_model_len: int):
        self.request_id = request.request_id
        self.params = request.params
        self.eos_token_ids = request.eos_token_ids
        self.ending = request.eos_token_ids if not request.params.ignore_eos else frozenset[int]()  # tokens that end it unnamed
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.prompt_token_ids = request.prompt_token_ids
        self.rotary_delta = request.rotary_delta
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)  # prompt and output
        self.num_pending = 0  # tokens sampled by scheduled steps whose values `update` has not received yet
        self.last_step = 0  # the number of the last step that it had a part in
        self.num_computed_tokens = 0  # tokens whose KV is in the cache, or will be after the steps scheduled so far
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when the request first started
        self.num_preemptions = 0
        self.block_ids: list[int] = []  # block i holds the tokens [i * block_size, (i + 1) * block_size)
        self.cache_root = root_of(request.cache_salt)
        self.images = tuple(
            RequestImage(placed.start, placed.stop, self.cache_root + placed.image.digest, placed.image)
            for placed in request.images
        )
        self.block_hashes: list[bytes] = []  # hashes of its first full blocks, computed on demand; they outlive the blocks
        self.status = Status.WAITING
        limit = max_model_len if self.params.max_tokens is None else self.num_prompt_tokens + self.params.max_tokens
        self.max_total_tokens = min(limit, max_model_len)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def images_within(self, start: int, stop: int) -> Sequence[RequestImage]:
        """The images some of whose tokens are among [start, stop). A step asks for each request, which may have many."""
        first = bisect_right(self.images, start, key=lambda image: image.stop)
        return self.images[first : bisect_left(self.images, stop, first, key=lambda image: image.start)]

    def block_extra(self, start: int, stop: int) -> bytes:
        """What a block of the tokens [start, stop) is hashed with beside their ids, which do not tell images apart."""
        return b"".join(
            image.image.digest + (start - image.start).to_bytes(8, "little", signed=True)
            for image in self.images_within(start, stop)
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, including pending ones."""
        return len(self.token_ids) + self.num_pending

    @property
    def complete(self) -> bool:
        """Whether no more tokens may be sampled. `update` finishes the request once the last token's value is known."""
        return self.num_tokens >= self.max_total_tokens

    def finish_of(self, token: int) -> tuple[FinishReason | None, int | None]:
        """Finish reason and stop reason if `token`, just appended, ends the request."""
        named = token in self.stop_token_ids
        if (named or token in self.ending) and self.num_output_tokens >= self.params.min_tokens:
            return "stop", token if token not in self.ending else None
        return ("length" if len(self.token_ids) >= self.max_total_tokens else None), None


class ScheduledRequest(NamedTuple):
    """One request's part of a step, which computes its tokens [start, start + num_tokens)."""

    request: Request
    start: int
    num_tokens: int
    samples: bool  # whether the step computes the request's last token and so samples the next one
    pending: int = 0  # of its tokens, how many the host does not know yet; its one token is the last of them


@dataclass(slots=True)
class SchedulerOutput:
    """Scheduler output: the work of one step, and what scheduling it changed. Items are in order of arrival."""

    budget: int  # tokens that the step has room for
    image_budget: int = 0  # image tokens that the vision tower has room for
    items: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # lost their blocks and wait again
    failed: list[tuple[Request, str]] = field(default_factory=list)  # finished, each with an error sentence
    images: list[EncoderPart] = field(default_factory=list)  # to encode before the step
    evicted: list[bytes] = field(default_factory=list)  # keys of images whose features are dropped before that
    started: list[str] = field(default_factory=list)  # ids of requests scheduled for the first time
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # prompt tokens found there

    @property
    def sampling(self) -> list[ScheduledRequest]:
        """The items that sample a token, in the order that `Scheduler.update` takes them."""
        return [item for item in self.items if item.samples]

    def report(self, empty: SchedulerOutput) -> None:
        """Counts what scheduling `empty`, which has no items and is no step, changed: it may have started a request whose image
        is not encoded yet."""
        self.preempted += empty.preempted
        self.started += empty.started
        self.prefix_queries += empty.prefix_queries
        self.prefix_hits += empty.prefix_hits


class NewToken(NamedTuple):
    """A token of one request. stop_reason is the stop token that ended the request; None for EOS."""

    request: Request
    token: int
    finish_reason: FinishReason | None
    stop_reason: int | None
