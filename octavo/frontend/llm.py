"""Offline generation with the engine in this process. The interface is that of vLLM's LLM class."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo.checkpoint_values import settled
from octavo.config import EngineConfig
from octavo.errors import InvalidRequest, OctavoError
from octavo.files import check_directory
from octavo.frontend.engine_start import worker
from octavo.frontend.keywords import in_keywords, names_keywords, taken_keywords
from octavo.frontend.model_files import with_files
from octavo.frontend.offline_media import OfflineMedia, PromptMedia
from octavo.frontend.offline_operations import OfflineOperations
from octavo.frontend.outputs import CompletionOutput, OutputProcessor, RequestOutput
from octavo.frontend.remote_core import RemoteCore
from octavo.frontend.requests import engine_requests
from octavo.frontend.text_sources import check_named, check_text, generation_of
from octavo.hub.snapshots import snapshot_of
from octavo.messages import EngineRequest, SamplingParams, TokenOutput
from octavo.text.chat_messages import check_content_format
from octavo.text.chat_prompt import render_conversation
from octavo.text.checkpoint_text import no_tokenizer
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.text.tool_prompt import shows_tools
from octavo.vision import FetchRules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LLM", "Prompt"]

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, or a dict with PROMPT_KEYS as in vLLM
PROMPT_KEYS = frozenset(("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt"))
Messages = Sequence[Mapping[str, Any]]

log = logging.getLogger(__name__)


class LLM(OfflineOperations):
    """A model for offline generation. `options` are EngineConfig's fields. Raises OctavoError on a wrong one.

    model: a checkpoint directory, or a name of the Hugging Face hub, OWNER/NAME.

    llm = LLM("path/to/checkpoint", quantization="ptpc_fp8")
    print(llm.generate("Once upon a time", SamplingParams(max_tokens=32))[0].outputs[0].text)
    """

    @names_keywords()
    def __init__(self, model: str | Path = "", **options: Any):
        options = taken_keywords(options)
        path = snapshot_of(str(model), options.get("revision"))
        if options.get("tokenizer") is not None:
            options["tokenizer"] = snapshot_of(str(options["tokenizer"]), None)
        options, notes = settled(options, path)
        for note in notes:
            log.warning("%s", in_keywords(note))
        config = EngineConfig(model=path, **options)
        check_named(config)
        self.config = with_files(config)
        check_directory(Path(self.config.model))
        check_text(self.config)
        generation = generation_of(self.config)
        self.tokenizer = load_tokenizer(self.config.text_directory, generation)
        if (lacking := no_tokenizer(self.config.text_directory)) is not None:
            log.warning("%s", lacking)
        rules = FetchRules.of_options(self.config.allowed_local_media_path, self.config.allowed_media_domains or None)
        if self.config.data_parallel_size > 1:
            raise OctavoError("data_parallel_size is for a server; make an LLM in each of several processes, or octavo serve.")
        if self.config.node_rank:
            raise OctavoError(f"node_rank={self.config.node_rank} is for octavo serve, which computes there for this LLM.")
        if self.config.num_ranks > 1 or self.config.distributed_executor_backend == "ray":
            self._core: Any = RemoteCore(self.config)
        else:
            self._core = worker().engine_core(self.config, lambda stage, fraction: None)
        self._directory = self.config.model
        self._media = OfflineMedia(self.config, self.info, rules)
        self._eos = self.tokenizer.eos_token_ids if self.tokenizer else generation.eos_token_ids()
        self._numbers = count()

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; raises OctavoError if it has none."""
        return self.tokenizer or Tokenizer(self.config.text_directory)

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters that the checkpoint recommends."""
        return SamplingParams(**(self.tokenizer.default_sampling if self.tokenizer else {}))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`."""
        return self.get_tokenizer().encode(text, add_special_tokens)

    @names_keywords()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. One SamplingParams serves all prompts; a list has one per prompt.

        A prompt with images is a dict whose `multi_modal_data` is {"image": image} or {"image": [image, ...]}: of PIL, or
        arrays uint8 [rows, columns, 3]. Its text has one of the model's placeholders for each, such as Qwen3-VL's
        <|vision_start|><|image_pad|><|vision_end|>. "video" has a list of images or an array [frames, rows, columns, 3], or
        either with its clock, by which frames are chosen, as in vLLM: (frames, {"fps": 30}).

        A sequence that the engine cannot continue (say, a grammar became too complex) has its `error` set, and the others are
        complete. Raises InvalidRequest if all sequences failed.
        """
        listed = _listed(prompts)
        params = self._params_of(sampling_params, len(listed))
        recommended = sampling_params is None
        prepared = zip(listed, params, self._media.of_prompts(listed), strict=True)
        accepted = [self._accept(prompt, one, media, recommended) for prompt, one, media in prepared]
        with _bar(len(accepted), use_tqdm) as advance:
            self._run(accepted, advance)
        results = [result for result, _ in accepted]
        errors = [output.error for result in results for output in result.outputs]
        if failed := [error for error in errors if error is not None]:
            if len(failed) == len(errors):
                raise InvalidRequest(failed[0])
            log.warning("%d of %d sequences ended with an error: %s", len(failed), len(errors), failed[0])
        return results

    @names_keywords()
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation, or to several.

        A message's content may have parts of images and videos: `image_url` and `video_url` as the server takes them, or
        {"type": "image_pil", "image_pil": image}, {"type": "image", "image": image} and {"type": "video", "video": video},
        where `generate` says what they are.
        """
        tokenizer = self.get_tokenizer()
        template = chat_template or tokenizer.template_for(tools is not None)
        if template is None:
            raise OctavoError(f"{self.config.model} has no chat template; pass chat_template.")
        if tools and not shows_tools(template):
            log.warning("The chat template does not print tools; they are put into the system message.")
        one = not messages or isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Messages]", [messages] if one else messages)
        how: dict[str, Any] = {
            "continue_final_message": continue_final_message,
            "content": check_content_format(chat_template_content_format),
            "switches": chat_template_kwargs,
        }
        special = tokenizer.special_tokens
        prompts: list[Prompt] = []
        for chat in conversations:
            media, texts = self._media.of_chat(chat)
            text = render_conversation(template, chat, special, tools, add_generation_prompt, **{**how, **texts})
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template wrote the special tokens out
            prompts.append({"prompt": text, "prompt_token_ids": ids, "multi_modal_data": media})
        return self.generate(prompts, sampling_params, use_tqdm)

    def _params_of(self, given: SamplingParams | Sequence[SamplingParams] | None, number: int) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.get_default_sampling_params()] * number
        if len(given) != number:
            raise InvalidRequest(f"There are {number} prompts and {len(given)} sampling_params; give one, or one for each.")
        return list(given)

    def _accept(
        self, prompt: Prompt, params: SamplingParams, media: PromptMedia, recommended: bool
    ) -> tuple[RequestOutput, list[EngineRequest]]:
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif not isinstance(prompt, Mapping):
            prompt = {"prompt_token_ids": prompt}
        text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise InvalidRequest("cache_salt must be a string that is not empty.", "cache_salt")
        if ids is None:
            if not isinstance(text, str):
                raise InvalidRequest("A prompt is text, token ids, or a dict with prompt or prompt_token_ids.", "prompt")
            ids = self.encode(text)
        if unknown := sorted(set(prompt) - PROMPT_KEYS):
            raise InvalidRequest(
                f"A prompt's '{unknown[0]}' is not served; known are {', '.join(sorted(PROMPT_KEYS))}.", "prompt"
            )
        try:
            ids = list(map(operator.index, ids))  # accepts numpy integers
        except TypeError as error:
            raise InvalidRequest("prompt_token_ids must be a list of integers.", "prompt") from error
        ids, placed = self._media.place(ids, media, lambda text: self.encode(text, add_special_tokens=False))
        if recommended and params.max_tokens is not None:  # a recommended max_tokens is lowered to what fits
            params = replace(params, max_tokens=max(1, min(params.max_tokens, self.info.max_model_len - len(ids))))
        result = RequestOutput(str(next(self._numbers)), text, ids)
        result.outputs = [CompletionOutput(index) for index in range(params.n)]
        made = engine_requests(self.info, self.tokenizer, result.request_id, ids, params, self._eos, salt, placed)
        return result, made

    def _run(self, accepted: list[tuple[RequestOutput, list[EngineRequest]]], advance: Callable[[], None]) -> None:
        running: dict[str, tuple[RequestOutput, OutputProcessor]] = {}
        try:
            for result, requests in accepted:
                self._core.add(*requests)
                for index, request in enumerate(requests):
                    running[request.request_id] = result, OutputProcessor(request, self.tokenizer, index)
            while running:
                for output in self._core.step()[0]:
                    if output.request_id in running and self._take(output, running):
                        advance()
        finally:  # after an error or Ctrl-C the engine must be idle for the next call
            for request_id in running:
                self._core.abort(request_id)

    def _take(self, output: TokenOutput, running: dict[str, tuple[RequestOutput, OutputProcessor]]) -> bool:
        """Adds an output of a step. True if it completed a prompt."""
        result, processor = running[output.request_id]
        if output.error is not None:
            result.fail(processor.index, output.error)
            del running[output.request_id]
            self._core.abort(output.request_id)
            return result.finished
        delta = processor.process(output)
        result.add(delta)
        if delta.finish_reason is not None:
            del running[output.request_id]
            if output.finish_reason is None:  # ended by a stop string, which the core does not know
                self._core.abort(output.request_id)
        return result.finished


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], Integral):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Iterable[Prompt]", prompts))


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """Yields a function to call for each finished prompt, which advances a progress bar on a terminal."""
    if not wanted:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Generating", total=total)
        yield lambda: progress.advance(task)
