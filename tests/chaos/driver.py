"""Rounds of chaos: an operator, users, and a saboteur, at the same time and all by one seed."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import psutil

from paddock import PaddockError, Reason
from paddock.errors import make_error
from tests.chaos.oracle import Oracle
from tests.chaos.world import ANSWERS, HUB_MODEL, LOCAL_MODELS, TWINS, World
from tests.fakes.hub import Fault

CALL_SECONDS: Final = 90.0
"""The longest any call may take: a worker that was stopped is found out after 20 s, a hub that stalls after
as long, and either may happen twice to one call on a busy machine."""

MODELS: Final = (*LOCAL_MODELS, "helper", TWINS)

NORMAL: Final = frozenset(
    {
        Reason.INSUFFICIENT_MEMORY, Reason.MODEL_NOT_LOADED, Reason.MODEL_IN_USE, Reason.LOAD_ABORTED,
        Reason.MODEL_UNLOADED, Reason.WORKER_CRASHED, Reason.CRASH_LOOP, Reason.QUEUE_FULL,
        Reason.LOAD_STALLED, Reason.LOAD_IN_PROGRESS,
    }
)  # fmt: skip
"""What a call may be answered while others load, unload and kill."""

AFTER_CRASHES: Final = frozenset({Reason.WORKER_CRASHED, Reason.CRASH_LOOP, Reason.LOAD_STALLED})
AFTER_UNLOADS: Final = frozenset({Reason.MODEL_UNLOADED, Reason.LOAD_ABORTED})
"""What a user may be answered: after workers were killed or stopped; when the operator has unloaded the model
or a reload has changed it. Nothing else: a model in use is not evicted, and in the end there is room."""

GONE: Final = frozenset({Reason.SERVER_UNREACHABLE, Reason.SHUTTING_DOWN})


@dataclass
class Round:
    """One round: what is done in it, and what has been noted of it."""

    world: World
    oracle: Oracle
    rng: random.Random
    variant: int
    may_kill_server: bool
    may_take_long: bool
    """Whether there may be faults that only a time-out of 20 s finds."""

    began: float = field(default_factory=time.monotonic)
    actions: list[str] = field(default_factory=list[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    unexpected: list[str] = field(default_factory=list[str])
    is_broken: bool = False
    """Whether the configuration file does not validate at the moment."""

    disk_was_full: bool = False
    server_ended: bool = False
    unloaded: set[str] = field(default_factory=set[str])
    """Models that the operator has unloaded, or that a reload has changed."""

    user_errors: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """What users were answered instead of an answer: models and reasons."""

    _op_begun: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, what: str) -> None:
        """Write down what is done, for whom has to repeat it."""
        self.actions.append(f"{time.monotonic() - self.began:7.3f} {what}")

    def unexplained(self) -> list[tuple[str, str]]:
        """Return what users were answered without a cause."""
        after_crashes = AFTER_CRASHES if self.oracle.workers_died else frozenset[Reason]()
        return [
            (model, reason)
            for model, reason in self.user_errors
            if reason not in (after_crashes | (AFTER_UNLOADS if model in self.unloaded else frozenset()))
        ]

    # Calls

    async def call(
        self, what: str, work: Awaitable[Any], allowed: AbstractSet[Reason] = NORMAL
    ) -> bool | None:
        """Do a call. Returns whether it went well; None when the server has gone."""
        self.counts[what.split()[0]] += 1
        self.note(what)
        outcome: bool | None = True
        error = "done"
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await work
        except TimeoutError:
            self.unexpected.append(f"{what} took longer than {CALL_SECONDS:g} s")
            outcome, error = False, "hung"
        except PaddockError as caught:
            error = f"{caught.reason}: {caught.message}"
            outcome = None if caught.reason in GONE else False
            if caught.reason not in (allowed if outcome is False else GONE):
                self.unexpected.append(f"{what}: {error}")
            if outcome is None and not self.server_ended:
                self.unexpected.append(f"{what}: {error}, and nobody ended the server")
        self.note(f"{what} -> {error}")
        return outcome

    # The operator: one call after the other, so that what they come to is known

    async def operate(self) -> None:
        """Make some calls that change what is to be."""
        ops: list[Callable[[], Coroutine[Any, Any, bool | None]]] = [
            self._load, self._load, self._unload, self._sleep, self._pin, self._reload,
            self._download, self._download, self._delete, self._delete,
        ]  # fmt: skip
        for _ in range(self.rng.randint(3, 6)):
            self._op_begun.set()
            if await self.rng.choice(ops)() is None or self.server_ended:
                return

    def _any_model(self) -> str:
        return self.rng.choice([*MODELS, HUB_MODEL] if self.oracle.hub_model else MODELS)

    async def _load(self) -> bool | None:
        return await self.load(self._any_model())

    async def load(self, model: str) -> bool | None:
        """Load a model as an operator."""
        was = self.oracle.loads.get(model, False)
        self.oracle.changed.add(model)
        self.oracle.loads[model] = was or None
        done = await self.call(f"load {model}", self._loaded(model))
        if done:
            self.oracle.loads[model] = True
        return done

    async def _loaded(self, model: str) -> None:
        async with self.world.client.load(model) as load:
            async for _ in load:
                pass

    async def _unload(self) -> bool | None:
        model, force = self._any_model(), self.rng.random() < 0.5
        was = self.oracle.loads.get(model, False)
        self.oracle.changed.add(model)
        self.oracle.loads[model] = False if was is False else None
        self.unloaded.add(model)
        unload = self.world.client.unload(model, force=force, drain_timeout_seconds=5)
        done = await self.call(f"unload {model} force={force}", unload)
        if done:
            self.oracle.loads[model] = False
        return done

    async def _sleep(self) -> bool | None:
        model = self._any_model()
        return await self.call(f"sleep {model}", self.world.client.sleep(model))

    async def _pin(self) -> bool | None:
        # Never all of the places: whoever checks afterwards must be able to load.
        model, pinned = "noise", self.rng.random() < 0.5
        was = self.oracle.pins.get(model, False)
        self.oracle.changed.add(model)
        self.oracle.pins[model] = was if was is pinned else None
        done = await self.call(f"pin {model} {pinned}", self.world.client.pin(model, pinned=pinned))
        if done:
            self.oracle.pins[model] = pinned
        return done

    async def _reload(self) -> bool | None:
        self.is_broken = self.rng.random() < 0.3
        self.variant += 1
        self.unloaded |= {"helper", TWINS}
        self.world.configure(self.variant, is_broken=self.is_broken)
        allowed = NORMAL | {Reason.INVALID_CONFIG} if self.is_broken else NORMAL
        what = f"reload {self.variant}{' broken' if self.is_broken else ''}"
        done = await self.call(what, self.world.client.reload(), allowed)
        if done and self.is_broken:
            self.unexpected.append("a broken configuration was taken over")
        return done

    async def _download(self) -> bool | None:
        """Download the hub's model: to the end, or until it is paused or cancelled."""
        self._set_up_hub()
        end = self.rng.choice(["", "", "pause", "cancel"])
        if not self.oracle.hub_model:
            self.oracle.hub_model, self.oracle.partial = None, True
        allowed: set[Reason] = {*NORMAL, Reason.HUB_UNREACHABLE, Reason.DISK_FULL}
        if not self.world.is_small_disk:
            allowed.add(Reason.INTERNAL)  # what stands in for a full disk is another error
        pull = asyncio.create_task(self.call(f"download {end}", self._downloaded(), allowed))
        if end:
            await asyncio.sleep(self.rng.uniform(0.3, 2.0))
            stop = self.world.client.stop_download(HUB_MODEL, keep=end == "pause")
            stopped = await self.call(f"{end} download", stop, frozenset({*NORMAL, Reason.MODEL_NOT_FOUND}))
            if stopped and end == "cancel":
                self.oracle.partial = False
        done = await pull
        if done:
            self.oracle.hub_model, self.oracle.partial = True, False
        return done

    def _set_up_hub(self) -> None:
        pause = self.rng.choice([0, 0, 0.0003, 0.001])
        self.world.hub.block_gate = (lambda _: time.sleep(pause)) if pause else None
        size = len(self.world.hub.repos[HUB_MODEL.partition(":")[0]].files["foal-Q8_0.gguf"])
        faults = [
            Fault(stop_after=self.rng.randrange(size)),
            Fault("info", status=503),
            Fault(status=429, retry_after="1"),
            Fault(stop_after=self.rng.randrange(size), stall=True),
        ]
        weights = [4, 2, 2, 1 if self.may_take_long else 0]
        self.world.hub.faults = self.rng.choices(faults, weights, k=self.rng.randint(0, 2))
        self.note(f"the hub: {[vars(fault) for fault in self.world.hub.faults]}, {pause:g} s a block")

    async def _downloaded(self) -> None:
        async with self.world.client.download(f"hf:{HUB_MODEL}") as download:
            async for _ in download:
                pass

    async def _delete(self) -> bool | None:
        was = self.oracle.hub_model
        self.oracle.hub_model = False if was is False else None
        delete = self.world.client.delete(HUB_MODEL, allow_missing=True)
        done = await self.call("delete", delete)
        if done:
            self.oracle.hub_model = self.oracle.partial = False
        elif done is False:
            self.oracle.hub_model = was
        return done

    # Users

    async def use(self, seed: float) -> None:
        """Ask for some answers; some users lose patience."""
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 4)):
            if self.server_ended:
                return
            model = rng.choice(MODELS)
            patience = rng.choice([None, None, rng.uniform(0, 0.3), rng.uniform(0, 3)])
            pair = rng.choice(ANSWERS)
            over_http = model == "foal" and rng.random() < 0.5
            front = "ask-http" if over_http else "ask"
            what = f"{front} {model} for {patience if patience is not None else CALL_SECONDS:.3f} s"
            await self.call(what, self._asked(model, pair, patience, over_http=over_http))

    async def _asked(
        self, model: str, pair: dict[str, str], patience: float | None, *, over_http: bool
    ) -> None:
        with suppress(*(() if patience is None else (TimeoutError,))):
            async with asyncio.timeout(patience):
                try:
                    wrong = await self._wrong(model, pair, over_http=over_http)
                except PaddockError as error:
                    if error.reason not in GONE:
                        self.user_errors.append((model, error.reason))
                    raise
                if wrong:
                    self.unexpected.append(wrong)

    async def _wrong(self, model: str, pair: dict[str, str], *, over_http: bool) -> str:
        if not over_http:
            return await wrong_answer(self.world, model, pair)
        answer = await answer_over_http(self.world, model, pair["question"])
        right = answer == pair["answer"]
        return "" if right else f"{model} answers {pair['question']!r} over HTTP with {answer!r}"

    # The saboteur

    async def sabotage(self) -> None:
        """Do what nobody should."""
        kinds = [
            self._kill_worker, self._kill_worker, self._kill_fetcher, self._freeze_worker, self._fill_disk,
        ]  # fmt: skip
        for _ in range(self.rng.randint(1, 3)):
            await asyncio.sleep(self.rng.uniform(0, 2))
            await self.rng.choice(kinds)()

    async def end_server(self) -> None:
        """Kill the server while the operator does something, or stop it."""
        for _ in range(self.rng.randint(1, 4)):
            self._op_begun.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(3):
                    await self._op_begun.wait()
        await asyncio.sleep(self.rng.choice([0, 0.005, 0.05, 0.3, 1]) * self.rng.random())
        self.server_ended = True
        if self.rng.random() < 0.8:
            self.counts["kill-server"] += 1
            self.note("kill -9 of the server")
            await self.world.kill()
        else:
            self.counts["stop-server"] += 1
            self.note("SIGTERM of the server")
            await self.world.stop()

    def _one_of(self, processes: list[psutil.Process]) -> psutil.Process | None:
        return self.rng.choice(sorted(processes, key=lambda one: one.pid)) if processes else None

    async def _kill_worker(self) -> None:
        self._kill("worker", self._one_of(self.world.workers()))

    async def _kill_fetcher(self) -> None:
        self._kill("fetcher", self._one_of(self.world.fetchers()))

    def _kill(self, what: str, process: psutil.Process | None) -> None:
        if process is not None:
            self.counts[f"kill-{what}"] += 1
            self.note(f"kill -9 of {what} {process.pid}")
            self.oracle.workers_died |= what == "worker"
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    async def _freeze_worker(self) -> None:
        worker = self._one_of(self.world.workers())
        if worker is None:
            return
        seconds = self.rng.choice([0.2, 1.0, 1.0, 30.0] if self.may_take_long else [0.2, 1.0])
        self.counts["stop-worker"] += 1
        self.oracle.workers_died = True
        self.note(f"SIGSTOP of worker {worker.pid} for {seconds:g} s")
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGSTOP)
            await asyncio.to_thread(psutil.wait_procs, [worker], seconds)
            worker.send_signal(signal.SIGCONT)

    async def _fill_disk(self) -> None:
        if self.server_ended:
            return
        self.counts["full-disk"] += 1
        self.disk_was_full = True
        self.note("the disk is full")
        with suppress(psutil.NoSuchProcess):
            await asyncio.to_thread(self.world.fill_disk)
        await asyncio.sleep(self.rng.uniform(0.2, 2))
        with suppress(psutil.NoSuchProcess):
            await asyncio.to_thread(self.world.empty_disk)
        self.note("the disk has room")


