"""AsyncEngine with a small deterministic core in a real process: streams, aborts, crashes, ends."""

import asyncio
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from octavo.config import EngineConfig
from octavo.engine import worker
from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.async_engine import AsyncEngine, EngineDead
from octavo.frontend.engine_processes import EngineProcesses
from octavo.frontend.llm import LLM
from octavo.frontend.outputs import OutputProcessor
from octavo.images import Grid, ImagePatches, PlacedImage
from octavo.messages import EngineInfo, EngineStats, Logprob, SamplingParams, StructuredOutput, TokenOutput

sys.path.insert(0, str(Path(__file__).parents[2]))  # the engine's process finds FakeCore by its module's name
CRASH, SLOW, REFUSED, SEED = 666, 667, 668, 669  # prompt tokens that ask the core for something


class FakeCore:
    """Counts on from the prompt's last token, one token a step."""

    def __init__(self, config, progress, place=None):
        progress("weights", 0.5)
        if config.seed == 1:
            raise OctavoError("There is no such model.")
        if config.seed == 2:
            raise ValueError("a bug\nwith lines")
        if config.seed == 3:
            os._exit(7)
        if config.seed == 4:
            time.sleep(60)
        self.info = EngineInfo(100, 4096, 10, 16, "fake", image_tokens=9, report=["a line"])
        self.running = {}

    def add(self, *requests):
        if REFUSED in requests[0].prompt_token_ids:
            raise InvalidRequest("This core does not like that prompt.")
        self.running.update({request.request_id: [request, 0] for request in requests})

    def abort(self, request_id):
        self.running.pop(request_id, None)

    def has_work(self):
        return bool(self.running)

    def step(self):
        outputs = []
        for request_id, state in list(self.running.items()):
            request, done = state
            prompt, params = request.prompt_token_ids, request.params
            if CRASH in prompt and done == 2:
                raise RuntimeError("the device fell off")
            if SLOW in prompt:
                time.sleep(0.02)
            state[1] += 1
            token = params.seed + 100 if SEED in prompt else (prompt[-1] + state[1]) % 4096
            end = "length" if state[1] == (params.max_tokens or 100 - len(prompt)) else None
            logprobs = None if params.logprobs is None else [(Logprob(token, -1.0, 1),)]
            first = params.prompt_logprobs is not None and done == 0
            outputs.append(TokenOutput(request_id, [token], end, None, logprobs, [None] if first else None))
            if end:
                del self.running[request_id]
        return outputs, EngineStats(num_running=len(self.running), iteration_tokens=len(outputs))


async def start(seed=0, **kwargs):
    return await AsyncEngine.start(EngineConfig(seed=seed), make_core=FakeCore, **kwargs)


async def collect(engine, prompt, request_id="r", **params):
    async with aclosing(engine.generate(prompt, SamplingParams(**params), request_id)) as deltas:
        return [delta async for delta in deltas]


def with_engine(test):
    async def main():
        engine = await start()
        try:
            await asyncio.wait_for(test(engine), 20)
        finally:
            await engine.shutdown()
        assert not engine._processes._processes[0].is_alive()

    asyncio.run(main())


def test_streams():
    async def test(engine):
        stats = []
        engine.add_stats_listener(stats.append)
        deltas = await collect(engine, [10], max_tokens=3, logprobs=0)
        assert [d.token_ids for d in deltas] == [[11], [12], [13]]
        assert [d.finish_reason for d in deltas] == [None, None, "length"]
        assert "".join(d.text for d in deltas) == engine.tokenizer.decode([11, 12, 13])
        assert deltas[0].logprobs == [(Logprob(11, -1.0, 1),)]
        assert sum(s.iteration_tokens for s in stats) == 3
        assert stats[-1].num_running == 0
        assert engine.info.report == ["a line"]

    with_engine(test)


def test_256_streams_at_once():
    async def test(engine):
        every = await asyncio.gather(*(collect(engine, [i + 1], f"r{i}", max_tokens=50) for i in range(256)))
        for i, deltas in enumerate(every):
            assert [d.token_ids for d in deltas] == [[i + 2 + k] for k in range(50)]

    with_engine(test)


def test_n_sequences_with_seeds_of_their_own():
    async def test(engine):
        deltas = await collect(engine, [SEED], n=3, seed=5, max_tokens=2, prompt_logprobs=0)
        assert {(d.index, d.token_ids[0]) for d in deltas} == {(0, 105), (1, 106), (2, 107)}
        assert sum(d.finish_reason == "length" for d in deltas) == 3
        assert [d.index for d in deltas if d.prompt_logprobs] == [0]

    with_engine(test)


