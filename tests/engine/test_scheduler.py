"""Every request gets the tokens it would get alone, whatever the scheduler does with memory meanwhile.

The judge is `Engine`, whose cache holds, in the slot of each computed token, a digest of the prefix that ends there. A step
writes digests through the block tables, then reads every position of every scheduled request back: a block that was given
to two requests, evicted too early, or found under a wrong name shows at once. The "model" makes the next token of the digest
that it reads at the last position. An image's tokens are alike to the scheduler; the digest has what the image shows instead,
and only if the device has encoded the image and not evicted it.

A step is computed when it is launched, as a device runs its queue in order. What it chose is shown to the scheduler when it is
taken, at will after the next one was launched; a pending token reaches that one from the step before.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from cases import cases
from engine.books import check_books, check_images
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from octavo.engine.block_pool import BlockPool
from octavo.engine.encoder_cache import EncoderCache
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import EncoderPart, Status
from octavo.images import Grid, ImagePatches, PlacedImage
from octavo.messages import EngineRequest, SamplingParams

VOCAB = 11
EOS = frozenset({0})
IMAGE = 9  # the token in an image's places


def digest(before, token):
    return ((before ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x1234567) % (1 << 61)


def digests(tokens):
    result = [0]
    for token in tokens:
        result.append(digest(result[-1], token))
    return result[1:]


def picture(name, tokens):
    return ImagePatches(None, None, 1, Grid(1, 2, 2 * tokens), tokens, bytes([name]) * 32)


def shown(prompt, images):
    """What a model sees: in the places of an image's tokens, parts of the image."""
    seen = list(prompt)
    for start, image in images:
        seen[start : start + image.tokens] = [VOCAB + 100 * image.digest[0] + n for n in range(image.tokens)]
    return seen


def predict(last_digest):
    return (last_digest >> 20) % VOCAB


def alone(prompt, params, max_model_len):
    """The output, finish reason and stop reason of a request that has the model for itself."""
    output, last = [], digests(prompt)[-1]
    while True:
        output.append(predict(last))
        last = digest(last, output[-1])
        if len(output) >= params.min_tokens:
            if output[-1] in EOS and not params.ignore_eos:
                return output, "stop", None
            if output[-1] in params.stop_token_ids:
                return output, "stop", output[-1]
        if len(prompt) + len(output) == max_model_len or len(output) == params.max_tokens:
            return output, "length", None


@dataclass
class Track:
    """What the test knows of one request."""

    request: object
    prompt: list  # as the model sees it
    params: SamplingParams
    output: list = field(default_factory=list)
    chosen: list = field(default_factory=list)  # the output and what the device chose after it
    next_position: int | None = None  # None: it has yet to be (re)started
    end: tuple | None = None


