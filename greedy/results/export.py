"""Export of the trained network to one file that needs no greedy."""

import inspect
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import nn

from greedy.base.errors import UserError, first_line, missing_packages, unknown
from greedy.base.files import require_writable, write_output
from greedy.losses import LocalLoss
from greedy.models import Shape
from greedy.models.chain import has_hooks, is_sequential
from greedy.runs.directory import RunDirectory
from greedy.runs.network import assemble
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState

FORMATS: Final = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}


def format_of(path: Path) -> str:
    """Returns the format of a file by its suffix. Raises ``UserError`` for any other suffix."""
    for name, suffix in FORMATS.items():
        if path.suffix == suffix:
            return name
    choices = ", ".join(f"{suffix} ({name})" for name, suffix in FORMATS.items())
    raise UserError(
        f"the suffix of {path} stands for no format: end it with one of {choices}, or "
        f"name a --format"
    )


def export(
    run: RunDirectory,
    loss: LocalLoss | None,
    model: nn.Module | None,
    to: Path,
    format: str,
    until_stage: int | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes the network of ``greedy.runs.network.assemble`` to a file and returns its path.

    The network takes ``images`` (B, C, H, W) for any B and gives ``logits`` (B, classes). The
    file's metadata are ``input`` (a description of the images), ``input_shape`` and
    ``class_names`` (both JSON). By format:

    - ``safetensors``: the state dict; the metadata's ``modules`` is a JSON list of torch.nn's
      modules in order, each as [class, keyword arguments], and
      ``nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in modules))``
      is the network, to be put into evaluation mode.
    - ``torch-export``: for ``torch.export.load``, which reads the metadata as extra files.
    - ``onnx``: the metadata are the model's ``metadata_props``.

    Raises:
        UserError: the file exists and ``overwrite`` is false, or its folder does not exist; the
            format is unknown, needs a missing package or cannot express a module; or as
            ``assemble``.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "onnx":
        _require_onnx()
    require_writable(to, overwrite)
    network = assemble(run, loss, model, until_stage=until_stage)
    data = RunState.read(run).complete_record(0)
    metadata = _metadata(data)
    match format:
        case "safetensors":
            contents = _safetensors(network, metadata)
        case "torch-export":
            contents = _torch_export(network, data.row_shape, metadata)
        case "onnx":
            contents = _onnx(network, data.row_shape, metadata)
    write_output(to, contents)
    return to


def _metadata(data: StageRecord) -> dict[str, str]:
    as_stored = data.store is not None and data.store.encoding == "float32"
    values = "with the values they have in the data set" if as_stored else "in [0, 1]"
    return {
        "input": f"images (batch, {', '.join(map(str, data.row_shape))}), float32, {values}",
        "input_shape": json.dumps(data.row_shape),
        "class_names": json.dumps(data.class_names),
    }


def _safetensors(network: nn.Sequential, metadata: dict[str, str]) -> bytes:
    flat = nn.Sequential(*_flat(network))
    modules = json.dumps([_description(module) for module in flat])
    return safetensors.torch.save(flat.state_dict(), {**metadata, "modules": modules})


def _flat(network: nn.Sequential) -> Iterator[nn.Module]:
    for module in network:
        if isinstance(module, nn.Sequential) and is_sequential(module):
            yield from _flat(module)
        else:
            yield module


def _description(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Returns a module's class and its arguments that differ from the defaults: data, not an
    expression, so that nobody has to evaluate a stranger's text."""
    module_class = type(module)
    arguments = {}
    try:
        if getattr(nn, module_class.__name__, None) is not module_class:
            raise TypeError("not one of torch.nn's own")
        if has_hooks(module):
            raise TypeError("it has hooks")
        for name, parameter in inspect.signature(module_class).parameters.items():
            has_own = parameter.default is not None or hasattr(module, name)  # else an old name
            if name not in ("device", "dtype") and has_own:
                value = getattr(module, name)
                if name == "bias":  # without a weight, no bias is the only choice
                    value = value is not None or module.weight is None
                if value != parameter.default:
                    arguments[name] = value
        json.dumps(arguments)
        with torch.device("meta"):
            rebuilt = module_class(**arguments)
        if rebuilt.state_dict().keys() != module.state_dict().keys():
            raise TypeError("its weights have other names")
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"a safetensors file cannot say how to rebuild {module_class.__name__} ({error}): "
            f"export with --format torch-export"
        ) from error
    return module_class.__name__, arguments


def _torch_export(network: nn.Sequential, shape: Shape, metadata: dict[str, str]) -> bytes:
    contents = io.BytesIO()
    with _quiet():
        extra_files: dict[str, Any] = {**metadata}
        torch.export.save(_program(network, shape), contents, extra_files=extra_files)
    return contents.getvalue()


def _onnx(network: nn.Sequential, shape: Shape, metadata: dict[str, str]) -> bytes:
    with _quiet():
        program = _program(network, shape)
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=_dynamic_shapes(),  # for the name; the program has the rest
                verbose=False,
            )
        except Exception as error:
            reason = first_line(_root_cause(error))
            raise UserError(
                f"the network cannot be written as ONNX (torch says: {reason}): export with "
                f"--format torch-export"
            ) from error
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    return exported.model_proto.SerializeToString()


def _root_cause(error: BaseException) -> BaseException:
    """Returns the error with which a chain of errors began."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _failures_explained() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch raises many types for what it cannot trace or translate
        raise UserError(
            f"the network cannot be exported (torch says: {first_line(error)}): write its forward "
            f"pass so that torch.export takes any number of rows, or use GreedyTrainer.assemble in "
            f"Python"
        ) from error


def _program(network: nn.Sequential, shape: Shape) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *shape)  # a batch of 1 would be taken for a constant
    with _failures_explained():
        program = torch.export.export(network, (example,), dynamic_shapes=_dynamic_shapes())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _dynamic_shapes() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise missing_packages("the format onnx", missing, "onnx")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch 2.9's warning about a deprecated class that torch itself uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        yield
