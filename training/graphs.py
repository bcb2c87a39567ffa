"""The three ONNX graphs of a ranker: traced once in float32, then written in the precisions that serve.

The word table is most of a small BERT. Both encoders of a precision read the same `words.bin`, which ONNX Runtime maps
into memory: it is stored once, and its pages are shared by every session and replica on a machine.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from training.model import SplitRanker

Precision = Literal["int8", "fp16", "fp32"]

OPSET = 17
WORD_TABLE = "word_table"
WORDS_FILE = "words.bin"
# The tracer names nodes after the module that ran them; these stay float32 in every precision.
FLOAT_SCOPES = ("/head/", "/to_vector/")


class _UserEncoder(nn.Module):
    def __init__(self, ranker: SplitRanker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, tokens: Tensor, mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ranker.encode_users(tokens, mask, table)


class _ItemEncoder(_UserEncoder):
    def forward(self, tokens: Tensor, mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ranker.encode_items(tokens, mask, table)


class _Scorer(nn.Module):
    def __init__(self, ranker: SplitRanker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ranker.score(*inputs)


def trace_graphs(ranker: SplitRanker) -> dict[str, onnx.ModelProto]:
    """Returns the float32 graphs by name. The encoders take the word table as an input; `save_graphs` puts it back."""
    user_tokens = torch.ones(2, 7, dtype=torch.int64)
    item_tokens = torch.ones(3, 5, dtype=torch.int64)
    words = ranker.bert.words.weight.detach()
    with torch.no_grad():
        keys, values, vectors = ranker.encode_users(user_tokens, user_tokens)
        states, state_mask, _ = ranker.encode_items(item_tokens, item_tokens)
    slate_states = states.expand(2, *states.shape).contiguous()
    slate_mask = state_mask.expand(2, *state_mask.shape).contiguous()
    features = torch.zeros(2, 3, len(ranker.feature_names))
    tag_worth = torch.zeros(2, 3)

    users = {"user_tokens": {0: "B", 1: "U"}, "user_mask": {0: "B", 1: "U"}}
    encoded_users = {"user_keys": {0: "B", 4: "U"}, "user_values": {0: "B", 3: "U"}, "user_vectors": {0: "B"}}
    items = {"item_tokens": {0: "N", 1: "S"}, "item_mask": {0: "N", 1: "S"}}
    kept = {} if ranker.item_states else {1: "T"}  # a pooled item has always T states; the rest is folded in
    encoded_items = {"item_states": {0: "N", **kept}, "item_state_mask": {0: "N", **kept}, "item_vectors": {0: "N"}}
    slate = {0: "B", 1: "N"}
    slate_kept = {} if ranker.item_states else {2: "T"}
    candidates = {"item_states": slate | slate_kept, "item_state_mask": slate | slate_kept}
    candidates |= {"features": slate, "tag_worth": slate}
    scores = {"click_logits": slate, "ratings": slate, "pooled_states": slate}
    return {
        "user_encoder": trace_graph(
            _UserEncoder(ranker), (user_tokens, user_tokens, words), [*users, WORD_TABLE], encoded_users, users
        ),
        "item_encoder": trace_graph(
            _ItemEncoder(ranker), (item_tokens, item_tokens, words), [*items, WORD_TABLE], encoded_items, items
        ),
        "scorer": trace_graph(
            _Scorer(ranker),
            (keys, values, user_tokens, vectors, slate_states, slate_mask, features, tag_worth),
            ["user_keys", "user_values", "user_mask", "user_vectors", *candidates],
            scores,
            encoded_users | {"user_mask": users["user_mask"]} | candidates,
        ),
    }


def trace_graph(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    outputs: Mapping[str, Mapping[int, str]],
    input_axes: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """Returns a module's graph by the tracing exporter, which keeps axes free and takes a second, not minutes."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)  # its own notice that it is the older exporter
        warnings.simplefilter("error", TracerWarning)  # a size that would be frozen into the graph
        path = Path(folder) / "graph.onnx"
        torch.onnx.export(
            module.eval(),
            inputs,
            path,
            input_names=list(input_names),
            output_names=list(outputs),
            dynamic_axes={**input_axes, **outputs},
            opset_version=OPSET,
            dynamo=False,
        )
        return onnx.load(path)