async def answer_over_http(world: World, model: str, question: str) -> str:
    """Ask a model something over HTTP. Raises `PaddockError`."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    try:
        async with httpx.AsyncClient(base_url=world.server.http_url, timeout=CALL_SECONDS) as http:
            response = await http.post("/v1/chat/completions", json=body)
    except httpx.TransportError as error:
        raise make_error(Reason.SERVER_UNREACHABLE, repr(error)) from error
    answer = response.json()
    if response.status_code != 200:
        raise PaddockError(answer["error"]["code"].upper(), answer["error"]["message"])
    return answer["choices"][0]["message"]["content"]


async def wrong_answer(
    world: World, model: str, pair: dict[str, str], *, autoload: bool | None = None
) -> str:
    """Ask a model something and return what is wrong with the answer; nothing when it is right."""
    if model == "embed":
        embeddings = await world.client.embed(model, [pair["question"]], autoload=autoload)
        (vector,) = embeddings.vectors
        known = world.vectors.setdefault(pair["question"], vector)
        close = all(abs(a - b) <= 1e-3 for a, b in zip(known, vector, strict=True))
        return "" if close else f"{model} embeds {pair['question']!r} otherwise than before"
    options: dict[str, Any] = {"temperature": 0.0} | ({} if autoload is None else {"autoload": autoload})
    if model in {"foal", TWINS, HUB_MODEL}:
        messages = [{"role": "user", "content": pair["question"]}]
        completion = await world.client.complete(model, messages, **options)
        wanted = pair["answer"]
    else:
        completion = await world.client.complete(model, pair["question"], max_tokens=24, **options)
        wanted = world.texts.setdefault(("noise", pair["question"]), completion.choices[0].text)
    text = completion.choices[0].text
    return "" if text == wanted else f"{model} answers {pair['question']!r} with {text!r}, not {wanted!r}"