def test_a_stop_string_ends_the_request_in_the_engine_too():
    async def test(engine):
        stop = engine.tokenizer.decode([45])
        deltas = await collect(engine, [40, SLOW, 40], max_tokens=90, stop=stop)
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason, deltas[-1].token_ids) == ("stop", stop, [45])
        await idle(engine)

    with_engine(test)


async def idle(engine):
    """Returns once the engine says that nothing runs, long before a slow request would have ended."""
    calm = asyncio.Event()
    engine.add_stats_listener(lambda stats: stats.num_running or calm.set())
    await asyncio.wait_for(calm.wait(), 1.0)


@pytest.mark.parametrize("n", [1, 2])
def test_closing_early_aborts(n):
    async def test(engine):
        async with aclosing(engine.generate([SLOW], SamplingParams(max_tokens=90, n=n), "r")) as deltas:
            async for _ in deltas:
                break
        await idle(engine)
        assert not engine._streams

    with_engine(test)


def test_cancelling_aborts():
    async def test(engine):
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.1)
        task.cancel()
        await idle(engine)

    with_engine(test)


def test_a_crash_reaches_every_request(capfd):
    async def main():
        engine = await start()
        other = asyncio.create_task(collect(engine, [SLOW], "other", max_tokens=90))
        with pytest.raises(EngineDead, match="RuntimeError: the device fell off"):
            await collect(engine, [CRASH], max_tokens=5)
        with pytest.raises(EngineDead):
            await other
        assert not engine.healthy
        with pytest.raises(EngineDead):
            engine.generate([1], SamplingParams(), "r")
        await engine.shutdown(drain_seconds=5)
        assert engine._processes._processes[0].exitcode == 1

    asyncio.run(main())
    assert "Traceback" in capfd.readouterr().err


def test_one_thread_at_a_time_asks_how_the_process_ended():
    """Python's multiprocessing says of a process that another thread is just reaping that it lives."""
    one_at_a_time = threading.Lock()

    class Process:
        sentinel, theirs = multiprocessing.Pipe()
        exitcode = 3

        def join(self, timeout):
            assert one_at_a_time.acquire(blocking=False)
            time.sleep(0.02)
            one_at_a_time.release()

    engine = object.__new__(EngineProcesses)
    engine._reaping = threading.Lock()
    Process.theirs.close()
    with ThreadPoolExecutor() as pool:
        assert [call.result() for call in [pool.submit(engine._exit_code, Process()) for _ in range(4)]] == [3] * 4
    Process.sentinel.close()


def test_a_killed_process_is_noticed():
    async def main():
        engine = await start()
        stats = []
        engine.add_stats_listener(stats.append)
        tasks = [asyncio.create_task(collect(engine, [SLOW], f"r{i}", max_tokens=90)) for i in range(2)]
        death = asyncio.create_task(engine.death())
        async with asyncio.timeout(10):  # the process may be slow on a busy machine
            while not stats or stats[-1].num_running < 2:
                await asyncio.sleep(0.01)
        assert not death.done()
        os.kill(engine._processes._processes[0].pid, signal.SIGKILL)
        for task in tasks:
            with pytest.raises(EngineDead, match="killed"):
                await task
        assert not engine.healthy
        assert "killed" in await asyncio.wait_for(death, 1)
        assert stats[-1] == EngineStats(), "gauges must not stay at their last busy values"
        await engine.shutdown()

    asyncio.run(main())


def test_an_engine_that_owes_a_step_is_counted_silent():
    async def test(engine):
        assert engine.silent_seconds == 0
        os.kill(engine._processes._processes[0].pid, signal.SIGSTOP)
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=5))
        await asyncio.sleep(0.3)
        assert engine.silent_seconds > 0.25
        task.cancel()
        await asyncio.sleep(0.1)
        assert engine.silent_seconds > 0.35, "a client that gave up is no sign of life"
        os.kill(engine._processes._processes[0].pid, signal.SIGCONT)
        assert len(await collect(engine, [SLOW], "again", max_tokens=10)) == 10
        assert engine.silent_seconds == 0

    with_engine(test)


def test_running_requests_can_be_failed():
    async def test(engine):
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.1)
        engine.fail_running(OctavoError("enough"))
        with pytest.raises(OctavoError, match="enough"):
            await task
        await idle_now(engine)

    with_engine(test)


def test_a_shutdown_is_no_death():
    async def main():
        engine = await start()
        await engine.shutdown()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.death(), 0.2)

    asyncio.run(main())