class Engine:
    """A scheduler, a cache and a model, checked at every step."""

    def __init__(
        self, num_blocks=64, block_size=4, seqs=8, budget=64, max_model_len=64, caching=True, image_room=40, image_budget=16
    ):
        self.pool = BlockPool(num_blocks, block_size, caching)
        self.cache = EncoderCache(image_room)
        self.scheduler = Scheduler(self.pool, seqs, budget, max_model_len, self.cache, image_budget)
        self.features = set()  # keys of the images that the device has encoded
        self.begun = {}  # those of which it has encoded a part -> how many
        self.encoded = 0
        self.started = set()  # names of the requests that have had blocks
        self.slots = [None] * (num_blocks * block_size)
        self.tracks = {}
        self.live = {}
        self.arrivals = 0
        self.hits = self.preemptions = self.waited = 0
        self.script = None  # request id -> tokens that the model is made to say
        self.flight = deque()  # steps that were launched and not taken: schedule, tokens by request id

    def add(self, prompt, script=None, salt=None, images=(), **params):
        """`images`: (place in the prompt, name, tokens) of each."""
        params = SamplingParams(**params)
        name = f"r{self.arrivals}"
        self.arrivals += 1
        placed = tuple(PlacedImage(place, picture(image, tokens)) for place, image, tokens in images)
        ids = list(prompt)
        for place, image in placed:
            ids[place : place + image.tokens] = [IMAGE] * image.tokens
        request = self.scheduler.add(EngineRequest(name, ids, params, EOS, cache_salt=salt, images=placed))
        self.tracks[name] = self.live[name] = Track(request, shown(ids, placed), params)
        if script is not None:
            self.script = {**(self.script or {}), name: script}
        return name

    def abort(self, name):
        aborted = self.scheduler.abort(name)
        assert aborted is self.tracks[name].request
        assert aborted.status is Status.FINISHED
        self.live.pop(name).end = ("abort", None)
        self.check()

    @property
    def has_work(self):
        return self.scheduler.has_work or bool(self.flight)

    def step(self, abort_meanwhile=(), ahead=False):
        """One step; returns the schedule and what `update` made of it. `ahead`: the next one is launched before."""
        if not self.flight:
            self.launch()
        if ahead:
            self.launch()
        for name in abort_meanwhile:
            if name in self.live:
                self.abort(name)
        return self.take()

    def launch(self):
        """Schedules and computes a step. One without items is done with, if another is in flight."""
        schedule = self.scheduler.schedule()
        for request in schedule.preempted:
            self.live[request.request_id].next_position = None
            assert request.block_ids == []
            assert request.num_computed_tokens == 0
        for request, reason in schedule.failed:
            self.live.pop(request.request_id).end = ("failed", reason)
        self.started |= set(schedule.started)
        self._encode(schedule)
        self._check_schedule(schedule)
        if schedule.items or not self.flight:
            self.flight.append((schedule, self._run(schedule)))
        self.check()
        return schedule

    def take(self):
        schedule, sampled = self.flight.popleft()
        news = self.scheduler.update(schedule, list(sampled.values()))
        alive = [i.request for i in schedule.sampling if self.tracks[i.request.request_id].end is None]
        assert [new.request for new in news] == alive
        for request, token, finish_reason, stop_reason in news:
            track = self.tracks[request.request_id]
            track.output.append(token)
            if finish_reason:
                assert request.status is Status.FINISHED
                self.live.pop(request.request_id).end = (finish_reason, stop_reason)
        self.check()
        return schedule, news

    def drain(self, limit=5000, ahead=False):
        for _ in self.until_idle(limit):
            self.step(ahead=ahead)
        assert not self.live
        assert self.pool.num_free == self.pool.num_blocks
        assert self.pool.usage == 0
        assert self.cache.held == 0
        return self

    def until_idle(self, limit=5000):
        """For a loop that makes a step each time."""
        for _ in range(limit):
            if not self.has_work:
                return
            yield
        raise AssertionError("the scheduler does not come to an end")

    def tokens(self, name):
        return self.tracks[name].output

    def _encode(self, schedule):
        """What the vision tower does before the step."""
        assert len(set(schedule.evicted)) == len(schedule.evicted)
        self.features -= set(schedule.evicted)
        for key in schedule.evicted:
            self.begun.pop(key, None)
        most, tokens = self.scheduler.image_tokens, 0
        for found, part, parts in schedule.images:
            assert found.key not in self.features, "an image is encoded that the device has"
            assert (parts, self.begun.pop(found.key, 0)) == (-(-found.image.tokens // most), part), "a part is left out"
            if part + 1 == parts:
                self.features.add(found.key)
                self.encoded += 1
            else:
                self.begun[found.key] = part + 1
            tokens += min(found.image.tokens, most)
        assert len(self.begun) <= 1, "one image at a time is encoded in parts"
        assert tokens <= most

    def _run(self, schedule):
        size, written = self.pool.block_size, set()
        before = self.flight[-1][1] if self.flight else {}
        known = {}
        for item in schedule.items:
            request, stop = item.request, item.start + item.num_tokens
            track = self.tracks[request.request_id]
            known[request] = (track.prompt + track.chosen)[:stop]
            within = request.images_within(item.start, stop)
            assert within == tuple(one for one in request.images if one.start < stop and item.start < one.stop)
            assert self.features >= {one.key for one in within}, "an image's tokens are computed without the image"
            inputs = [before[request.request_id]] if item.pending else self._seen(request)[item.start : stop]
            assert inputs == known[request][item.start :]
            expected = digests(known[request])
            for p in range(item.start, stop):
                slot = request.block_ids[p // size] * size + p % size
                assert slot not in written, "two requests write to one slot"
                written.add(slot)
                self.slots[slot] = expected[p]
        sampled = {}
        for item in schedule.items:  # after all writes: what one request writes must not disturb another
            request, stop = item.request, item.start + item.num_tokens
            read = [self.slots[request.block_ids[p // size] * size + p % size] for p in range(stop)]
            assert read == digests(known[request]), "a request reads what is not its own"
            if item.samples:
                script = (self.script or {}).get(request.request_id)
                place = stop - request.num_prompt_tokens
                token = predict(read[-1]) if script is None else [*script, *[1] * 9][place]  # it may be asked once too often
                sampled[request.request_id] = token
                self.tracks[request.request_id].chosen.append(token)
        return sampled

    @staticmethod
    def _encodes(request, schedule):
        """`request` if the step encodes an image of it."""
        return request if {part.image.key for part in schedule.images} & {one.key for one in request.images} else None

    def _seen(self, request):
        return shown(request.token_ids, [(one.start, one.image) for one in request.images if one.key in self.features])

    def _check_schedule(self, schedule):
        s = self.scheduler
        arrivals = [int(i.request.request_id[1:]) for i in schedule.items]
        assert arrivals == sorted(arrivals)
        if s.running and not self.flight and not schedule.failed:
            first = [item.request for item in schedule.items[:1]] or [self._encodes(s.running[0], schedule)]
            assert first == [s.running[0]], "the oldest request does not advance"
        stats = s.stats(schedule)
        assert stats.iteration_tokens == sum(i.num_tokens for i in schedule.items) <= s.max_num_batched_tokens
        assert stats.num_preemptions == len(schedule.preempted)
        assert stats.prefix_cache_hits <= stats.prefix_cache_queries
        assert schedule.items or schedule.images or schedule.failed or self.flight, "a step with work did nothing"
        assert not (schedule.preempted and any(self.flight_of(r) for r in s.running))
        self.waited += not schedule.items and any(not r.complete for r in s.running)
        assert len({id(i.request) for i in schedule.items}) == len(schedule.items)
        self.hits += schedule.prefix_hits
        self.preemptions += len(schedule.preempted)
        for item in schedule.items:
            track, request = self.live[item.request.request_id], item.request
            if track.next_position is None:
                assert not schedule.preempted, "admitted in a step that preempted"
                assert item.start % self.pool.block_size == 0
                if not request.num_preemptions:
                    assert request.request_id in self.started
                    assert request.num_cached_tokens == item.start < request.num_prompt_tokens
                if track.params.prompt_logprobs is not None:
                    assert item.start == 0
            else:
                assert item.start == track.next_position, "a position is computed twice, or never"
            track.next_position = item.start + item.num_tokens
            assert item.num_tokens >= 1
            assert request.num_tokens <= request.max_total_tokens, "it cannot have another token"
            assert item.samples == (track.next_position == request.num_tokens - item.samples)
            assert item.pending == max(0, track.next_position - len(request.token_ids))
            assert request.num_computed_tokens == track.next_position
            assert len(request.block_ids) == self.pool.blocks_for(request.num_tokens - item.samples)

    def check(self):
        """The books agree, and the order of arrival is kept."""
        s = self.scheduler
        check_books(self.pool, (r.block_ids for r in s.running))
        check_images(self.cache, {*self.features, *self.begun}, self._begun())
        assert len(s.running) <= s.max_num_seqs
        assert all(r.status is Status.RUNNING for r in s.running)
        assert all(r.status is Status.WAITING and not r.block_ids and not r.num_pending for r in s.waiting)
        assert all(r.num_pending == self.flight_of(r) for r in s.running)
        order = [int(r.request_id[1:]) for r in [*s.running, *s.waiting]]
        assert order == sorted(order)
        assert {f"r{i}" for i in order} == set(self.live)
        assert s.has_work == bool(order)
        # only the youngest may be in the middle of its prefill, unless the budget cannot even serve all decodes
        if len(s.running) <= s.max_num_batched_tokens:
            assert all(r.num_tokens - r.num_computed_tokens <= 1 for r in s.running[:-1])

    def _begun(self):
        """The images in the middle of which a request's last step has ended."""
        for request in self.scheduler.running:
            stop = self.tracks[request.request_id].next_position
            if stop is not None:
                yield from ((request.request_id, one.key) for one in request.images if one.start < stop < one.stop)

    def flight_of(self, request):
        """How many steps in flight choose a token for `request`."""
        return sum(item.request is request for schedule, _ in self.flight for item in schedule.sampling)

    def check_results(self):
        """Everything that ended of itself has the tokens it would have alone."""
        roomy = self.pool.num_blocks * self.pool.block_size >= self.scheduler.max_model_len
        for track in self.tracks.values():
            names, request = [], track.request
            count = len(request.block_hashes)
            self.pool.hash_blocks(names, request.token_ids, count, request.cache_root, request.block_extra)
            assert request.block_hashes == names
            largest = max((one.image.tokens for one in track.request.images), default=0)
            prompt_fits = 0 < len(track.prompt) < self.scheduler.max_model_len and largest <= self.cache.capacity
            if not prompt_fits:
                assert track.end[0] in ("failed", "abort")
                assert track.output == []
                continue
            output, *end = alone(track.prompt, track.params, self.scheduler.max_model_len)
            assert track.output == output[: len(track.output)]
            if track.end[0] == "failed":
                assert not roomy
                assert self.pool.blocks_for(len(track.prompt) + len(track.output)) > self.pool.num_blocks
            elif track.end[0] != "abort":
                assert (track.output, track.end) == (output, tuple(end))


def items(schedule):
    return [(i.request.request_id, i.start, i.num_tokens, i.samples) for i in schedule.items]


# Order, budget, chunks


def test_a_prompt_then_one_token_a_step():
    engine = Engine()
    engine.add([1, 2, 3], script=[5, 6, 7], max_tokens=3)
    assert items(engine.step()[0]) == [("r0", 0, 3, True)]
    assert items(engine.step()[0]) == [("r0", 3, 1, True)]
    assert items(engine.step()[0]) == [("r0", 4, 1, True)]
    assert engine.tokens("r0") == [5, 6, 7]
    assert engine.tracks["r0"].end == ("length", None)
    engine.drain()


def test_a_long_prompt_is_cut_and_decodes_come_first():
    engine = Engine(budget=8)
    engine.add([1, 2], script=[5] * 9, max_tokens=9)
    engine.add(range(20), script=[5] * 9, max_tokens=2)
    engine.add([3], script=[5] * 9, max_tokens=2)
    assert items(engine.step()[0]) == [("r0", 0, 2, True), ("r1", 0, 6, False)]
    assert items(engine.step()[0]) == [("r0", 2, 1, True), ("r1", 6, 7, False)]
    assert items(engine.step()[0]) == [("r0", 3, 1, True), ("r1", 13, 7, True)]
    assert items(engine.step()[0]) == [("r0", 4, 1, True), ("r1", 20, 1, True), ("r2", 0, 1, True)]
    engine.drain()


def test_no_more_than_max_num_seqs_and_first_come_first_served():
    engine = Engine(seqs=2)
    for _ in range(4):
        engine.add([1, 2], script=[5] * 2, max_tokens=2)
    started = []
    for _ in engine.until_idle():
        schedule, _ = engine.step()
        assert len(schedule.items) == 2
        waiting = len(engine.scheduler.waiting)
        running = len(engine.scheduler.running)
        assert running <= 2
        stats = engine.scheduler.stats(schedule)
        assert (stats.num_running, stats.num_waiting) == (running, waiting)
        started.append(schedule.started)
    assert started == [["r0", "r1"], [], ["r2", "r3"], []]


def test_a_budget_smaller_than_the_decodes_still_serves_all():
    engine = Engine(budget=2, seqs=5)
    for i in range(5):
        engine.add([i + 1], max_tokens=6)
    engine.drain()
    engine.check_results()


def test_waits_for_memory_with_a_block_to_spare_for_each_running_request():
    engine = Engine(num_blocks=5, caching=False)
    engine.add([1] * 8, script=[5] * 9, max_tokens=2)
    engine.add([2] * 12, script=[5] * 9, max_tokens=2)
    assert items(engine.step()[0]) == [("r0", 0, 8, True)]  # three blocks are free and wanted, but one is kept for r0
    assert items(engine.step()[0]) == [("r0", 8, 1, True)]
    assert items(engine.step()[0]) == [("r1", 0, 12, True)]
    engine.drain()
    assert engine.preemptions == 0


def test_a_request_that_does_not_fit_holds_up_those_behind_it():
    engine = Engine(num_blocks=6, caching=False)
    engine.add([1] * 8, script=[5] * 9, max_tokens=2)
    engine.add([2] * 16, script=[5] * 9, max_tokens=2)
    engine.add([3], script=[5] * 9, max_tokens=2)
    assert items(engine.step()[0]) == [("r0", 0, 8, True)]
    engine.step()
    assert [name for name, *_ in items(engine.step()[0])] == ["r1", "r2"]
    engine.drain()


# Ends


@cases(
    ("params", "script", "length", "end"),
    [
        ({"max_tokens": 4}, [5, 0, 5, 5], 2, ("stop", None)),
        ({"max_tokens": 4, "ignore_eos": True}, [5, 0, 5, 5], 4, ("length", None)),
        ({"max_tokens": 4, "stop_token_ids": [7, 8]}, [5, 5, 8, 5], 3, ("stop", 8)),
        ({"max_tokens": 4, "stop_token_ids": [0]}, [5, 0, 5, 5], 2, ("stop", None)),
        ({"max_tokens": 4, "stop_token_ids": [0], "ignore_eos": True}, [5, 0, 5, 5], 2, ("stop", 0)),
        ({"max_tokens": 2, "stop_token_ids": [8]}, [5, 8], 2, ("stop", 8)),
        ({"max_tokens": 5, "min_tokens": 3, "stop_token_ids": [8]}, [0, 8, 5, 0, 5], 4, ("stop", None)),
        ({"max_tokens": 1}, [5], 1, ("length", None)),
        ({"max_tokens": None}, [5] * 99, 10, ("length", None)),
        ({"max_tokens": 99}, [5] * 99, 10, ("length", None)),
        ({"max_tokens": 99, "min_tokens": 50}, [0] * 99, 10, ("length", None)),
    ],
)
def test_ends(params, script, length, end):
    engine = Engine(max_model_len=13)
    name = engine.add([1, 2, 3], script=script, **params)
    engine.drain()
    assert engine.tokens(name) == script[:length]
    assert engine.tracks[name].end == end


def test_update_wants_one_token_for_each_that_samples():
    engine = Engine()
    engine.add([1, 2, 3])
    schedule = engine.scheduler.schedule()
    with pytest.raises(ValueError, match="shorter"):
        engine.scheduler.update(schedule, [])


def test_an_id_in_use_is_refused_and_a_finished_one_is_not():
    scheduler = Engine().scheduler
    scheduler.add(EngineRequest("a", [1], SamplingParams()))
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(EngineRequest("a", [1], SamplingParams()))
    scheduler.abort("a")
    scheduler.add(EngineRequest("a", [1], SamplingParams()))


def test_the_prompt_given_is_not_changed():
    prompt = [1, 2, 3]
    scheduler = Engine().scheduler
    request = scheduler.add(EngineRequest("a", prompt, SamplingParams()))
    scheduler.update(scheduler.schedule(), [5])
    assert (prompt, request.prompt_token_ids, request.token_ids) == ([1, 2, 3], [1, 2, 3], [1, 2, 3, 5])
    assert (request.num_prompt_tokens, request.num_output_tokens) == (3, 1)


# Aborts


def test_abort_of_waiting_running_and_unknown():
    engine = Engine(seqs=1)
    engine.add([1] * 9, max_tokens=9)
    engine.add([2] * 9, max_tokens=9)
    engine.step()
    engine.abort("r1")
    engine.abort("r0")
    assert not engine.scheduler.has_work
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.scheduler.abort("r0") is None
    assert engine.scheduler.abort("never") is None


def test_abort_while_the_step_runs():
    engine = Engine()
    engine.add([1] * 9, script=[5] * 4, max_tokens=4)
    engine.add([2] * 9, script=[6] * 4, max_tokens=4)
    _, news = engine.step(abort_meanwhile=["r0"])
    assert [(n.request.request_id, n.token) for n in news] == [("r1", 6)]
    assert engine.tokens("r0") == []
    engine.drain()


def test_a_block_of_an_aborted_step_is_not_cached():
    engine = Engine()
    engine.add([1] * 9)
    engine.step(abort_meanwhile=["r0"])
    engine.add([1] * 9)
    engine.drain()
    assert engine.hits == 0


# Requests that can never run


@pytest.mark.parametrize(("prompt", "message"), [([], "this one has 0"), ([1] * 64, "this one has 64"), ([1] * 40, "outgrown")])
def test_an_impossible_prompt_fails_alone(prompt, message):
    engine = Engine(num_blocks=8)
    engine.add(prompt)
    name = engine.add([1, 2], script=[5], max_tokens=1)
    schedule, _ = engine.step()
    assert [(r.request_id, message in reason) for r, reason in schedule.failed] == [("r0", True)]
    assert engine.tracks[name].end == ("length", None)
    engine.drain()


def test_a_prompt_may_fill_the_pool():
    engine = Engine(num_blocks=4)
    engine.add([1] * 16, script=[5], max_tokens=1)
    assert items(engine.step()[0]) == [("r0", 0, 16, True)]
    engine.drain()


def test_a_request_that_outgrows_the_pool_fails_and_the_rest_goes_on():
    engine = Engine(num_blocks=3, block_size=2)
    engine.add([1, 2], script=[5] * 20, max_tokens=20)
    engine.add([3, 4], script=[5] * 2, max_tokens=2)
    engine.drain()
    assert engine.tracks["r0"].end == ("failed", "The request has outgrown the KV cache.")
    assert len(engine.tokens("r0")) == 5  # six slots; the seventh token had none
    assert engine.tracks["r1"].end == ("length", None)


# Preemption


def test_the_youngest_is_preempted_keeps_its_tokens_and_comes_back_first():
    engine = Engine(num_blocks=5, block_size=2, caching=False)
    engine.add([1], script=[5] * 7, max_tokens=7)
    engine.add([2], script=[6] * 7, max_tokens=7)
    engine.add([3], script=[7] * 7, max_tokens=7)
    preempted = []
    for _ in engine.until_idle():
        schedule, _ = engine.step()
        if schedule.preempted:
            preempted += [r.request_id for r in schedule.preempted]
            assert engine.scheduler.waiting[0] is schedule.preempted[-1]
            assert schedule.preempted[-1].num_output_tokens > 0
    assert preempted[0] == "r2"
    assert "r0" not in preempted
    assert [set(t.output) for t in engine.tracks.values()] == [{5}, {6}, {7}]


def test_preemption_with_a_prefix_cache_loses_little():
    engine = Engine(num_blocks=8, block_size=2)
    engine.add([1, 2, 3], max_tokens=10, ignore_eos=True)
    engine.add([4, 5, 6], max_tokens=10, ignore_eos=True)
    starts = []
    for _ in engine.until_idle():
        schedule, _ = engine.step()
        starts += [i.start for i in schedule.items if i.request.num_preemptions and i.num_tokens > 1]
    assert engine.preemptions >= 1
    assert any(starts), "nothing of the preempted request's cache was found again"
    engine.check_results()


def test_a_preempted_request_that_sits_out_keeps_its_place():
    engine = Engine(num_blocks=3, block_size=2, caching=False)
    for token in (1, 2, 3):
        engine.add([token], script=[5] * 9, max_tokens=4)
    for _ in engine.until_idle():
        engine.step()
        if "r0" not in engine.live:
            break
    assert engine.preemptions == 1
    assert engine.scheduler.schedule({"r1"}).items == []  # nor does r2 go before it, though all memory is free
    assert items(engine.step()[0])[0][:2] == ("r1", 0)
    engine.drain()


# The prefix cache


def test_a_second_equal_prompt_computes_its_last_block_alone():
    engine = Engine()
    prompt = list(range(1, 11))
    engine.add(prompt, max_tokens=1)
    engine.step()
    engine.add(prompt, max_tokens=1)
    schedule, _ = engine.step()
    assert items(schedule) == [("r1", 8, 2, True)]
    assert (schedule.prefix_queries, schedule.prefix_hits) == (10, 8)
    assert engine.tracks["r1"].request.num_cached_tokens == 8
    engine.check_results()


def test_of_a_prompt_of_full_blocks_one_block_is_computed():
    engine = Engine()
    for _ in range(2):
        engine.add(range(8), max_tokens=1)
        schedule, _ = engine.step()
    assert items(schedule) == [("r1", 4, 4, True)]


def test_running_requests_share_blocks():
    engine = Engine(num_blocks=6)
    prompt = list(range(8))
    engine.add([*prompt, 1], script=[5] * 3, max_tokens=3)
    engine.step()
    engine.add([*prompt, 2], script=[5] * 3, max_tokens=3)
    engine.step()
    a, b = (engine.tracks[n].request.block_ids for n in ("r0", "r1"))
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert engine.pool.num_free == 2
    engine.drain()


def test_a_chat_turn_finds_the_answer_before_it():
    engine = Engine()
    prompt = list(range(1, 7))
    engine.add(prompt, script=[7, 8, 9, 10, 7, 8, 9], max_tokens=7)
    engine.drain()
    engine.add([*prompt, *engine.tokens("r0"), 1, 2, 3], script=[5], max_tokens=1)
    assert items(engine.step()[0]) == [("r1", 12, 4, True)]


def test_blocks_computed_in_chunks_are_shared_before_the_prompt_is_done():
    engine = Engine(budget=8)
    engine.add(range(24), max_tokens=1)
    engine.step()
    engine.abort("r0")
    engine.add(range(24), max_tokens=1)
    assert items(engine.step()[0]) == [("r1", 8, 8, False)]
    engine.drain()


def test_prompt_logprobs_need_every_position():
    engine = Engine()
    engine.add(range(10), max_tokens=1)
    engine.step()
    engine.add(range(10), max_tokens=1, prompt_logprobs=0)
    schedule, _ = engine.step()
    assert items(schedule) == [("r1", 0, 10, True)]
    assert (schedule.prefix_queries, schedule.prefix_hits) == (0, 0)


def test_requests_of_different_salts_share_nothing():
    engine = Engine()
    hits = []
    for salt in (None, "a", "b", "a", None):
        engine.add(range(10), salt=salt, images=[(2, 1, 3)], max_tokens=1)
        hits.append(engine.step()[0].prefix_hits)
    assert hits == [0, 0, 0, 8, 8]
    assert engine.encoded == 3  # nor what the tower made of an image: how long it takes tells whether another has sent it


def test_caching_can_be_off():
    engine = Engine(caching=False)
    for _ in range(2):
        engine.add(range(10), max_tokens=1)
        schedule, _ = engine.step()
    assert items(schedule) == [("r1", 0, 10, True)]
    assert (schedule.prefix_queries, schedule.prefix_hits) == (0, 0)


def test_a_full_pool_of_cached_blocks_is_free():
    engine = Engine(num_blocks=16)
    for i in range(12):
        engine.add([i] * 60, max_tokens=1)
        engine.drain()
    engine.check_results()


# A step ahead


def test_a_decode_is_scheduled_before_its_token_is_known():
    engine = Engine()
    name = engine.add([1, 2, 3], script=[5, 6, 7], max_tokens=3)
    assert items(engine.launch()) == [("r0", 0, 3, True)]
    (item,) = engine.launch().items
    assert (item.start, item.num_tokens, item.samples, item.pending) == (3, 1, True, True)
    assert (item.request.num_tokens, item.request.num_output_tokens) == (5, 0)
    assert [new.token for new in engine.take()[1]] == [5]
    (item,) = engine.launch().items
    assert (item.start, item.pending) == (4, True)
    assert engine.launch().items == []  # the third token is the last
    engine.drain()
    assert engine.tokens(name) == [5, 6, 7]


def test_a_decode_waits_for_the_rest_of_its_prompt():
    engine = Engine(budget=4)
    engine.add(range(10), script=[5, 6], max_tokens=2)
    launched = [engine.launch() for _ in range(3)]
    assert [items(s) for s in launched] == [[("r0", 0, 4, False)], [("r0", 4, 4, False)], [("r0", 8, 2, True)]]
    assert not any(s.items[0].pending for s in launched)
    assert engine.launch().items[0].pending
    while engine.flight:
        engine.take()
    assert engine.tokens("r0") == [5, 6]


@pytest.mark.parametrize("end", [0, 7])
def test_an_end_is_found_one_step_late_and_the_token_after_it_is_dropped(end):
    engine = Engine()
    engine.add([1, 2, 3], script=[5, end, 9], max_tokens=9, stop_token_ids=[7])
    engine.add([4, 4, 4], script=[6] * 9, max_tokens=9)
    for _ in range(2):
        engine.step(ahead=True)
    assert engine.tokens("r0") == [5, end]
    assert engine.tracks["r0"].end == ("stop", end or None)
    assert [name for name, *_ in items(engine.flight[0][0])] == ["r0", "r1"]
    _, news = engine.step(ahead=True)
    assert [(n.request.request_id, n.token) for n in news] == [("r1", 6)]
    engine.drain(ahead=True)
    assert engine.tokens("r0") == [5, end]


def test_no_ahead_step_takes_memory_from_a_running_request():
    engine = Engine(num_blocks=3, block_size=2, caching=False)
    engine.add([1, 1], script=[5] * 4, max_tokens=4)
    engine.add([2], script=[6] * 4, max_tokens=4)
    engine.step(ahead=True)
    engine.step(ahead=True)
    assert not engine.flight  # r1's third token wants a block, and r0 has two of three
    assert (engine.waited, engine.preemptions) == (1, 0)
    engine.step(ahead=True)
    assert (engine.waited, engine.preemptions) == (1, 1)
    engine.drain(ahead=True)
    assert [engine.tokens(name) for name in ("r0", "r1")] == [[5] * 4, [6] * 4]


def test_a_request_that_waits_for_its_last_token_wants_no_memory():
    engine = Engine(num_blocks=3, caching=False)
    engine.add([1] * 3, script=[5] * 9, max_tokens=2)
    engine.add([2] * 3, script=[6] * 9, max_tokens=3)
    launched = [items(engine.launch()) for _ in range(3)]
    assert launched[1:] == [[("r0", 3, 1, True), ("r1", 3, 1, True)], [("r1", 4, 1, True)]]  # with the last free block
    while engine.flight:
        engine.take()


def test_a_block_is_not_cached_before_its_last_token_is_known():
    engine = Engine(block_size=4)
    engine.add([1, 2, 3], script=[4, 5, 6], max_tokens=3)
    engine.step(ahead=True)  # the step that fills the block is in flight
    engine.add([1, 2, 3, 4, 8], script=[5], max_tokens=1)
    assert items(engine.launch()) == [("r0", 4, 1, True), ("r1", 0, 5, True)]
    engine.abort("r1")
    engine.drain(ahead=True)
    engine.add([1, 2, 3, 4, 8], script=[5], max_tokens=1)
    assert items(engine.launch()) == [("r2", 4, 1, True)]
    engine.drain()


def test_abort_with_two_steps_in_flight():
    engine = Engine(num_blocks=8)
    engine.add([1] * 9, max_tokens=9)
    engine.add([2] * 9, max_tokens=9)
    engine.launch()
    engine.launch()
    engine.abort("r0")
    engine.add([3] * 15, max_tokens=9)  # gets the blocks that r0's step still writes to
    engine.launch()
    engine.drain(ahead=True)
    assert engine.tokens("r0") == []
    engine.check_results()


# Images


def encoded(schedule):
    return [part.image.key[0] for part in schedule.images]


def test_the_tower_has_a_budget_and_whoever_waits_for_it_is_not_overtaken():
    engine = Engine(image_budget=8, image_room=24)
    prompts = [[(2, 1, 4)], [(0, 2, 4), (6, 3, 4)], [], [(1, 4, 9)], [(1, 1, 4)]]
    for images in prompts:
        engine.add([5] * 12, images=images, max_tokens=3, ignore_eos=True)
    first, second, third, fourth = (engine.step()[0] for _ in range(4))
    assert (encoded(first), items(first)) == ([1, 2], [("r0", 0, 12, True), ("r1", 0, 6, False)])
    assert encoded(second) == [3]
    assert items(second) == [("r0", 12, 1, True), ("r1", 6, 6, True), ("r2", 0, 12, True), ("r3", 0, 1, False)]
    assert third.images == [EncoderPart(engine.tracks["r3"].request.images[0], 0, 2)]  # nine tokens take two steps
    assert [item.request.request_id for item in third.items] == ["r0", "r1", "r2"], (
        "meanwhile others decode, and none overtakes"
    )
    assert fourth.images == [EncoderPart(engine.tracks["r3"].request.images[0], 1, 2)]
    assert items(fourth)[-2:] == [("r3", 1, 11, True), ("r4", 0, 12, True)]  # whose image is the first request's
    engine.drain()
    engine.check_results()
    assert engine.encoded == 4


def test_an_image_stays_until_its_last_part_is_computed_and_goes_when_room_is_needed():
    engine = Engine(budget=4, image_room=8)
    engine.add([5] * 12, images=[(2, 1, 8)], max_tokens=1)
    assert encoded(engine.step()[0]) == [1]
    engine.add([5] * 4, images=[(0, 2, 3)], max_tokens=1)
    engine.launch()
    engine.launch()
    assert engine.launch().items == []  # the first image's tokens are scheduled; their steps are not over
    engine.drain()
    assert engine.features == {bytes([2]) * 32}
    engine.add([5] * 4, images=[(0, 2, 3)], max_tokens=1, prompt_logprobs=0)
    assert engine.launch().images == []
    engine.drain()
    engine.check_results()


def test_an_image_is_held_from_its_first_token_to_its_last():
    engine = Engine(budget=8, image_room=8)
    engine.add([5] * 12, images=[(0, 1, 4), (6, 1, 4)], max_tokens=5, ignore_eos=True)
    engine.step()  # its second place is begun
    assert engine.cache.held == 4
    engine.step()
    assert (engine.cache.held, engine.encoded) == (0, 1)
    engine.add([5] * 12, images=[(1, 2, 8)], max_tokens=1)
    assert encoded(engine.step()[0]) == [2]
    assert engine.cache.held == 8
    engine.abort("r1")
    assert engine.cache.held == 0
    engine.add([5] * 3, images=[(0, 3, 9)])
    engine.drain()
    assert engine.tracks["r2"].end[1] == "An image has 9 tokens, and 8 fit into the encoder cache (--mm-processor-cache-gb)."


def test_the_image_that_was_not_needed_for_longest_is_evicted():
    engine = Engine(image_room=9)
    for name in (1, 2, 3, 1, 4):
        engine.add([5] * 4, images=[(0, name, 3)], max_tokens=1, salt="a", prompt_logprobs=0)
        engine.drain()
    assert {key[-1] for key in engine.features} == {1, 3, 4}
    assert engine.encoded == 4


def test_a_cached_prefix_may_end_within_an_image():
    engine = Engine(image_room=6)
    for images, tail in [([(1, 1, 6)], []), ([(1, 1, 6)], []), ([(2, 1, 6)], []), ([(1, 2, 6)], []), ([(1, 1, 6)], [5, 5])]:
        engine.add([5] * 7 + tail, images=images, max_tokens=1)
        hits = engine.step()[0].prefix_hits
        assert hits == (4 if images == [(1, 1, 6)] and engine.arrivals > 1 else 0)  # in another place it is another prefix
    assert engine.encoded == 3  # the last request's image was gone, and half of its tokens were cached
    for place in (0, 1):  # beside a token of text that is the image's
        engine.add([IMAGE] * 4 + [5], images=[(place, 3, 3)], max_tokens=1)
        assert engine.step()[0].prefix_hits == 0
    engine.check_results()


# Everything at once

PICTURES = dict(enumerate([1, 3, 4, 6, 11], 1))  # tokens by name; a number below 0 in a prompt stands for one
PREFIXES = [[-2, 5, 5], [1, -4, -4], [], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 4, 4, 4, 4, 4, 4, 4]]


def with_pictures(parts):
    """A prompt with the pictures in `parts`, whose ids are below 0, and their places."""
    prompt, images = [], []
    for part in parts:
        if part < 0:
            images.append((len(prompt), -part, PICTURES[-part]))
        prompt += [part] if part >= 0 else [IMAGE] * PICTURES[-part]
    return prompt, images


class Machine(RuleBasedStateMachine):
    """Small pools, few tokens, shared prefixes, and anything in any order."""

    @initialize(
        block_size=st.integers(1, 4),
        max_model_len=st.integers(2, 30),
        extra_blocks=st.integers(-3, 8),
        seqs=st.integers(1, 5),
        budget=st.integers(1, 24),
        caching=st.booleans(),
        ahead_at_last=st.booleans(),
        image_room=st.sampled_from([6, 6, 11, 17, 30]),
        image_budget=st.sampled_from([3, 7, 12]),
    )
    def start(self, block_size, max_model_len, extra_blocks, seqs, budget, caching, ahead_at_last, image_room, image_budget):
        self.ahead_at_last = ahead_at_last
        num_blocks = max(1, -(-max_model_len // block_size) + extra_blocks)
        self.engine = Engine(num_blocks, block_size, seqs, budget, max_model_len, caching, image_room, image_budget)

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.one_of(st.integers(0, 2), st.integers(-5, 2)), max_size=6),
        max_tokens=st.one_of(st.none(), st.integers(1, 20)),
        min_tokens=st.sampled_from([0, 0, 5]),
        ignore_eos=st.booleans(),
        stop=st.sampled_from([(), (3,)]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        salt=st.sampled_from([None, None, None, "a"]),
    )
    def add(self, prefix, rest, max_tokens, min_tokens, ignore_eos, stop, prompt_logprobs, salt):
        prompt, images = with_pictures(prefix + rest)
        self.engine.add(
            prompt,
            images=images,
            salt=salt,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens or 5),
            ignore_eos=ignore_eos,
            stop_token_ids=stop,
            prompt_logprobs=prompt_logprobs,
        )

    @precondition(lambda self: self.engine.has_work)
    @rule(ahead=st.one_of(st.lists(st.booleans(), min_size=1, max_size=8), st.just([True] * 8)))
    def steps(self, ahead):
        for one in ahead:
            if self.engine.has_work:
                self.engine.step(ahead=one)

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data(), meanwhile=st.booleans(), ahead=st.booleans())
    def abort(self, data, meanwhile, ahead):
        name = data.draw(st.sampled_from(sorted(self.engine.live)))
        if meanwhile:
            self.engine.step(abort_meanwhile=[name], ahead=ahead)
        else:
            self.engine.abort(name)

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain(ahead=self.ahead_at_last)
            self.engine.check_results()


TestMachine = Machine.TestCase
TestMachine.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


def long_run(seed, steps, ahead=0.0, **kwargs):
    """Requests come and go at random for `steps` steps, of which the part `ahead` is launched before the tokens of the one
    before are taken; returns the engine and the trace of its schedules."""
    rng = random.Random(seed)
    engine, trace = Engine(**kwargs), []
    documents = [[rng.randrange(VOCAB) if rng.random() < 0.9 else -rng.randrange(1, 6) for _ in range(24)] for _ in range(4)]
    for _ in range(steps):
        if rng.random() < 0.35 and len(engine.live) < 20:
            parts = rng.choice(documents)[: rng.randrange(24)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
            prompt, images = with_pictures(parts)
            engine.add(prompt, images=images, max_tokens=rng.choice([None, 1, 4, 16]), ignore_eos=rng.random() < 0.7)
        if engine.has_work:
            unlucky = [rng.choice(sorted(engine.live))] if engine.live and rng.random() < 0.03 else []
            trace.append(items(engine.step(abort_meanwhile=unlucky, ahead=rng.random() < ahead)[0]))
    engine.drain(ahead=bool(ahead))
    engine.check_results()
    return engine, trace


@cases("ahead", [0.0, 0.7, 1.0])
@cases("caching", [True, False])
@cases("budget", [5, 40])
def test_a_long_life_in_little_memory(caching, budget, ahead):
    size = dict(num_blocks=18, block_size=4, seqs=6, max_model_len=64, image_room=12, image_budget=7)
    engine, _ = long_run(budget, 1500, ahead, budget=budget, caching=caching, **size)
    assert len(engine.tracks) > 150
    assert engine.preemptions > 15
    assert (engine.hits > 300) == caching
    assert (engine.waited > 20) == bool(ahead)
    assert engine.encoded > 30


def test_every_rank_decides_alike():
    runs = [long_run(1, 300, num_blocks=18, seqs=6, budget=16)[1] for _ in range(2)]
    assert runs[0] == runs[1]
