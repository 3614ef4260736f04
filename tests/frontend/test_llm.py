"""The offline API, over a small deterministic core in this process."""

import time

import pytest
from cases import cases

from octavo.demo import MODEL_DIR
from octavo.engine import worker
from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.keywords import in_keywords
from octavo.frontend.llm import LLM
from octavo.frontend.outputs import CompletionOutput, Delta, RequestOutput
from octavo.messages import EngineInfo, EngineStats, Logprob, SamplingParams, TokenOutput

REFUSED, FAILS = 668, 669


class FakeCore:
    """Counts on from the prompt's last token, one token a step and request."""

    def __init__(self, config, progress, place=None):
        progress("weights", 1.0)
        self.info = EngineInfo(200, 4096, 10, 16, "fake")
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
            request, params = state[0], state[0].params
            state[1] += 1
            token = (request.prompt_token_ids[-1] + state[1] * (1 + (params.seed or 0))) % 4096
            output = TokenOutput(request_id, [token], num_cached_tokens=4)
            if params.logprobs is not None:
                output.logprobs = [(Logprob(token, -0.5, 1), Logprob(7, -2.0, 2))]
            if params.prompt_logprobs is not None and state[1] == 1:
                output.prompt_logprobs = [None, (Logprob(9, -1.0, 1),)]
            if FAILS in request.prompt_token_ids:
                output.error = "The cache is too small for this."
            if state[1] == params.max_tokens:
                output.finish_reason = "length"
                del self.running[request_id]
            outputs.append(output)
        return outputs, EngineStats()


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(worker, "engine_core", FakeCore)
    return LLM()


def params(**kwargs):
    return SamplingParams(**{"max_tokens": 3, **kwargs})


def test_every_form_of_prompt(llm):
    text = "def read"
    ids = llm.encode(text)
    expected = [(ids[-1] + i) % 4096 for i in (1, 2, 3)]
    for prompts in (text, [text], ids, [ids], {"prompt": text}, [{"prompt_token_ids": ids}], tuple(ids)):
        (result,) = llm.generate(prompts, params())
        assert result.prompt_token_ids == ids
        assert result.outputs[0].token_ids == expected
        assert result.outputs[0].text == llm.get_tokenizer().decode(expected)
        assert (result.finished, result.num_cached_tokens, result.outputs[0].finish_reason) == (True, 4, "length")
    assert llm.generate(text, params())[0].prompt == text
    assert llm.generate([], params()) == []


def test_a_batch_with_params_of_its_own(llm):
    results = llm.generate([[10], [20], [30]], [params(max_tokens=n) for n in (3, 1, 2)], use_tqdm=False)
    assert [r.outputs[0].token_ids for r in results] == [[11, 12, 13], [21], [31, 32]]
    assert len({r.request_id for r in results}) == 3


def test_several_sequences_and_logprobs(llm):
    (result,) = llm.generate([[5, 10]], params(n=2, seed=0, logprobs=1, prompt_logprobs=0))
    assert [o.token_ids for o in result.outputs] == [[11, 12, 13], [12, 14, 16]]
    assert [o.index for o in result.outputs] == [0, 1]
    assert result.outputs[0].cumulative_logprob == -1.5
    assert result.outputs[0].logprobs[0] == {11: Logprob(11, -0.5, 1), 7: Logprob(7, -2.0, 2)}
    assert result.prompt_logprobs == [None, {9: Logprob(9, -1.0, 1)}]
    assert llm.generate([[5]], params())[0].outputs[0].logprobs is None


def test_a_stop_string(llm):
    stop = llm.get_tokenizer().decode([45])
    (result,) = llm.generate([[40]], params(max_tokens=90, stop=stop))
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", stop)
    assert result.outputs[0].token_ids == [41, 42, 43, 44, 45]
    assert not llm._core.running


def test_chat(llm):
    messages = [{"role": "user", "content": "Hi"}]
    (result,) = llm.chat(messages, params())
    assert result.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert result.prompt_token_ids[0] == llm.get_tokenizer().token_id("<|im_start|>")
    assert len(llm.chat([messages, messages], params())) == 2
    (result,) = llm.chat(messages, params(), chat_template="{{ x }}!", chat_template_kwargs={"x": "so"})
    assert result.prompt == "so!"


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAID = [
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": None},
    {"role": "developer", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "assistant", "content": "y", "tool_calls": []},
]


def test_messages_are_read_as_the_server_reads_them(llm):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"  # fmt: skip  # noqa: E501
    (result,) = llm.chat(SAID, params(), chat_template=template)
    assert result.prompt == '<user>Hello<assistant><system>x<assistant>{"a": 1}<assistant>y'
    (result,) = llm.chat(SAID, params(), chat_template=template, continue_final_message=True, add_generation_prompt=False)
    assert result.prompt.endswith("<assistant>y")
    with pytest.raises(InvalidRequest, match=r"messages\.0 needs a role"):
        llm.chat([{"content": "x"}], params())


def test_the_checkpoint_s_sampling_is_the_default(llm):
    assert llm.get_default_sampling_params() == SamplingParams(**llm.get_tokenizer().default_sampling)
    assert len(llm.generate([[1]])[0].outputs[0].token_ids) == 16


@cases(
    ("prompts", "given", "sentence"),
    [
        ([[]], {}, "empty"),
        ([[4096]], {}, "out of the vocabulary"),
        ([[1] * 200], {}, "200 tokens; at most 199"),
        ({"text": "x"}, {}, "A prompt is"),
        ({"prompt_token_ids": "x"}, {}, "list of integers"),
        ([[1], [REFUSED]], {}, "does not like"),
        ([[FAILS], [FAILS, 1]], {}, "too small"),
        (["half \ud800"], {}, "Unicode"),
    ],
)
def test_what_cannot_be_served_leaves_an_idle_engine(llm, prompts, given, sentence):
    with pytest.raises(InvalidRequest, match=sentence):
        llm.generate(prompts, params(**given))
    assert not llm._core.running
    assert llm.generate([[1]], params())[0].finished