def save_graphs(
    graphs: Mapping[str, onnx.ModelProto], words_VH: np.ndarray, directory: Path, precision: Precision
) -> None:
    """Writes `<graph>.onnx` for each graph and the word table they share, in one precision.

    int8 quantizes the products with constants, weights per channel and signed, activations at run time with one scale
    per product; the word table is kept as float16. The head stays float32 in every precision, for features are raw
    numbers of any size and the untrained score must be the prior's exactly; so do the means that make vectors.
    int8 serves on CPUs alone, so those graphs are written fused for one: that halves what it takes to open them.
    """
    directory.mkdir()
    words = words_VH.astype(np.float32 if precision == "fp32" else np.float16)
    words.tofile(directory / WORDS_FILE)
    for name, graph in graphs.items():
        path = directory / f"{name}.onnx"
        kept = [node.name for node in graph.graph.node if any(scope in node.name for scope in FLOAT_SCOPES)]
        assert kept, f"the tracer no longer names the nodes of {name} after their modules"
        if precision == "int8":
            model = quantize_graph(graph, kept)
        elif precision == "fp16":
            model = _halve(graph, kept)
        else:
            model = _copy(graph)
        if any(value.name == WORD_TABLE for value in model.graph.input):
            _attach_words(model, words)
        path.write_bytes(model.SerializeToString())
        if precision == "int8":
            _fuse(path)


def _fuse(path: Path) -> None:
    """Writes a graph as ONNX Runtime itself rewrites it for any CPU, in place; it computes the same."""
    fused = path.with_suffix(".fused")  # beside the words it names
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fused.replace(path)


def quantize_graph(graph: onnx.ModelProto, kept: Sequence[str] = ()) -> onnx.ModelProto:
    """Returns a graph with its products with constants in int8; nodes named in `kept` stay float32."""
    model = _copy(graph)
    _part_constants(model)
    # Says that shapes are known; without it the quantizer advises to infer them, through the root logger.
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Seven bits: of eight, products overflow on processors without VNNI, and the same bundle would rank
            # differently there from where it was judged.
            reduce_range=True,
            nodes_to_exclude=list(kept),
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(path)


def _part_constants(model: onnx.ModelProto) -> None:
    """Gives each product a constant of its own, in place: of those that share one, the quantizer changes the first.

    The tracer lets equal weights share one, some by way of an Identity.
    """
    constants = {one.name: one for one in model.graph.initializer}
    aliases = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Identity"}
    used: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if node.op_type != "MatMul":
            continue
        source = aliases.get(node.input[1], node.input[1])
        if source not in constants:
            continue
        if source in used:
            own = model.graph.initializer.add()
            own.CopyFrom(constants[source])
            own.name = f"{source}_{number}"
            node.input[1] = own.name
        else:
            node.input[1] = source
        used.add(source)


def _halve(graph: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    model = _copy(graph)
    float_ends = [value.name for value in [*model.graph.input, *model.graph.output] if value.name != WORD_TABLE]
    halved = convert_float_to_float16(model, keep_io_types=float_ends, node_block_list=list(kept))
    # The converter narrows every input and widens it again for the head, where a large counter would become infinite:
    # a widening that follows a narrowing reads what was there before.
    narrowed = {n.output[0]: n.input[0] for n in halved.graph.node if _casts_to(n, TensorProto.FLOAT16)}
    made: set[str] = set()
    repeated: list[int] = []  # ONNX Runtime 1.31 widens a value once for each reader, every time under the same name
    for place, node in enumerate(halved.graph.node):
        if _casts_to(node, TensorProto.FLOAT) and node.input[0] in narrowed:
            node.input[0] = narrowed[node.input[0]]
        if node.output[0] in made:
            assert _casts_to(node, TensorProto.FLOAT), f"{node.op_type} makes {node.output[0]} a second time"
            repeated.append(place)
        made.update(node.output)
    for place in reversed(repeated):
        del halved.graph.node[place]
    return halved


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return bool(node.op_type == "Cast" and node.attribute[0].i == kind)


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    return model


def _attach_words(model: onnx.ModelProto, words: np.ndarray) -> None:
    """Turns the word table from an input of the graph into a constant that lies in `words.bin`, in place."""
    graph = model.graph
    declared = next(value for value in graph.input if value.name == WORD_TABLE)
    wanted = declared.type.tensor_type.elem_type
    graph.input.remove(declared)
    table = graph.initializer.add()
    table.name = WORD_TABLE
    table.dims.extend(words.shape)
    table.data_type = helper.np_dtype_to_tensor_dtype(words.dtype)
    table.data_location = TensorProto.EXTERNAL
    for key, value in {"location": WORDS_FILE, "offset": "0", "length": str(words.nbytes)}.items():
        table.external_data.add(key=key, value=value)
    if table.data_type != wanted:  # look up the small table first, widen what was found
        place, lookup = next((i, node) for i, node in enumerate(graph.node) if WORD_TABLE in node.input)
        found = lookup.output[0]
        lookup.output[0] = f"{found}_narrow"
        graph.node.insert(place + 1, helper.make_node("Cast", [lookup.output[0]], [found], to=wanted))
