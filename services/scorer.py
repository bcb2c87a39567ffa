"""Scores, vectors and states from the ONNX graphs of a bundle. Needs onnxruntime, tokenizers and numpy, no torch.

Shapes: B requests, N candidates, T states per item, H hidden size, D vector size (= H), F features, L-k layers above
the split, h heads, d head size, U user tokens. Safe to call from several
threads: sessions and tokenizers are fixed once loaded.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from services.aside import Run, at_once
from services.parts import Parts
from tailrace.bundle import MODEL_CARD, Bundle, LooseBundle
from tailrace.errors import BundleError, ProviderError
from tailrace.model_card import RankerCard, load_ranker_card
from tailrace.tastes import TASTE_MODEL_FILE, TasteModel

Precision = Literal["int8", "fp16", "fp32"]
Provider = Literal["cpu", "cuda"]
Floats = NDArray[np.float32]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TOKENIZER = "tokenizer.json"
# Texts encoded and item states scored in one call: on a CPU enough to keep the products busy and few enough to stay in
# a core's cache, on a GPU whatever a batch of requests brings.
_TEXTS_PER_CALL: Mapping[Provider, int] = {"cpu": 32, "cuda": 256}
_STATES_PER_CALL: Mapping[Provider, int] = {"cpu": 512, "cuda": 65_536}


@dataclass(frozen=True)
class EncodedUsers:
    """What scoring needs of B users: keys [B,L-k,h,d,U], values [B,L-k,h,U,d], mask [B,U] int64, unit vectors [B,D]."""

    keys: Floats
    values: Floats
    mask: NDArray[np.int64]
    vectors_BD: Floats


@dataclass(frozen=True)
class EncodedItems:
    """What scoring needs of N items, as it is kept: float16 states [N,T,H], their mask [N,T], unit vectors [N,D]."""

    states_NTH: NDArray[np.float16]
    mask_NT: NDArray[np.bool_]
    vectors_ND: Floats


class Scorer:
    """One version of the ranker at one precision on one provider."""

    def __init__(
        self,
        card: RankerCard,
        tokenizers: tuple[Tokenizer, Tokenizer],
        sessions: tuple[onnxruntime.InferenceSession, ...],
        taste_model: TasteModel,
        provider: Provider,
    ) -> None:
        self.card = card
        self.taste_model = taste_model
        self._texts_per_call, self._states_per_call = _TEXTS_PER_CALL[provider], _STATES_PER_CALL[provider]
        self._user_tokenizer, self._item_tokenizer = tokenizers
        self._user_encoder, self._item_encoder, self._scorer = sessions
        self._scorer_inputs = {value.name for value in self._scorer.get_inputs()}  # two towers look at no keys

    @classmethod
    def load(
        cls,
        directory: Path,
        parts: Parts | None = None,
        *,
        precision: Precision = "int8",
        provider: Provider = "cpu",
        intra_op_threads: int = 1,
    ) -> Self:
        """Returns the scorer of a bundle's folder, whose checksums the caller has verified: see `open`."""
        return cls.open(
            LooseBundle(directory),
            parts or Parts(),
            at_once,
            precision=precision,
            provider=provider,
            intra_op_threads=intra_op_threads,
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        parts: Parts,
        run: Run,
        *,
        precision: Precision,
        provider: Provider,
        intra_op_threads: int,
    ) -> Self:
        """Returns the scorer of a bundle; of its graphs and tokenizer, what `parts` holds already is not read again.

        Graphs are checked and opened where `run` does it, piece by piece. Raises ProviderError where ONNX Runtime would
        run elsewhere than asked, BundleError naming a file that is missing or damaged: only checksums tell a damaged
        weight.
        """
        card = load_ranker_card(bundle.file(MODEL_CARD).parent)
        if precision not in card.precisions:
            raise BundleError(f"{card.version} holds {', '.join(card.precisions)}, not {precision}")
        words = f"{precision}/words.bin"

        def tokenizer(max_tokens: int) -> Tokenizer:
            made_of = (bundle.sum(_TOKENIZER), max_tokens)
            return parts.get(made_of, lambda: _load_tokenizer(bundle.file(_TOKENIZER), max_tokens))

        def session(graph: str) -> onnxruntime.InferenceSession:
            name = f"{precision}/{graph}.onnx"

            def open_graph() -> onnxruntime.InferenceSession:
                run(lambda: bundle.file(words))  # the graph names it
                path = run(lambda: bundle.file(name))
                return run(lambda: _open_session(path, provider, intra_op_threads))

            return parts.get((bundle.sum(name), bundle.sum(words), provider, intra_op_threads), open_graph)

        tokenizers = (tokenizer(card.max_user_tokens), tokenizer(card.max_item_tokens))
        sessions = tuple(session(graph) for graph in ("user_encoder", "item_encoder", "scorer"))
        return cls(card, tokenizers, sessions, TasteModel.load(bundle.file(TASTE_MODEL_FILE)), provider)

    @property
    def encoders(self) -> tuple[Hashable, Hashable]:
        """What encodes users, and what encodes items: equal where two versions were opened from the same `Parts`."""
        return (self._user_tokenizer, self._user_encoder), (self._item_tokenizer, self._item_encoder)

    def encode_users(self, texts: Sequence[str]) -> EncodedUsers:
        """Returns what scoring needs of the users with these texts, padded to the longest of them; at least one."""
        if not texts:
            raise ValueError("no user texts to encode")
        tokens, mask = self._pad([encoding.ids for encoding in self._user_tokenizer.encode_batch(list(texts))])
        found = [
            self._user_encoder.run(
                ("user_keys", "user_values", "user_vectors"), {"user_tokens": tokens[part], "user_mask": mask[part]}
            )
            for part in _parts(len(texts), self._texts_per_call)
        ]
        keys, values, vectors = (np.concatenate(outputs) for outputs in zip(*found, strict=True))
        return EncodedUsers(keys, values, mask, vectors)

    def encode_items(self, texts: Sequence[str]) -> EncodedItems:
        """Returns what scoring needs of the items with these texts, in their order.

        Texts of like length are encoded together, so little is spent on padding.
        """
        card = self.card
        kept = card.item_states or card.max_item_tokens
        states = np.zeros((len(texts), kept, card.hidden_size), np.float16)
        mask = np.zeros((len(texts), kept), np.bool_)
        vectors = np.zeros((len(texts), card.hidden_size), np.float32)
        for rows, tokens, token_mask in self._by_length(self._item_tokenizer, texts):
            found, found_mask, found_vectors = self._item_encoder.run(
                ("item_states", "item_state_mask", "item_vectors"), {"item_tokens": tokens, "item_mask": token_mask}
            )
            states[rows, : found.shape[1]] = found
            mask[rows, : found.shape[1]] = found_mask
            vectors[rows] = found_vectors
        return EncodedItems(states, mask, vectors)

    def score(
        self,
        users: EncodedUsers,
        states_BNTH: NDArray[np.floating],
        mask_BNT: NDArray[np.bool_ | np.integer],
        features_BNF: Floats,
        tag_worth_BN: Floats,
    ) -> tuple[Floats, Floats]:
        """Returns click logits [B,N] and ratings [B,N] in 1..5 of each user's candidates.

        `tag_worth_BN` is what the `taste_model` says of the candidates' tags. What stands in padded candidates (an
        empty mask) is scored too and means nothing. In int8 the activations of a call share their scales, so candidates
        scored together move each other by quantization noise; in the float precisions they do not move at all. Raises
        ValueError where features or worths are not those of the model.
        """
        batch, count, _ = mask_BNT.shape
        if features_BNF.shape != (batch, count, len(self.card.feature_names)):
            wanted = (batch, count, len(self.card.feature_names))
            raise ValueError(f"features have shape {features_BNF.shape}, where the model takes {wanted}")
        if tag_worth_BN.shape != (batch, count):
            raise ValueError(
                f"worths of tags have shape {tag_worth_BN.shape}, where there are {(batch, count)} candidates"
            )
        logits, ratings = self._run_scorer(
            ("click_logits", "ratings"), users, states_BNTH, mask_BNT, features_BNF, tag_worth_BN
        )
        return logits, ratings

    def pool(
        self, users: EncodedUsers, states_BNTH: NDArray[np.floating], mask_BNT: NDArray[np.bool_ | np.integer]
    ) -> Floats:
        """Returns float32 [B,N,H]: what the head is given of each user's candidates, on the way to `score`."""
        batch, count, _ = mask_BNT.shape
        features_BNF = np.zeros((batch, count, len(self.card.feature_names)), np.float32)
        tag_worth_BN = np.zeros((batch, count), np.float32)
        [pooled_BNH] = self._run_scorer(("pooled_states",), users, states_BNTH, mask_BNT, features_BNF, tag_worth_BN)
        return pooled_BNH

    def _run_scorer(
        self,
        outputs: Sequence[str],
        users: EncodedUsers,
        states_BNTH: NDArray[np.floating],
        mask_BNT: NDArray[np.bool_ | np.integer],
        features_BNF: Floats,
        tag_worth_BN: Floats,
    ) -> list[Floats]:
        """Returns outputs of the scorer's graph, each [B,N] or [B,N,H], from as many calls as the states fill."""
        batch, count, num_states = mask_BNT.shape
        # Where every token keeps its state, columns that no candidate fills are left out.
        if not self.card.item_states and count:
            num_states = max(int(np.asarray(mask_BNT, np.bool_).any((0, 1)).sum()), 1)
        shared = {
            "user_keys": users.keys,
            "user_values": users.values,
            "user_mask": users.mask,
            "user_vectors": users.vectors_BD,
        }
        width = {"pooled_states": (self.card.hidden_size,)}
        found = [np.zeros((batch, count, *width.get(name, ())), np.float32) for name in outputs]
        for part in _parts(count, max(self._states_per_call // (num_states * max(batch, 1)), 1)):
            feeds = shared | {
                "item_states": states_BNTH[:, part, :num_states].astype(np.float32),
                "item_state_mask": mask_BNT[:, part, :num_states].astype(np.int64),
                "features": features_BNF[:, part].astype(np.float32),
                "tag_worth": tag_worth_BN[:, part].astype(np.float32),
            }
            feeds = {name: value for name, value in feeds.items() if name in self._scorer_inputs}
            for whole, of_part in zip(found, self._scorer.run(outputs, feeds), strict=True):
                whole[:, part] = of_part
        return found

    def _by_length(
        self, tokenizer: Tokenizer, texts: Sequence[str]
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]]:
        """Yields the rows of texts of like length, with their tokens and mask, a micro-batch at a time."""
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        order = np.argsort([len(tokens) for tokens in ids], kind="stable")
        for part in _parts(len(order), self._texts_per_call):
            rows = order[part]
            yield rows, *self._pad([ids[row] for row in rows])

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        width = max((len(tokens) for tokens in ids), default=0)
        tokens = np.full((len(ids), width), self.card.pad_token_id, np.int64)
        mask = np.zeros((len(ids), width), np.int64)
        for row, found in enumerate(ids):
            tokens[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return tokens, mask


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _load_tokenizer(path: Path, max_tokens: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise BundleError(f"{path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _open_session(path: Path, provider: Provider, intra_op_threads: int) -> onnxruntime.InferenceSession:
    """Returns a session that runs where it was asked to. Raises ProviderError or BundleError."""
    wanted = _PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise ProviderError(
            f"{wanted} is not in this build of ONNX Runtime: {', '.join(onnxruntime.get_available_providers())}"
        )
    if provider == "cuda":
        onnxruntime.preload_dlls()  # NVIDIA's wheels lie on no library path
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    # A waiting thread sleeps: replicas share their cores with the stream workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise BundleError(f"{path}: {error}") from error
    if session.get_providers()[0] != wanted:
        raise ProviderError(f"{path}: asked for {wanted}, ONNX Runtime chose {session.get_providers()[0]}")
    return session