class Unreadable:
    """Crosses the pipe, and fails on the other side."""

    def __reduce__(self):
        return int, ("no number",)


@pytest.mark.parametrize(
    "message", [("dead", Unreadable()), ("add", lambda: 0), ("add", Unreadable())], ids=["received", "sent", "read there"]
)
def test_a_message_that_cannot_cross_ends_the_engine(message):
    """In place of a thread that is gone, and requests that wait for ever."""

    async def main():
        engine = await start()
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.1)
        if message[0] == "add":
            engine._pipe.send(message)
        else:
            engine._pipe._incoming[0].take = lambda: pickle.loads(pickle.dumps(message))
        with pytest.raises(EngineDead, match=r"cannot be|cannot read what it was sent: ValueError"):
            await asyncio.wait_for(task, 5)
        await engine.shutdown()

    asyncio.run(main())


def test_a_stream_whose_text_fails_costs_the_others_nothing(monkeypatch, caplog):
    async def test(engine):
        process = OutputProcessor.process

        def fail(self, output):
            if output.request_id == "bad" and output.token_ids[0] % 100 == 15:
                raise ValueError("no such text")
            return process(self, output)

        monkeypatch.setattr(OutputProcessor, "process", fail)
        bad = asyncio.create_task(collect(engine, [10, SLOW, 10], "bad", max_tokens=90))
        good = asyncio.create_task(collect(engine, [10, SLOW, 10], "good", max_tokens=20))
        with pytest.raises(OctavoError, match="cannot be turned into text"):
            await bad
        assert [d.token_ids[0] for d in await good] == list(range(11, 31))
        await idle_now(engine)

    with_engine(test)
    assert "no such text" in caplog.text


async def idle_now(engine):
    """Returns once a request of one token brought the word that nothing else runs."""
    stats = []
    engine.add_stats_listener(stats.append)
    await collect(engine, [1], "last", max_tokens=1)
    assert stats[-1].num_running == 0


def test_many_sequences_of_a_step_give_others_their_turn():
    async def test(engine):
        pauses = []

        async def others():
            while True:
                start = time.perf_counter()
                await asyncio.sleep(0)
                pauses.append(time.perf_counter() - start)

        ticking = asyncio.create_task(others())
        async with aclosing(engine.generate([10], SamplingParams(n=100, max_tokens=2), "many")) as deltas:
            async for _ in deltas:
                time.sleep(0.005)  # what a server does with each
        ticking.cancel()
        assert max(pauses) < 0.35, "all 100 of a step would be 0.5 s"

    with_engine(test)


def test_what_cannot_be_served():
    async def test(engine):
        for prompt, params, sentence in [
            ([], {}, "empty"),
            ([1] * 100, {"max_tokens": None}, "100 tokens; at most 99"),
            ([4096], {}, "4096 is out of the vocabulary of 4096"),
            ([-1], {}, "-1 is out of"),
            ([1] * 90, {"max_tokens": 11}, r"length is 100 tokens.*requested 101 tokens \(90 in the prompt, 11"),
            ([1], {"stop": "x", "detokenize": False}, "Stop strings"),
        ]:
            with pytest.raises(InvalidRequest, match=sentence):
                engine.generate(prompt, SamplingParams(**params), "r")
        with pytest.raises(InvalidRequest, match="does not like"):
            await collect(engine, [REFUSED])
        assert len(await collect(engine, [1] * 90, max_tokens=None)) == 10
        first = asyncio.create_task(collect(engine, [SLOW], max_tokens=20))
        await asyncio.sleep(0.05)
        with pytest.raises(InvalidRequest, match="already running"):
            await collect(engine, [1])
        assert len(await first) == 20, "a refused twin must leave the first one alone"

    with_engine(test)


