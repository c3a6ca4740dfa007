# SPDX-License-Identifier: Apache-2.0
"""The interface for extensions: every name that another package needs to add to districompile.

Register the sharding of an operator
    :func:`rule` registers how an operator is sharded. The function is given a :class:`ShardingBuilder` (``emit``,
    ``fetch``, ``gather``, ``reduce``, ``value``, ...) and the operator's arguments, tensors as :class:`ShardedValue`
    with a :class:`Layout`. :func:`rows_of` gives the sharded dim and its bounds, :func:`per_rank` an argument that
    differs by rank. :class:`Refused` says why a rule cannot do what is asked, :class:`Sample` is an example to test
    with.

Describe an operator of one's own
    :func:`operator` declares an operator, so that bundles may name it. :func:`decomposition` registers what it is made
    of, :func:`onnx_translation` how it is written as ONNX. :func:`functional_form` gives the form in which graphs hold
    an operator that writes to its arguments.

Transform graphs
    :class:`Pass` is the protocol of a pass, :class:`CompilationUnit` what it transforms, :data:`Stage` the stage of its
    graph. :data:`ops` holds districompile's own operators (``ops.fetch.default``, ``ops.reduce.default``, ...),
    :func:`at_rank` gives one rank's arguments.

Compile segments
    :class:`Backend` is the base class of backends, :class:`Engine` of what they load. A :class:`SegmentGraph` is what
    is compiled; its values have a :class:`TensorSpec`; its weights lie in a :class:`WeightFile`. :func:`graph_to_json`
    and :func:`graph_from_json` store graphs, :func:`needed_nodes` lists the nodes that the outputs need,
    :func:`op_name` names an operator, or says why it cannot be stored, :func:`check_input` checks a tensor that is
    bound, :func:`source_line` says where in the model a node comes from. A :class:`LayerSize` is what a backend is
    asked about where layers may have 8 bits.

Load models
    :class:`LoadedModel`, made with :func:`loaded_model`, is what a model source returns: a module with
    :class:`Example` inputs. :func:`load_source` loads any MODEL of the command line, :func:`load_pipeline` the
    diffusers pipeline around it: a source may change what they give.

Report errors
    :class:`Error` is the base of all errors that are printed as one line; :class:`BackendError` and
    :class:`ConvertError` are those of backends and of passes and rules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

import districompile.passes.rules.table  # noqa: F401  (built-in rules first: a duplicate is an error of the other one)
from districompile.backends.base import Backend, Engine, check_input, source_line
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError, ConvertError, Error
from districompile.ir.layer_size import LayerSize
from districompile.ir.layout import Layout, PerRank, Refused, at_rank, per_rank
from districompile.ir.operators import declare_operator, decompose_with, functional_form, translate_with
from districompile.ir.ops import ops
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import graph_from_json, graph_to_json, op_name
from districompile.ir.serialize import needed as needed_nodes
from districompile.ir.spec import TensorSpec
from districompile.ir.unit import CompilationUnit, Stage
from districompile.models.inputs import Example
from districompile.models.sources import LoadedModel, load_pipeline, load_source
from districompile.passes.manager import Pass
from districompile.sharding.builder import ShardedValue, ShardingBuilder, rows_of
from districompile.sharding.registry import Sample, rule

F = TypeVar("F", bound=Callable[..., Any])


def operator(*ops: torch._ops.OpOverload) -> None:
    """Declare operators that have no rule, decomposition or translation, so that bundles may name them.

    Such an operator is computed on gathered inputs. It needs a fake kernel (``torch.library.register_fake``). Raises
    :class:`ConvertError` for what is no overload (``torch.ops.NAMESPACE.NAME.default``).
    """
    module = str(sys._getframe(1).f_globals.get("__name__", "__main__"))
    for op in ops:
        declare_operator(op, module)


def decomposition(op: torch._ops.OpOverload) -> Callable[[F], F]:
    """Register the decorated function as what ``op`` is made of: it takes the operator's arguments and calls operators
    of PyTorch.

    Backends that need it (onnxruntime, tensorrt) compile the decomposition; eager and inductor call the operator
    itself. An operator without a rule is decomposed when the model is captured: its parts then have rules.
    """

    def register(function: F) -> F:
        decompose_with(op, function, function.__module__)
        return function

    return register


def onnx_translation(op: torch._ops.OpOverload) -> Callable[[F], F]:
    """Register the decorated function as the ONNX translation of ``op``: one that :func:`torch.onnx.export` takes in
    its ``custom_translation_table``, written with ``onnxscript.opset20``.

    It takes precedence over a decomposition, and serves onnxruntime and tensorrt.
    """

    def register(function: F) -> F:
        translate_with(op, function, function.__module__)
        return function

    return register


def loaded_model(
    module: torch.nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None,
    rows: Mapping[str, int] | None = None, source: str = "",
) -> LoadedModel:  # fmt: skip
    """Return a module with the inputs of one call, for a model source whose inputs have a fixed size.

    ``rows`` names the inputs that are sharded, with the dim of their rows; ``source`` is what loads it again.
    """
    module.eval().requires_grad_(False)
    example = Example(tuple(args), dict(kwargs or {}), None if rows is None else dict(rows))
    return LoadedModel(module, "factory", source, "none", None, lambda size, seed: example)


__all__ = [
    "Backend",
    "BackendError",
    "CompilationUnit",
    "ConvertError",
    "Engine",
    "Error",
    "Example",
    "LayerSize",
    "Layout",
    "LoadedModel",
    "Pass",
    "PerRank",
    "Refused",
    "Sample",
    "SegmentGraph",
    "ShardedValue",
    "ShardingBuilder",
    "Stage",
    "TensorSpec",
    "WeightFile",
    "at_rank",
    "check_input",
    "decomposition",
    "functional_form",
    "graph_from_json",
    "graph_to_json",
    "load_pipeline",
    "load_source",
    "loaded_model",
    "needed_nodes",
    "onnx_translation",
    "op_name",
    "operator",
    "ops",
    "per_rank",
    "rows_of",
    "rule",
    "source_line",
]
