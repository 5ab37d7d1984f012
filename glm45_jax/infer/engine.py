"""Many requests at once over one paged cache: continuous batching, prompts in chunks, shared beginnings.

    with Engine(params, config, tokenizer=tokenizer) as engine:
        request = engine.submit(tokenizer.encode("…"), max_new_tokens=200, temperature=0.7)
        for delta in request: print(delta.text, end="")

One thread plans steps and gives them to the device without waiting for the one before: while a step runs, the tokens of
the last one are handed out and the next is planned (`schedule.py`). Steps come in few sizes, compiled at the start;
afterwards nothing is compiled, which `stats()["compiled_in_service"]` says.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Sequence as Seq
from typing import Any, Unpack

import jax
import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.infer.calibrate import checked_cache, sample_for
from glm45_jax.infer.channel import Lost
from glm45_jax.infer.constraint import Constraints, Place
from glm45_jax.infer.drafting import Drafting
from glm45_jax.infer.following import Leading, others_of
from glm45_jax.infer.generate import Generation, check_prompt, real_vocab_size
from glm45_jax.infer.grammar import Grammar, Grammars
from glm45_jax.infer.options import EngineOptions
from glm45_jax.infer.pages import Pages
from glm45_jax.infer.programs import Choice, Outcome, Programs, Sizes
from glm45_jax.infer.request import Delta, EngineClosed, Request, Top
from glm45_jax.infer.sampling import SamplingOptions, sampling_params
from glm45_jax.infer.schedule import Part, Scheduler, Sequence, arrays_of
from glm45_jax.infer.score import Scored, Scores, padded, scores_of
from glm45_jax.infer.settings import MOST_BIASES, Kind, Settings
from glm45_jax.infer.steps import MOST_LIKELIEST, Reading
from glm45_jax.infer.text_stop import StoppableText, check_stop_strings
from glm45_jax.infer.warm_up import Empty
from glm45_jax.model import Params
from glm45_jax.parallel import device_in_force
from glm45_jax.text import Tokenizer

_OF_ALL = ("stop_ids", "stop_strings")  # lists that are one prompt's


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step that the device has been given."""

    parts: list[Part]
    requests: list[Request]
    outcome: Outcome
    began: float


