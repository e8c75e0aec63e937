"""Generation of answers token by token: one engine for evaluations, chats, files of prompts and servers.

The rows of a batch need not begin together: whenever rows have ended, waiting requests are prefilled and join the
running ones. A request is greedy or sampled; what it draws depends on its seed and the number of the token alone, so
that the other rows of its batch change nothing but rounding.

Dimensions: B rows, T tokens, D hidden, V vocabulary; keys and values of a layer are [B, heads, T, head size].
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sftx.errors import ConfigError
from sftx.model.embeddings import replacing_embeddings

if TYPE_CHECKING:
    from sftx.model.text_stream import TextStream
    from sftx.types import LanguageModel

_GROWTH: Final = 1.5
_LEAST_ROOM: Final = 64
"""Columns that a cache grows by at least, if its rows may become that long."""
_FEW_TOKENS: Final = 512
"""So many of the most likely tokens are sorted first when `top_p` is to be reached: a vocabulary takes ten times as
long.
"""

FinishReason: TypeAlias = Literal["", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """The rule by which the tokens of an answer are chosen. The names are those of transformers' GenerationConfig."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token each time; otherwise logits are divided by it."""
    top_k: int = 0
    """Only this many of the most likely tokens are drawn from; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are drawn from."""
    min_p: float = 0.0
    """Only tokens with this share of the probability of the most likely one are drawn from."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the prompt or the answer are divided by it where positive, else multiplied."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not is_right:
                raise ConfigError(f"option {name!r}: got {getattr(self, name)}, expected a number {expected}")


@dataclass(eq=False)
class Request:
    """A prompt and its answer, which grows while the engine runs."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    text: TextStream | None = None
    """The text of the answer, which the engine extends token by token; the answer ends at a stop text of it."""
    answer_ids: list[int] = field(default_factory=list)
    """Tokens so far, without the stop token that ended the answer."""
    log_probabilities: list[float] = field(default_factory=list)
    """Of each token of the answer and of the stop token after it, in nats, at temperature 1 and without filters."""
    finish_reason: FinishReason = ""
    """Empty while the answer is not complete."""
    stop_id: int | None = None
    """The stop token that ended the answer; None when something else did."""