def test_offline_and_online_refuse_the_same(monkeypatch):
    """In the same words and before anything is asked of an engine."""
    monkeypatch.setattr(worker, "engine_core", FakeCore)
    offline = LLM()

    def refusals(generate):
        for prompt, params in [
            ([], {}),
            ([1] * 100, {"max_tokens": None}),
            ([4096], {}),
            ([-1], {}),
            ([1] * 90, {"max_tokens": 11}),
            ([1], {"stop": "x", "detokenize": False}),
            ([1], {"logit_bias": {5: 1.0, 4096: 1.0}}),
            ([1], {"logit_bias": {-1: 1.0}}),
            ([1], {"structured": StructuredOutput("regex", "(ab")}),
            ([1], {"structured": StructuredOutput("json_schema", '{"type": "nonsense"}')}),
        ]:
            with pytest.raises(InvalidRequest) as refused:
                generate(prompt, SamplingParams(**params))
            yield str(refused.value), refused.value.param

    async def test(engine):
        online = list(refusals(lambda prompt, params: engine.generate(prompt, params, "r")))
        assert online == list(refusals(lambda prompt, params: offline.generate([prompt], params)))
        assert [param for _, param in online] == ["prompt"] * 4 + ["max_tokens", "stop"] + ["logit_bias"] * 2 + [
            "structured"
        ] * 2
        assert online[6][0] == "logit_bias names token 4096; the vocabulary has 4096."
        assert online[8][0] == "structured cannot be followed: error: unclosed group."
        assert not engine._streams
        assert not offline._core.running

    with_engine(test)


def test_shutdown_lets_requests_end():
    async def main():
        engine = await start()
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=20))
        await asyncio.sleep(0.1)
        ending = asyncio.create_task(engine.shutdown(drain_seconds=10))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineDead, match="shutting down"):
            engine.generate([1], SamplingParams(), "late")
        await ending
        assert len(await task) == 20
        assert not engine.healthy
        assert engine._processes._processes[0].exitcode == 0

    asyncio.run(main())


def test_shutdown_does_not_wait_for_ever():
    async def main():
        engine = await start()
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await engine.shutdown(drain_seconds=0.2)
        assert time.monotonic() - began < 1.5
        with pytest.raises(EngineDead, match="shut down"):
            await task

    asyncio.run(main())


@pytest.mark.parametrize(
    ("seed", "sentence"), [(1, "^There is no such model.$"), (2, "ValueError: a bug$"), (3, r"unexpectedly \(exit code 7\)")]
)
def test_a_start_that_fails(seed, sentence):
    heard = []
    with pytest.raises(OctavoError, match=sentence):
        asyncio.run(start(seed, on_progress=lambda *heard_of: heard.append(heard_of)))
    if seed != 3:
        assert ("weights", 0.5) in heard


def test_a_cancelled_start_leaves_nothing_behind():
    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(start(4), 1.5)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_the_engine_does_not_outlive_its_parent(how, tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_async_engine import start, collect, SLOW

async def main():
    engine = await start()
    print(engine._processes._processes[0].pid, flush=True)
    if {how!r} == "kill":
        await collect(engine, [SLOW], max_tokens=90)
        await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
""")
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    with parent:
        pid = int(parent.stdout.readline())
        if how == "kill":
            parent.kill()
        parent.wait(10)
    deadline = time.monotonic() + 3
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_api_process_never_imports_torch():
    program = "import sys, octavo.frontend.async_engine; sys.exit('torch' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_images_are_not_kept_once_they_are_sent():
    async def test(engine):
        pixels, values = np.zeros((8, 3, 1, 16), np.uint8), np.zeros((3, 256), np.float32)
        image = ImagePatches(pixels, values, 2, Grid(1, 2, 4), 2, bytes(32))
        sent = weakref.ref(pixels)
        params = SamplingParams(max_tokens=60, n=2)
        async with aclosing(engine.generate([SLOW, 5, 5], params, "r", images=[PlacedImage(1, image)])) as deltas:
            del pixels, image
            assert sent() is not None
            await anext(deltas)
            assert sent() is None
            assert len([delta async for delta in deltas]) == 119
        large = ImagePatches(np.zeros((40, 3, 1, 16), np.uint8), values, 2, Grid(1, 4, 10), 10, bytes(32))
        with pytest.raises(InvalidRequest, match="An image has 10 tokens, and at most 9 are read here"):
            engine.generate([5] * 20, params, "s", images=[PlacedImage(1, large)])

    with_engine(test)


def test_other_streams_go_on_while_an_engine_ends(monkeypatch):
    """Its processes may take seconds to end, such as those of a GPU."""
    kill = EngineProcesses.kill

    def slow(self):
        time.sleep(0.5)
        kill(self)

    monkeypatch.setattr(EngineProcesses, "kill", slow)

    async def main():
        for ending in ((await start()).shutdown(), start(seed=1)):
            task, pause = asyncio.ensure_future(ending), 0.0
            while not task.done():
                began = time.perf_counter()
                await asyncio.sleep(0.01)
                pause = max(pause, time.perf_counter() - began)
            assert (task.exception() is None) == (ending.__name__ == "shutdown")
            assert pause < 0.4

    asyncio.run(main())