@pytest.mark.parametrize("n", [1, 2])
def test_one_that_fails_has_its_error_and_the_others_their_answers(llm, n, caplog):
    outputs = llm.generate([[1], [FAILS], [5]], params(n=n))
    alone = llm.generate([[1], [5]], params(n=n))
    assert [[one.token_ids for one in out.outputs] for out in (outputs[0], outputs[2])] == [
        [one.token_ids for one in out.outputs] for out in alone
    ]
    for out in outputs:
        failed = out is outputs[1]
        assert out.finished
        assert {(one.finish_reason, one.error) for one in out.outputs} == {
            ("abort", "The cache is too small for this.") if failed else ("length", None)
        }
    assert f"{n} of {3 * n} sequences ended with an error: The cache is too small" in caplog.text
    assert not llm._core.running


@cases(
    ("sentence", "told"),
    [
        ("--max-model-len 4096 is over the 64 positions.", "max_model_len=4096 is over the 64 positions."),
        ("lower --max-model-len to 64, or raise --block-size (16).", "lower max_model_len to 64, or raise block_size (16)."),
        ("use --kv-cache-dtype fp8 (half of it).", 'use kv_cache_dtype="fp8" (half of it).'),
        ("--quantization 'pttc' is not known.", "quantization='pttc' is not known."),
        ("add --quantization ptpc_fp8, fp8 or fp8_block", 'add quantization="ptpc_fp8", fp8 or fp8_block'),
        ("or decode without graphs (--enforce-eager).", "or decode without graphs (enforce_eager=True)."),
        ("leave out --no-enable-prefix-caching.", "leave out enable_prefix_caching=False."),
        ("--gpu-memory-utilization must be at most 1, not 2.5.", "gpu_memory_utilization must be at most 1, not 2.5."),
        ("--device cuda: torch sees none; use --device cpu.", 'device="cuda": torch sees none; use device="cpu".'),
        ("a smaller --max-model-len, or --seed 3.", "a smaller max_model_len, or seed=3."),
        ("--api-key and `octavo compare --auto` stay.", "--api-key and `octavo compare --auto` stay."),
        (
            "write it with octavo quantize --calibrate, or --save-quantized DIR --calibrate, or leave --calibrate out.",
            "write it with octavo quantize --calibrate, or save_quantized=DIR calibrate, or leave calibrate out.",
        ),
    ],
)
def test_a_flag_is_a_keyword_to_python(sentence, told):
    assert in_keywords(sentence) == told


def test_errors_name_keyword_arguments():
    for options, told in (
        (dict(max_model_len=0), "^max_model_len must be positive, not 0.$"),
        (dict(quantization="pttc_fp8"), "^quantization='pttc_fp8' is not known; did you mean 'ptpc_fp8'"),
        (dict(enable_lora=True), "^enable_lora=True is not served: there are no LoRA adapters"),
        (dict(quantization="awq"), '^quantization="awq" is not served: Octavo reads checkpoints'),
        (dict(kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=[99]), "^kv_cache_dtype_skip_layers names layer 99"),
        (dict(hf_overrides={"nothing": 1}), "^hf_overrides: nothing changes nothing that"),
        (dict(data_parallel_size=2), "^data_parallel_size is for a server"),
        (dict(max_model_len=10**6), r"^max_model_len=1000000 is over the \d+ positions"),
    ):
        with pytest.raises(OctavoError, match=told):
            LLM(**options)


def test_other_errors(llm, tmp_path):
    with pytest.raises(OctavoError, match="did you mean 'quantization'"):
        LLM(MODEL_DIR, quantisation="fp8")
    with pytest.raises(InvalidRequest, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], [params()])
    (tmp_path / "config.json").write_text("{}")
    bare = LLM(tmp_path)
    assert bare.generate([[1]], params())[0].outputs[0].text == ""
    with pytest.raises(OctavoError, match=r"no tokenizer\.json"):
        bare.generate("text", params())
    with pytest.raises(InvalidRequest, match="Stop strings need text"):
        bare.generate([[1]], params(stop="x"))


def test_a_long_answer_is_put_together_in_linear_time():
    """Its text and its log-probabilities were copied at each token, which took half a minute."""
    tokens, entry = 160_000, (Logprob(1, -1.0, 1),)
    result = RequestOutput("r", None, [1], outputs=[CompletionOutput(0)])
    began = time.process_time()
    for n in range(tokens):
        result.add(Delta(0, "a token's text ", [n], [entry], "length" if n + 1 == tokens else None))
    assert time.process_time() - began < 4
    (output,) = result.outputs
    assert (len(output.text), len(output.token_ids), len(output.logprobs)) == (15 * tokens, tokens, tokens)
    assert result.finished


def test_a_step_that_was_launched_ahead_does_not_keep_an_llm_awake(llm):
    """On a GPU one may be in flight where a stop string has ended the last request."""
    core, done = llm._core, []
    ahead = [([], EngineStats())]
    core.has_work, core.step = lambda: bool(ahead), ahead.pop
    core.sleep, core.wake = lambda: done.append(("sleep", len(ahead))), lambda parts: done.append(parts)
    core.reload = lambda model: done.append((model, len(ahead)))
    llm.sleep()
    llm.wake_up()
    ahead.append(([], EngineStats()))
    llm.reload_weights()
    assert done == [("sleep", 0), ("weights",), ("kv_cache",), (llm.config.model, 0)]
