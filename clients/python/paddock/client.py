"""The Python client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Self, Unpack

from paddock import convert, requests
from paddock.generation import (
    Choice,
    Completion,
    Embeddings,
    FinishReason,
    GenerateOptions,
    Prompt,
    Tokenization,
    TokenLogprob,
    ToolCall,
    Usage,
)
from paddock.streams import DownloadStream, GenerationStream, LoadStream, LogStream, WatchStream
from paddock.transport import GrpcApi, connect
from paddock.types import (
    MemoryEstimate,
    Model,
    ModelSource,
    ModelState,
    Reloaded,
    RuntimeOptions,
    ServerInfo,
    Unloaded,
)
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2

if TYPE_CHECKING:
    from types import TracebackType

    from paddock.api import ModelManagerApi
    from paddock.generation import Chunk
    from paddock.requests import ConflictPolicy

DEFAULT_TARGET: Final = "localhost:50051"
"""Where `paddock up` listens for gRPC."""

MAX_EMBED_TEXTS: Final = 64
"""Texts in one `Embed` request; `Client.embed` splits longer lists."""

_LIST_PAGE_SIZE: Final = 1000


class Client:
    """A client of one Paddock server.

    One client holds one channel, for any number of calls at the same time; make one and keep it::

        async with Client.connect("localhost:50051") as client:
            async with client.load("qwen2.5-7b") as load:
                async for progress in load:
                    print(progress.stage, progress.fraction)

            async with client.generate("qwen2.5-7b", "Once upon a time", max_tokens=64) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")

    Every method raises `PaddockError`, or the subclass that belongs to its reason. Calls have no time limit
    of their own; use `asyncio.timeout`.
    """

    def __init__(self, api: ModelManagerApi, *, close: Callable[[], Awaitable[object]] | None = None) -> None:
        """Make a client of any implementation of the API; most callers want `connect`.

        Args:
            api: The API to call.
            close: Called by `close`.
        """
        self._api = api
        self._close = close

    @classmethod
    def connect(cls, target: str = DEFAULT_TARGET) -> Self:
        """Return a client of the server at `target`. It connects on the first call.

        Args:
            target: `host:port`, or any other gRPC name, for example `unix:/run/paddock.sock`.
        """
        channel = connect(target)
        return cls(GrpcApi(channel), close=channel.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        if self._close is not None:
            await self._close()

    def load(
        self,
        model: str,
        *,
        source: ModelSource | None = None,
        options: RuntimeOptions | None = None,
        on_conflict: ConflictPolicy = "fail",
        timeout_seconds: float | None = None,
    ) -> LoadStream:
        """Load a model.

        Args:
            model: Model to load.
            source: Where to get it, the first time the server hears of it.
            options: Options of its worker; the server's defaults when left out.
            on_conflict: What to do when it is loaded with other options: "fail", "keep" it, or "reload" it.
            timeout_seconds: How long the server may take; the server's default when left out.

        Returns:
            A stream of progress. Any number of callers share one load. Leaving the stream detaches from it;
            `unload` aborts it.
        """
        request = requests.load_request(
            model, source=source, options=options, on_conflict=on_conflict, timeout_seconds=timeout_seconds
        )
        return LoadStream(self._api.load(request))

    async def unload(
        self,
        model: str,
        *,
        force: bool = False,
        drain_timeout_seconds: float | None = None,
        load_id: str = "",
    ) -> Unloaded:
        """Unload a model, or abort its load. Succeeds when it is not loaded.

        Args:
            model: Model to unload.
            force: Abort running requests instead of waiting for them.
            drain_timeout_seconds: How long to wait for them; 30 when left out.
            load_id: Unload only this load, and raise when the model has been loaded anew since.

        Returns:
            The model and the number of aborted requests, once the worker process has exited.
        """
        response = await self._api.unload(
            pb.UnloadRequest(
                model=model,
                mode=pb.UNLOAD_MODE_FORCE if force else pb.UNLOAD_MODE_DRAIN,
                drain_timeout=(
                    None if drain_timeout_seconds is None else requests.duration(drain_timeout_seconds)
                ),
                load_id=load_id,
            )
        )
        return Unloaded(
            model=convert.model(response.model), aborted_request_count=response.aborted_request_count
        )

    async def sleep(self, model: str) -> Model:
        """Have a loaded model give its memory back; its process stays, and the next request wakes it.

        Args:
            model: Model to put to sleep.

        Returns:
            The model, once it sleeps.
        """
        return convert.model((await self._api.sleep(pb.SleepRequest(model=model))).model)

    async def pin(self, model: str, *, pinned: bool = True) -> Model:
        """Pin a model, so that it is not evicted, put to sleep or unloaded for idleness; or take the pin off.

        Args:
            model: Model to pin. It need not be loaded.
            pinned: False takes the pin off.
        """
        return convert.model((await self._api.pin(pb.PinRequest(model=model, unpin=not pinned))).model)

    def download(self, model: str = "", *, source: ModelSource | None = None) -> DownloadStream:
        """Download a model of the Hugging Face Hub without loading it.

        Args:
            model: `hf:ORG/REPO[@REVISION][:QUANT-OR-GLOB]`, or the id of such a model.
            source: The same in parts, instead.

        Returns:
            A stream of progress. Any number of callers share one download. It goes on from the bytes that are
            there. Leaving the stream detaches from it; `stop_download` stops it.
        """
        return DownloadStream(self._api.download(requests.download_request(model, source=source)))

    async def stop_download(self, model: str, *, keep: bool = True) -> Model:
        """Stop a download for all who wait for it. Succeeds when it is stopped.

        Args:
            model: Its id or its name.
            keep: Keep what has arrived, so that another `download` goes on from there.
        """
        mode = pb.STOP_DOWNLOAD_MODE_PAUSE if keep else pb.STOP_DOWNLOAD_MODE_CANCEL
        response = await self._api.stop_download(pb.StopDownloadRequest(model=model, mode=mode))
        return convert.model(response.model)

    async def delete(self, model: str, *, allow_missing: bool = False) -> int:
        """Delete the files of an unloaded model of the hub.

        Args:
            model: Its id or its name.
            allow_missing: Succeed when there is no such model.

        Returns:
            Bytes freed: files that another revision uses stay.
        """
        request = pb.DeleteRequest(model=model, allow_missing=allow_missing)
        return (await self._api.delete(request)).freed_bytes

    async def list(self, *, states: Iterable[ModelState] = ()) -> tuple[Model, ...]:
        """Return the models of the server, ordered by id.

        Args:
            states: Only models in one of these states; all when empty.
        """
        names = [model_pb2.ModelState.Value(f"MODEL_STATE_{state.name}") for state in states]
        models: list[Model] = []
        request = pb.ListRequest(page_size=_LIST_PAGE_SIZE, states=names)
        while True:
            response = await self._api.list(request)
            models.extend(convert.model(message) for message in response.models)
            if not response.next_page_token:
                return tuple(models)
            request = pb.ListRequest(
                page_size=_LIST_PAGE_SIZE, states=names, page_token=response.next_page_token
            )

    async def get(self, model: str) -> Model:
        """Return one model."""
        return convert.model((await self._api.get(pb.GetRequest(model=model))).model)

    def watch(
        self, models: Iterable[str] = (), *, start_revision: int = 0, instance_id: str = ""
    ) -> WatchStream:
        """Watch models.

        Args:
            models: Models to watch; all when empty.
            start_revision: First revision to send. 0 starts with the current state of every model, then
                `Synced`, then changes.
            instance_id: `ServerInfo.instance_id` that the revision came from.

        Returns:
            A stream of `ModelChanged`, `ModelDeleted` and `Synced`. It does not end by itself.
        """
        return WatchStream(
            self._api.watch(
                pb.WatchRequest(models=models, start_revision=start_revision, instance_id=instance_id)
            )
        )

    def generate(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Generate text and stream it.

        Args:
            model: Model to use.
            prompt: Text or token ids, continued as they are; or a conversation for the model's chat template:
                `ChatMessage`s, or mappings with `role` and `content`.
            **options: See `GenerateOptions`.

        Returns:
            A stream of `Chunk`s. Entering it waits for a slot; leaving it stops the generation.
        """
        request = requests.generate_request(model, prompt, options)
        return GenerationStream(self._api.generate(request), options.get("on_prompt_progress"))

    async def complete(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate text and return it whole. Arguments as for `generate`."""
        async with self.generate(model, prompt, **options) as stream:
            choices = [_ChoiceBuilder() for _ in range(options.get("choice_count") or 1)]
            async for chunk in stream:
                choices[chunk.choice_index].add(chunk)
            return Completion(
                generation_id=stream.generation_id,
                model=stream.model,
                choices=tuple(choice.build() for choice in choices),
                usage=stream.usage,
                timings=stream.timings,
                seed=stream.seed,
            )

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        normalize: bool = False,
        autoload: bool | None = None,
    ) -> Embeddings:
        """Compute embeddings.

        Args:
            model: Model to use.
            texts: Any number of texts; more than 64 are sent in several requests, one after the other.
            normalize: Scale each vector to length 1.
            autoload: Whether to load the model when it is not loaded; the server's setting when left out.
        """
        vectors: list[tuple[float, ...]] = []
        prompt_tokens = cached_prompt_tokens = 0
        for start in range(0, len(texts), MAX_EMBED_TEXTS):
            response = await self._api.embed(
                pb.EmbedRequest(
                    model=model,
                    texts=texts[start : start + MAX_EMBED_TEXTS],
                    normalize=normalize,
                    autoload_policy=requests.autoload_policy(autoload),
                )
            )
            vectors.extend(tuple(embedding.values) for embedding in response.embeddings)
            prompt_tokens += response.usage.prompt_tokens
            cached_prompt_tokens += response.usage.cached_prompt_tokens
        return Embeddings(
            vectors=tuple(vectors),
            usage=Usage(
                prompt_tokens=prompt_tokens,
                cached_prompt_tokens=cached_prompt_tokens,
                completion_tokens=0,
            ),
        )

    async def tokenize(
        self,
        model: str,
        text: str,
        *,
        add_special_tokens: bool = False,
        parse_special_tokens: bool = False,
        include_pieces: bool = False,
    ) -> Tokenization:
        """Convert text to token ids. The model must be loaded.

        Args:
            model: Model whose vocabulary to use.
            text: Text to convert.
            add_special_tokens: Add the tokens the model expects at the start and end of a text.
            parse_special_tokens: Read special tokens written out in the text, such as `<|im_end|>`, as such.
            include_pieces: Return the bytes of each token as well.
        """
        response = await self._api.tokenize(
            pb.TokenizeRequest(
                model=model,
                text=text,
                add_special_tokens=add_special_tokens,
                parse_special_tokens=parse_special_tokens,
                include_pieces=include_pieces,
            )
        )
        return Tokenization(token_ids=tuple(response.token_ids), pieces=tuple(response.pieces))

    async def detokenize(
        self, model: str, token_ids: Sequence[int], *, include_special_tokens: bool = False
    ) -> str:
        """Convert token ids to text. The model must be loaded.

        Args:
            model: Model whose vocabulary to use.
            token_ids: Ids to convert.
            include_special_tokens: Write special tokens out instead of leaving them away.

        Returns:
            The text; bytes that form no character become U+FFFD.
        """
        response = await self._api.detokenize(
            pb.DetokenizeRequest(
                model=model, token_ids=token_ids, include_special_tokens=include_special_tokens
            )
        )
        return response.text

    def logs(self, model: str, *, tail: int = 0, follow: bool = False) -> LogStream:
        """Read what the workers of a model wrote to their standard error.

        Args:
            model: Model whose lines to read.
            tail: Newest lines to start with; 0 starts with every line the server still holds.
            follow: Go on with new lines as they come.
        """
        return LogStream(
            self._api.stream_logs(pb.StreamLogsRequest(model=model, tail_line_count=tail, follow=follow))
        )

    async def estimate(
        self, model: str, *, source: ModelSource | None = None, options: RuntimeOptions | None = None
    ) -> MemoryEstimate:
        """Say what a model would take in memory, without loading it.

        Args:
            model: Model to estimate.
            source: Where it is, the first time the server hears of it.
            options: Options it would be loaded with; a context size of 0 has the server choose one that fits.
        """
        request = requests.estimate_request(model, source=source, options=options)
        return convert.memory_estimate(await self._api.estimate_memory(request))

    async def reload(self) -> Reloaded:
        """Have the server read its configuration files and model directories again."""
        return convert.reloaded(await self._api.reload(pb.ReloadRequest()))

    async def server_info(self) -> ServerInfo:
        """Return what the server says about itself."""
        return convert.server_info(await self._api.get_server_info(pb.GetServerInfoRequest()))


class _ChoiceBuilder:
    """Puts the chunks of one choice together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._calls: dict[int, ToolCall] = {}
        self._finish_reason = FinishReason.UNKNOWN
        self._stop_sequence = ""

    def add(self, chunk: Chunk) -> None:
        self._text.append(chunk.text)
        self._reasoning.append(chunk.reasoning_text)
        self._logprobs.extend(chunk.logprobs)
        for delta in chunk.tool_calls:
            call = self._calls.get(delta.call_index, ToolCall("", "", ""))
            self._calls[delta.call_index] = ToolCall(
                call.id or delta.id, call.name or delta.name, call.arguments_json + delta.arguments_json
            )
        if chunk.finish_reason is not None:
            self._finish_reason = chunk.finish_reason
            self._stop_sequence = chunk.stop_sequence

    def build(self) -> Choice:
        return Choice(
            text="".join(self._text),
            reasoning_text="".join(self._reasoning),
            tool_calls=tuple(call for _, call in sorted(self._calls.items())),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finish_reason,
            stop_sequence=self._stop_sequence,
        )