class Decoder:
    """Answers requests in one running batch of at most `max_rows` rows. It is used by one thread at a time.

    The model is in eval mode and has no gradients within `step`; autocast is the caller's.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        stop_ids: Iterable[int],
        max_rows: int,
        with_log_probabilities: bool = False,
        embed: Callable[[Sequence[Request]], Sequence[Tensor]] | None = None,
    ) -> None:
        """`embed` returns the embeddings of the prompts of requests, [T, D] each (`embed_prompts`), for adapters that
        embed extras. What is generated after them is text.
        """
        self._lm = lm
        self._embed = embed
        self._stop_ids = frozenset(stop_ids)
        self._max_rows = max_rows
        self._with_log_probabilities = with_log_probabilities
        self._waiting: deque[Request] = deque()
        self._batch: _Batch | None = None
        self._kept: tuple[list[int], _Batch] | None = None
        """Tokens in the cache of the last row that was alone, and that cache: the next turn of a chat begins with it.
        """

    def submit(self, request: Request) -> None:
        """Let a request wait for a row. Raises ConfigError for a prompt without tokens."""
        if len(request.prompt_ids) == 0:  # an array of numpy is neither true nor false
            raise ConfigError("the prompt has no tokens, so that there is nothing to continue")
        self._waiting.append(request)

    @property
    def num_open(self) -> int:
        """Return how many requests wait or are being answered."""
        running = () if self._batch is None else self._batch.requests
        return self.num_waiting + sum(not request.finish_reason for request in running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def cancel(self, request: Request) -> None:
        """End a request; what it has so far stays. One that is complete is left as it is."""
        if request.finish_reason:
            return
        request.finish_reason = "cancelled"
        if request in self._waiting:
            self._waiting.remove(request)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Let waiting requests join and choose their first token, or give each running row one more token.

        Returns the requests that moved; those that are complete now have a `finish_reason`. The list is empty when
        nothing is open.
        """
        with _evaluating(cast(nn.Module, self._lm.model)), parametrize.cached():
            batch = self._with_rows_left(self._batch)
            free = self._max_rows - (0 if batch is None else len(batch.requests))
            # Rows join in groups: a prefill for each that ends would interrupt the running ones every time.
            if self._waiting and (batch is None or (batch.can_join and free >= max(1, self._max_rows // 4))):
                begun, hidden_BD = self._prefill([self._waiting.popleft() for _ in range(min(free, self.num_waiting))])
                moved = self._choose(hidden_BD, begun.requests)
                batch = begun if batch is None else batch.joined(begun)
            elif batch is not None:
                moved = self._choose(batch.forward(self._lm, batch.last_ids()), batch.requests)
            else:
                moved = []
            self._batch = batch
            return moved

    def run(self, requests: Iterable[Request], *, check_stop: Callable[[], None] = lambda: None) -> Iterator[Request]:
        """Answer requests and yield each when it is complete. The longest prompts come first.

        So a batch that does not fit into memory fails at once. `check_stop` is called before every token, and may
        raise to end the generation. The weights must not change before the last answer: those that a parametrisation
        computes are computed once.
        """
        for request in sorted(requests, key=lambda one: -len(one.prompt_ids)):
            self.submit(request)
        with parametrize.cached():
            check_stop()
            while moved := self.step():
                for request in moved:
                    if request.finish_reason:
                        yield request
                check_stop()

    # --- rows -----------------------------------------------------------------------------------

    def _with_rows_left(self, batch: _Batch | None) -> _Batch | None:
        """Return the batch without rows that are complete, but for a few; None when no other is left."""
        if batch is None:
            return None
        left = [row for row, request in enumerate(batch.requests) if not request.finish_reason]
        if not left:
            if len(batch.requests) == 1 and batch.can_join and self._embed is None:
                request = batch.requests[0]
                self._kept = ([*request.prompt_ids, *request.answer_ids][: batch.length], batch)
            return None
        num_complete, num_rows = len(batch.requests) - len(left), len(batch.requests)
        # A few complete rows are computed along: to keep the others is to copy their keys and values, and a CPU takes
        # as long to multiply two rows, or three, with a matrix as to multiply eight.
        many = 1 if self._waiting else max(1, num_rows // 8, min(4, num_rows * 3 // 4))
        if num_complete >= many and batch.can_join:
            batch.keep(left)
        return batch

    def _prefill(self, requests: list[Request]) -> tuple[_Batch, Tensor]:
        """Return a batch of new rows, and the hidden states [B, D] that their first tokens are chosen from."""
        if len(requests) == 1 and self._kept is not None:
            (ids, batch), prompt = self._kept, list(requests[0].prompt_ids)
            same = next((at for at, pair in enumerate(zip(ids, prompt, strict=False)) if pair[0] != pair[1]), len(ids))
            if keep := min(same, len(prompt) - 1):  # the last token is computed again: its hidden state is needed
                batch.shorten(keep)
                batch.requests = requests
                self._kept = None
                return batch, batch.forward(self._lm, torch.tensor([prompt[keep:]]))
        self._kept = None
        # Several answers to one prompt share its prefill. An adapter may embed other extras for the same tokens.
        prompts = [tuple(request.prompt_ids) for request in requests]
        place_of = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        rows = [place_of[prompt] for prompt in prompts]
        first = [requests[rows.index(place)] for place in range(len(place_of))]
        batch = _Batch(self._lm, first)
        if self._embed is not None or not batch.can_join:
            rows, first, batch = list(range(len(requests))), requests, _Batch(self._lm, requests)
        length = max(len(request.prompt_ids) for request in first)
        ids_BT = torch.zeros(len(first), length, dtype=torch.int64)  # any id will do: padding is masked
        mask_BT = torch.zeros_like(ids_BT)
        for row, request in enumerate(first):
            start = length - len(request.prompt_ids)
            ids_BT[row, start:] = torch.tensor(request.prompt_ids)
            mask_BT[row, start:] = 1
        replaced: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._embed is not None:
            replaced = replacing_embeddings(self._lm.model, functools.partial(_put_right, self._embed(first)))
        with replaced:
            hidden_BD = batch.forward(self._lm, ids_BT, mask_BT)
        if len(first) < len(requests):
            batch.keep(rows)
            batch.requests = requests
            hidden_BD = hidden_BD[rows]
        return batch, hidden_BD

    def _choose(self, hidden_BD: Tensor, requests: Sequence[Request]) -> list[Request]:
        """Append a token to each answer that is not complete, or complete it; return these requests."""
        moved = []
        logits_BV = next_token_logits(self._lm, hidden_BD)
        tokens = _next_tokens(logits_BV, requests)
        normalisers = logits_BV.logsumexp(-1) if self._with_log_probabilities else None
        for row, request in enumerate(requests):
            if request.finish_reason:
                continue  # it was cancelled, or is in a batch whose rows all stay until its end
            moved.append(request)
            token = tokens[row]
            if normalisers is not None:
                request.log_probabilities.append(float(logits_BV[row, token] - normalisers[row]))
            if token in self._stop_ids:
                request.finish_reason, request.stop_id = "stop", token
            else:
                request.answer_ids.append(token)
                if request.text is not None:
                    request.text.add(token)
                if request.text is not None and request.text.is_stopped:
                    request.finish_reason = "stop"
                elif len(request.answer_ids) == request.sampling.max_new_tokens:
                    request.finish_reason = "length"
            if request.finish_reason and request.text is not None:
                request.text.finish()
        return moved


def _put_right(rows: Sequence[Tensor], embeds_BTD: Tensor) -> Tensor:
    """Return embeddings that are padded at the left, with these rows, [T, D] each, in place of their own."""
    embeds_BTD = embeds_BTD.clone()
    for b, row_TD in enumerate(rows):
        embeds_BTD[b, embeds_BTD.shape[1] - len(row_TD) :] = row_TD
    return embeds_BTD


def next_token_logits(lm: LanguageModel, hidden_BD: Tensor) -> Tensor:
    """Return the logits [B, V] in fp32, with the architecture's scale and soft cap."""
    logits_BV = F.linear(hidden_BD, lm.head_weight, lm.head_bias).float()
    if lm.logit_scale != 1:
        logits_BV *= lm.logit_scale
    if lm.softcap is not None:
        logits_BV = lm.softcap * torch.tanh(logits_BV / lm.softcap)
    return logits_BV


# --- choosing a token ---------------------------------------------------------------------------


def _next_tokens(logits_BV: Tensor, requests: Sequence[Request]) -> list[int]:
    """Return the next token of each request.

    A token is drawn by the inverse of the cumulative distribution in the order of the vocabulary, which rounding does
    not change, as it changes the order of nearly equal probabilities.
    """
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    unfiltered = []
    for row, request in enumerate(requests):
        sampling = request.sampling
        if request.finish_reason or (sampling.temperature == 0 and sampling.repetition_penalty == 1):
            continue
        if (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0, 1, 0, 1):
            unfiltered.append(row)
        else:
            tokens[row] = _draw(logits_BV[row], request)
    if unfiltered:  # all at once: on a GPU the host waits for one result instead of one a row
        temperatures = logits_BV.new_tensor([requests[row].sampling.temperature for row in unfiltered])
        logits = logits_BV if len(unfiltered) == len(requests) else logits_BV[unfiltered]
        probabilities = torch.softmax(logits / temperatures[:, None], -1)
        for row, token in zip(unfiltered, _inverse(probabilities, [requests[row] for row in unfiltered]), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits_V: Tensor, request: Request) -> int:
    """Return the next token of a request with a filter or a penalty for repetitions."""
    sampling = request.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.prompt_ids, *request.answer_ids}), device=logits_V.device)
        values = logits_V[seen]
        penalised = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        logits_V = logits_V.index_copy(0, seen, penalised)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = _candidates(logits_V / sampling.temperature, sampling)
    below = probabilities.cumsum(0) - probabilities  # the most likely token is always kept
    kept = (below < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[0])
    tokens, places = order[kept].sort()
    (place,) = _inverse(probabilities[kept][places][None], [request])
    return int(tokens[place])


def _inverse(probabilities_BV: Tensor, requests: Sequence[Request]) -> list[int]:
    """Return where in each row of probabilities, which need not add up to 1, the request's random number lies."""
    cumulative_BV = probabilities_BV.double().cumsum(-1)
    shares = [_uniform(request.sampling.seed, len(request.answer_ids)) for request in requests]
    shares_B1 = torch.tensor(shares, dtype=torch.float64, device=cumulative_BV.device)[:, None]
    # The product is below the last sum, whose precision is finer than the largest share's distance to 1.
    places_B1 = torch.searchsorted(cumulative_BV, shares_B1 * cumulative_BV[:, -1:], right=True)
    return [int(place) for place in places_B1[:, 0].tolist()]


def _candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return probabilities of the most likely tokens in descending order, and these tokens: all that may be drawn."""
    if sampling.top_k:
        logits, order = logits_V.topk(min(sampling.top_k, len(logits_V)))
        return torch.softmax(logits, -1), order
    probabilities_V = torch.softmax(logits_V, -1)
    probabilities, order = probabilities_V.topk(min(_FEW_TOKENS, len(logits_V)))
    if probabilities.sum() > sampling.top_p or probabilities[-1] < sampling.min_p * probabilities[0]:
        return probabilities, order
    return cast("tuple[Tensor, Tensor]", tuple(probabilities_V.sort(descending=True, stable=True)))


def _uniform(seed: int, number: int) -> float:
    """Return a number in [0, 1) that is a pure function of the seed and the number of the token."""
    key = f"token {seed} {number}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48


# --- keys and values ----------------------------------------------------------------------------


class _GrowingLayer(DynamicLayer):
    """Keys and values with room for more tokens, which are written in place: transformers' layer copies all of them
    for each token.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_columns = 0
        """Tokens that there is room for after the next `update`, if they are enough."""
        self._room: dict[str, Tensor] = {}
        """Keys and values with the room after them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states, start)
        self.values = self._appended("values", self.values, value_states, start)
        return self.keys, self.values

    def _appended(self, name: str, old: Tensor | None, new: Tensor, start: int) -> Tensor:
        """Write new columns after the first `start` ones; return them together, without the room."""
        end, room = start + new.shape[-2], self._room.get(name)
        if room is None or end > room.shape[-2]:
            room = new.new_empty(*new.shape[:-2], max(end, self.num_columns), new.shape[-1])
            if start:
                room.narrow(-2, 0, start).copy_(cast(Tensor, old))
            self._room[name] = room
        room.narrow(-2, start, end - start).copy_(new)
        return room.narrow(-2, 0, end)

    def replace(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self._room = keys, values, {}


class _Batch:
    """Rows in progress: their requests, the mask of their tokens, and their keys and values.

    `can_join` is False for a model whose layers keep another state than keys and values; its rows begin together, and
    stay until the last is complete.
    """

    def __init__(self, lm: LanguageModel, requests: list[Request]) -> None:
        self.requests = requests
        layers: list[Any] = list(DynamicCache(config=lm.model.config).layers)
        self.can_join = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        # A layer with a sliding window keeps all tokens as well: its mask hides those outside of the window.
        self._cache: Any = Cache(layers=[_GrowingLayer() for _ in layers] if self.can_join else layers)
        if not cast(Any, lm.model)._supports_default_dynamic_cache():
            self._cache, self.can_join = None, False  # the model makes a cache of its own
        self._has_attention = self._cache is None or any(isinstance(layer, DynamicLayer) for layer in layers)
        self._mask_BT = torch.zeros(len(requests), 0, dtype=torch.int64, device=lm.device)
        self._is_padded = False
        self._num_columns = 0
        """Tokens that the layers have room for."""

    @property
    def length(self) -> int:
        """Return the number of columns of the cache, padding included."""
        return self._mask_BT.shape[1]

    def last_ids(self) -> Tensor:
        """Return the last token of each row, [B, 1]. A row that is complete has some token, which nobody reads."""
        return torch.tensor([(request.answer_ids or request.prompt_ids)[-1:] for request in self.requests])

    def forward(self, lm: LanguageModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Append tokens to each row; return the hidden state of the last one, [B, D]. A mask is 0 where there is
        padding at the left.
        """
        ids_BT = ids_BT.to(lm.device)
        new_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.to(lm.device)
        self._mask_BT = torch.cat([self._mask_BT, new_BT], 1)
        if mask_BT is not None:
            self._find_padding()
        positions_BT = (self._mask_BT.cumsum(1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        # While prompts are read, whose activations are many, there is room for the prompts alone.
        if self.can_join and self.length > self._num_columns and ids_BT.shape[1] == 1:
            self._make_room()
        # A state in which padding had no part needs no mask afterwards.
        is_masked = self._is_padded and (self._has_attention or mask_BT is not None)
        decoder: Any = lm.model.get_decoder()
        out = decoder(
            input_ids=ids_BT,
            attention_mask=self._mask_BT if is_masked else None,
            position_ids=positions_BT,
            use_cache=True,
            **{_cache_argument(decoder.__class__): self._cache},
        )
        if self._cache is None:
            self._cache = out[_cache_argument(decoder.__class__)]
        # As a slice with gaps it would be multiplied with B copies of a frozen head.
        return cast(Tensor, out.last_hidden_state)[:, -1].contiguous()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, some of them several times, and no column that is padding in all of them."""
        self.requests = [self.requests[row] for row in rows]
        mask_BT = self._mask_BT[list(rows)]
        first = int(mask_BT.any(0).int().argmax())
        self._mask_BT = mask_BT[:, first:]
        chosen = torch.tensor(rows, device=self._mask_BT.device)
        self._change(lambda tensor: tensor.index_select(0, chosen)[..., first:, :])
        self._find_padding()

    def shorten(self, length: int) -> None:
        """Keep the first columns alone."""
        self._mask_BT = self._mask_BT[:, :length]
        self._change(lambda tensor: tensor[..., :length, :])
        self._find_padding()

    def joined(self, other: _Batch) -> _Batch:
        """Return this batch with the rows of another one; the shorter of both is padded at the left."""
        length = max(self.length, other.length)
        for batch in (self, other):
            if missing := length - batch.length:
                batch._mask_BT = F.pad(batch._mask_BT, (missing, 0))
                batch._change(lambda tensor, missing=missing: F.pad(tensor, (0, 0, missing, 0)))  # type: ignore[misc]
        self.requests = [*self.requests, *other.requests]
        self._mask_BT = torch.cat([self._mask_BT, other._mask_BT])
        for ours, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            if theirs.is_initialized:
                ours.replace(torch.cat([ours.keys, theirs.keys]), torch.cat([ours.values, theirs.values]))
        self._num_columns = 0
        self._find_padding()
        return self

    def _find_padding(self) -> None:
        self._is_padded = not bool(self._mask_BT.all())

    def _make_room(self) -> None:
        """Let the layers allocate for more tokens than there are, and for no more than the answers may have."""
        most = max(one.sampling.max_new_tokens - len(one.answer_ids) for one in self.requests) - 1
        self._num_columns = min(max(self.length + _LEAST_ROOM, int(_GROWTH * self.length)), self.length + max(0, most))
        for layer in self._cache.layers:
            layer.num_columns = self._num_columns

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._num_columns = 0
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.replace(change(layer.keys), change(layer.values))


@functools.cache
def _cache_argument(decoder: Any) -> str:
    """Return the name of the decoder's argument for keys and values, which transformers has changed."""
    names = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values", "state") if name in names), "past_key_values")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    if not model.training:  # every module would be visited for each token
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