class Engine:
    """See the module. Close it, or use it as a context: requests that are at work then end first.

    Args:
      params, config: as `load_checkpoint` gives them; under `jax.set_mesh` the model lies on a mesh.
      tokenizer: for text, stop strings, and ids that are never chosen.

    Raises:
      UserError: sizes that do not go together.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
    ):
        self.config, self.options, self.tokenizer = config, checked_cache(options or EngineOptions()), tokenizer
        o = self.options
        o.check(config)
        self._mesh = jax.sharding.get_mesh()  # a thread has none of its own
        self._pool = Pages(-(-o.cache_tokens // o.page_size), o.page_size, o.prefix_cache)
        self._scheduler = Scheduler(self._pool, o.slots, o.step_tokens, o.drafts)
        self._drafting = Drafting(o.drafts, o.rows)
        self._width = min(self._pool.count, -(-config.max_position_embeddings // o.page_size))
        self._requests: dict[int, Request] = {}
        self._inbox: collections.deque[Any] = collections.deque()
        self._wanted = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._counts = collections.Counter[str]()
        self._finished_at = 0.0
        self._settings = Settings(config.vocab_size)
        self._constraints = Constraints(tokenizer, config)
        self._ready = threading.Event()
        self._programs = self._make_programs(params)
        self._thread = threading.Thread(target=self._run, name="glm45-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._check_alive()

    # --- for callers -----------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that one prompt and its answer can have together."""
        return min(self.config.max_position_embeddings, self._width * self.options.page_size)

    @property
    def grammars(self) -> Grammars:
        """Compiles grammars for `submit`. Raises `UserError` without a tokenizer."""
        return self._constraints.grammars

    @property
    def failure(self) -> BaseException | None:
        """What has ended the engine; None while it works."""
        return self._failure

    def submit(
        self,
        prompt: Seq[int],
        max_new_tokens: int = 256,
        *,
        stop_ids: int | Seq[int] | None = None,
        stop_strings: str | Seq[str] | None = None,
        grammar: Grammar | None = None,
        thought: Place = "after",
        thought_budget: int | None = None,
        top_logprobs: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Request:
        """Starts a request; the other arguments are those of `generate`, of one prompt.

        Args:
          grammar: of `engine.grammars`, for what follows the thought; the model's end tokens end it.
          thought: where the answer begins: "before" a thought that the model opens itself (with a grammar it has to),
            "inside" of one that the prompt has opened, in the "gap" behind one, where a newline may stand before what
            the grammar allows, or "after" all that.
          thought_budget: tokens of the thought; then it is closed.
          top_logprobs: of so many of the likeliest tokens in each place the log-probabilities are wanted.

        Raises:
          UserError: what `generate` refuses, or a prompt that the cache has no room for.
          EngineClosed: the engine is closed.
        """
        self._check_alive()
        tokens = check_prompt(prompt, 0, self.config)
        if len(tokens) >= self.room:
            raise UserError(f"a prompt of {len(tokens)} tokens leaves no room in a cache of {self.room} for an answer")
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 1 or more")
        sampling = sampling_params(1, self.config.vocab_size, None, options)
        if sampling.bias_ids.shape[1] > MOST_BIASES:
            raise UserError(f"logit_bias has more than {MOST_BIASES} entries")
        stops = self.config.eos_token_id if stop_ids is None else stop_ids
        texts = check_stop_strings(stop_strings)
        if texts and self.tokenizer is None:
            raise UserError("stop_strings are looked for in text: give the engine its tokenizer")
        if not 0 <= top_logprobs <= MOST_LIKELIEST:
            raise UserError(f"top_logprobs is {top_logprobs}; it must be 0 to {MOST_LIKELIEST}")
        limit = min(int(max_new_tokens), self.room - len(tokens))
        constraint = self._constraints.make(grammar, thought, thought_budget)
        alone = sampling.uses_penalties or constraint is not None
        sequence = Sequence(len(tokens), tokens, limit, alone, may_draft=not sampling.uses_penalties)
        ids = frozenset(int(i) for i in np.atleast_1d(np.asarray(stops, np.int64)))
        text = StoppableText(self.tokenizer, texts) if self.tokenizer else None
        request = Request(sequence, sampling, ids, text, self._cancel, constraint, top_logprobs)
        self._send(request)
        return request

    def generate_batch(self, prompts: Seq[Seq[int]], max_new_tokens: int = 256, **options: Any) -> list[Generation]:
        """All prompts' answers, in order; options that are lists have one for each prompt."""

        def of(i: int) -> dict[str, Any]:
            return {k: v[i] if isinstance(v, list) and k not in _OF_ALL else v for k, v in options.items()}

        requests = [self.submit(prompt, max_new_tokens, **of(i)) for i, prompt in enumerate(prompts)]
        return [request.result() for request in requests]

    def score(self, tokens: Seq[int], top_logprobs: int = 0) -> Scores:
        """How likely a text of two tokens or more is, token by token; between two steps, in one go.

        The first text of a length (in powers of two) waits until that is compiled, and so do all others.

        Raises:
          UserError: tokens that the model does not have, or more of them than `room`.
          EngineClosed: the engine is closed.
        """
        self._check_alive()
        ids = check_prompt(tokens, 0, self.config)
        if not 2 <= len(ids) <= self.room:
            raise UserError(f"a text of {len(ids)} tokens cannot be scored; expected 2 to {self.room}")
        if not 0 <= top_logprobs <= MOST_LIKELIEST:
            raise UserError(f"top_logprobs is {top_logprobs}; it must be 0 to {MOST_LIKELIEST}")
        future: concurrent.futures.Future[Scored] = concurrent.futures.Future()
        self._send(("score", padded(ids, self.config.max_position_embeddings), future))
        while not concurrent.futures.wait([future], 0.1).done:
            self._check_alive()
        return scores_of(future.result(), len(ids), top_logprobs)

    def update_params(self, params: Params) -> None:
        """Goes on with other weights of the same shapes; no page that the old ones filled is read any more."""
        done = threading.Event()
        self._send((params, done))
        while not done.wait(0.1):
            self._check_alive()

    def stats(self) -> dict[str, int | float]:
        """Counts since the start, and how full the engine is now."""
        pool, scheduler = self._pool, self._scheduler
        return {
            **{name: self._counts[name] for name in (
                "steps", "tokens_read", "tokens_chosen", "finished", "cancelled", "compiled_in_service",
            )},
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "preempted": scheduler.preempted,
            "pages": pool.count,
            "pages_in_use": pool.count - pool.available,
            "drafts_given": self._drafting.given,
            "drafts_accepted": self._drafting.accepted,
            "prefix_tokens_asked": pool.asked,
            "prefix_tokens_found": pool.hits,
        }  # fmt: skip

    def close(self, *, drain: bool = True) -> None:
        """Ends the thread; requests at work and waiting are finished first, or else cancelled."""
        if not drain:
            for request in [*self._requests.values()]:
                request.cancel()
        with self._wanted:
            self._closing = True
            self._wanted.notify_all()
        while self._failure is None and self._thread.is_alive():
            self._thread.join(0.2)
        self._thread.join(5)  # a device that waits for a lost process may wait for ever

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(drain=error is None)

    def _send(self, message: Any) -> None:
        with self._wanted:
            if self._closing:
                raise EngineClosed("the engine is closed")
            self._inbox.append(message)
            self._wanted.notify_all()

    def _cancel(self, request: Request) -> None:
        with self._wanted:
            self._inbox.append(("cancel", request))
            self._wanted.notify_all()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise UserError(f"the engine has failed: {self._failure}") from self._failure

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            mesh = device_in_force(self._programs.params) if self._mesh.empty else jax.set_mesh(self._mesh)
            with mesh:
                self._serve()
            self._programs.close(None)
        except BaseException as error:  # all who wait must be told
            self._end_all(error)
            self._programs.close(error)
        finally:
            self._end_all(None)
            self._settings.close()

    def _end_all(self, error: BaseException | None) -> None:
        """Nothing is answered any more; called by another thread too, when another process is lost."""
        with self._wanted:
            self._failure = self._failure or error
            self._closing = True
            left = [*self._requests.values(), *(m for m in self._inbox if isinstance(m, Request))]
            self._wanted.notify_all()
        for request in left:
            request.push(Delta(finish_reason="error", error=f"the engine has failed: {self._failure}"))
        self._ready.set()

    def _make_programs(self, params: Params) -> Programs:
        o, vocab_size = self.options, real_vocab_size(self.config, self.tokenizer)
        sample = sample_for(o.cache_dtype, self.config, self.tokenizer)
        pages = self._pool.count + 1  # one to spare
        sizes = Sizes(o.slots, o.drafts, pages, o.page_size, o.cache_dtype, vocab_size, sample)
        others = [] if self._mesh.empty else others_of(self._mesh)
        if others:
            return Leading(params, self.config, sizes, others, self._end_all)
        return Programs(params, self.config, sizes)

    def _serve(self) -> None:
        self._programs.prepare()
        if self.options.warm_up:
            self._warm_up()
        self._counts.clear()
        self._ready.set()
        flying: _Flight | None = None
        while self._take_messages(idle=flying is None):
            self._weigh_drafts()
            parts = self._scheduler.plan()
            now = self._start(parts) if parts else None
            if flying is not None:
                self._finish(flying)
            flying = now

    def _take_messages(self, idle: bool) -> bool:
        """What callers sent; False when all is done and the engine is to close."""
        while True:
            with self._wanted:
                messages, closing = [*self._inbox], self._closing
                self._inbox.clear()
                busy = messages or not idle or self._scheduler.running or self._scheduler.waiting
                if not busy:
                    if closing:
                        return False
                    self._wanted.wait()
                    continue
            for message in messages:
                self._take(message)
            return True

    def _take(self, message: Any) -> None:
        match message:
            case Request():
                self._requests[message.sequence.number] = message
                self._scheduler.add(message.sequence)
            case ("cancel", request):
                if request.sequence.number in self._requests:
                    self._counts["cancelled"] += 1
                    self._end(request, Delta(finish_reason="cancelled"))
            case ("score", tokens, future):
                try:
                    future.set_result(self._programs.score(tokens))
                except Exception as error:  # too long for the memory: no step is the worse for it
                    future.set_exception(error)
                    if isinstance(error, Lost):
                        raise
            case (params, done):
                self._programs.update(params)
                self._scheduler.begin_anew()
                done.set()

    def _weigh_drafts(self) -> None:
        """Who drafts, where it pays."""
        if not self.options.drafts:
            return
        scheduler, weighed = self._scheduler, self._drafting
        running = scheduler.running
        drafting = [sequence for sequence in running if sequence.drafting]
        coming, again = min(len(scheduler.waiting), self.options.slots - len(running)), len(scheduler.could_draft_again)
        if coming or again:
            scheduler.drafts_begin = weighed.begins(len(running) + coming, len(running) - len(drafting) - again)
        goes_on = weighed.goes_on(len(running), len(drafting))
        scheduler.drafts_ahead = goes_on  # else all tokens are soon known, and a sequence can go on without drafts
        for sequence in drafting if not goes_on else ():
            if not sequence.pending:
                scheduler.end_drafting(sequence)
        scheduler.most_drafts = weighed.worth_reading

    # --- one step --------------------------------------------------------------------------------------------------

    def _start(self, parts: list[Part]) -> _Flight:
        began = time.monotonic()
        requests = [self._requests[part.sequence.number] for part in parts]
        total, most = sum(part.size for part in parts), self.options.drafts
        most = most if any(part.sequence.drafting for part in parts) else 0
        rows, tokens = self.options.size(len(parts), total, most)
        top = any(request.top_logprobs for request in requests)
        reading, kind = self._reading(parts, rows, tokens), self._settings.kind(requests)
        outcome = self._step(reading, parts, requests, most, kind, top)
        self._counts["steps"] += 1
        self._counts["tokens_read"] += total
        return _Flight(parts, requests, outcome, began)

    def _reading(self, parts: list[Part], rows: int, tokens: int) -> Reading:
        o = self.options
        return Reading(**arrays_of(parts, rows, tokens, self._width, o.slots, self._pool.count, o.drafts))

    def _step(
        self, reading: Reading, parts: list[Part], requests: list[Request], most: int, kind: Kind, top: bool
    ) -> Outcome:
        programs, before, rows = self._programs, self._programs.compiled(), len(reading.lengths)
        if kind == "plain" and not top and self.options.decodes(*reading.sizes[:2], most):
            outcome = programs.step(reading, most, self._settings.sampling(requests, rows, kind))
        else:
            programs.read(reading, most)
            outcome = programs.choose(self._choice(parts, requests, rows, most, kind, top))  # made while that is read
        self._counts["compiled_in_service"] += programs.compiled() - before
        return outcome

    def _choice(
        self, parts: list[Part], requests: list[Request], rows: int, most: int, kind: Kind, top: bool
    ) -> Choice:
        sampling = self._settings.sampling(requests, rows, kind)
        return Choice(sampling, self._settings.special(parts, requests, rows, 1 + most, kind), top)

    def _finish(self, flight: _Flight) -> None:
        """Hands out what a step has chosen; waits for it."""
        chosen, drafted, likeliest = flight.outcome
        tokens, logprobs = np.asarray(chosen.tokens), np.asarray(chosen.logprobs)
        top = None if likeliest is None else [np.asarray(x) for x in likeliest]
        accepted = np.zeros(len(tokens), int) if drafted is None else np.asarray(drafted.accepted)
        drafts = np.zeros((len(tokens), 0), int) if drafted is None else np.asarray(drafted.tokens)
        for row, (part, request) in enumerate(zip(flight.parts, flight.requests)):
            if part.chooses and not part.sequence.ended:
                held = int(accepted[row])
                self._drafting.saw(len(part.drafts), held)
                next_drafts = drafts[row].tolist() if part.sequence.drafting else []
                new = tokens[row, : held + 1].tolist(), logprobs[row, : held + 1].tolist()
                self._hand_out(request, *new, next_drafts, _top(request, top, row * tokens.shape[1], held + 1))
        now, since = time.monotonic(), max(flight.began, self._finished_at)
        self._finished_at = now
        with_drafts, rows = sum(bool(part.drafts) for part in flight.parts), len(flight.parts)
        decoding = sum(part.count == 1 for part in flight.parts)
        if 2 * decoding > rows and (drafted is None or 2 * with_drafts >= rows):  # a prompt among them is of the price
            self._drafting.timed(rows, now - since, drafts=drafted is not None)

    def _hand_out(
        self, request: Request, tokens: list[int], logprobs: list[float], drafts: list[int], top: list[Top]
    ) -> None:
        """New tokens of one request, up to where it ends."""
        sequence, text, piece, reason = request.sequence, request.text, "", None
        used = 0
        for token, logprob in zip(tokens, logprobs):
            if why := self._wrong(request, token, logprob):
                return self._end(request, Delta(finish_reason="error", error=why))
            used += 1
            stopped = token in request.stop_ids or (request.constraint is not None and request.constraint.ended)
            if text is not None and not stopped:
                piece += text.push(token)
                stopped = text.stopped
            if stopped or len(sequence.tokens) + used - sequence.prompt_length >= sequence.limit:
                reason = "stop" if stopped else "length"
                break
        tokens, logprobs = tokens[:used], logprobs[:used]
        request.logprobs += logprobs
        self._counts["tokens_chosen"] += used
        self._scheduler.put(sequence, tokens, drafts)
        if request.constraint is not None and request.constraint.done:  # nothing is to wait for any more
            request.constraint, sequence.alone = None, request.sampling.uses_penalties
        delta = Delta(tuple(tokens), tuple(logprobs), piece, top=tuple(top[:used]))
        if reason is None:
            return request.push(delta)
        self._counts["finished"] += 1
        piece += text.finish() if text is not None else ""
        return self._end(request, dataclasses.replace(delta, text=piece, finish_reason=reason))

    def _wrong(self, request: Request, token: int, logprob: float) -> str | None:
        """Why an answer cannot go on with a token."""
        if math.isnan(logprob):
            return "the model's logits are not numbers; the checkpoint is damaged, or the dtype too narrow"
        if request.constraint is not None:
            request.constraint.take(token)
            return request.constraint.error
        return None

    def _end(self, request: Request, delta: Delta) -> None:
        self._scheduler.end(request.sequence)
        del self._requests[request.sequence.number]
        request.push(delta)

    def _warm_up(self) -> None:
        reading, choice = functools.partial(self._reading, []), functools.partial(self._choice, [], [])
        empty = Empty(self.options, reading, choice, self.config.vocab_size)
        self._programs.compile_ahead(empty.steps)
        empty.run(self._programs)
        self._constraints.prepare()
        self._programs.wait()
        if self.options.drafts:
            for rows in self.options.all_rows():
                self._drafting.timed_at_start(rows, *empty.seconds(self._programs, rows))


def _top(request: Request, top: list[np.ndarray] | None, first: int, count: int) -> list[Top]:
    """The likeliest tokens in `count` places of a step's, where their request asks for them."""
    wanted = request.top_logprobs
    if not wanted or top is None:
        return []
    tokens, logprobs = (x[first : first + count, :wanted].tolist() for x in top)
    return [tuple(zip(*place)) for place in zip(tokens, logprobs)]
