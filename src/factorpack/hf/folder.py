"""A folder of Hugging Face: the network in it, and the folder that its compressed copy is.

What is written is a folder as transformers and sentence-transformers know it: all files but the weights are copied, the
weights are in `model.fpk`, config.json says so in its `quantization_config`, and an index names that file for each
tensor (see `hf.quantizer`).
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from factorpack.container import write
from factorpack.errors import FactorpackError, MismatchError, TaskError, UnsupportedError
from factorpack.hf.hook import METHOD
from factorpack.nn.on_disk import NetworkOnDisk
from factorpack.nn.stored import stored_tensors
from factorpack.sizes import human

WEIGHTS = "model.fpk"
INDEX = "model.safetensors.index.json"
LARGEST_IN_MEMORY = 10**9
"""Bytes of weights on disk. Calibration takes several times as much of a network in memory; larger ones stay on disk,
and are calibrated block by block."""
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".fpk"}
"""What holds weights, or may, and is not copied beside `model.fpk`."""


@dataclass(frozen=True)
class Folder:
    """A folder `path`, where its network is in it (`root`), the config there, and a sentence encoder's modules."""

    path: Path
    root: Path
    config: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...] = ()

    @property
    def method(self) -> str:
        """How its weights are quantized; empty where they are not."""
        return str((self.config.get("quantization_config") or {}).get("quant_method", ""))

    def module(self, kind: str) -> Mapping[str, Any] | None:
        """The first module of a kind, "Pooling", say."""
        return next((module for module in self.modules if _kind(module) == kind), None)


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read ({error}): fetch the folder again") from error


def read_folder(path: Path) -> Folder | None:
    """The folder of Hugging Face at `path`; None where it is none: without a config.json that names a kind of model.

    Raises TaskError where a file that says so cannot be read, or names places outside the folder.
    """
    root = path
    modules: tuple[Mapping[str, Any], ...] = ()
    if (path / "modules.json").is_file():
        modules = tuple(read_json(path / "modules.json"))
        if not all(isinstance(module, dict) for module in modules):
            raise TaskError(f"modules.json of {path} is no list of modules: fetch the folder again")
        places = [path / str(module.get("path", "")) for module in modules]
        if not all(place.resolve().is_relative_to(path.resolve()) for place in places):
            # Whoever made the folder would decide what is read and written elsewhere.
            raise TaskError(f"modules.json of {path} names places outside that folder: do not use it")
        root = next((place for place, m in zip(places, modules, strict=True) if _kind(m) == "Transformer"), path)
    if not (root / "config.json").is_file():
        return None
    config = read_json(root / "config.json")
    if not isinstance(config, dict) or not {"model_type", "architectures"} & config.keys():
        return None
    return Folder(path, root, config, modules)


def require_transformers() -> ModuleType:
    """The package, or UnsupportedError with how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f'folders of Hugging Face need transformers ({error}): pip install "factorpack[hf]"'
        ) from error
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars would run through ours, and what it reports is looked at here."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _own_task(why: str) -> TaskError:
    return TaskError(f"{why}; or write a task file (.py) that builds the network")


def _architecture(folder: Folder) -> tuple[Any, Any]:
    """The class of the network and its config. Raises TaskError for what transformers does not know."""
    transformers = require_transformers()
    known = f"transformers {transformers.__version__}"
    try:
        config = transformers.AutoConfig.from_pretrained(folder.root, trust_remote_code=False)
    except Exception as error:
        model_type = folder.config.get("model_type")
        raise _own_task(f"{folder.path}: {known} does not know the model type {model_type!r}: update it") from error
    name = next(iter(config.architectures or ()), "AutoModel")
    network = getattr(transformers, name, None)
    if network is None:
        raise _own_task(f"{folder.path}: {known} does not know the architecture {name!r}: update it")
    return network, config


def _complete(folder: Folder, model: Any, missing: Iterable[str]) -> nn.Module:
    """The network, in eval mode, without a pooler that has no weights. MismatchError where others are missing."""
    missing = sorted(missing)
    if any(not name.startswith("pooler.") for name in missing):
        raise MismatchError(
            f"{folder.path} has no weights for {missing[0]!r} of {type(model).__name__}: fetch or make it again"
        )
    if missing:
        # Encoders are often published without it, and what is random is of no use.
        model.pooler = None
    found: nn.Module = model.eval()
    return found


def load_network(folder: Folder) -> nn.Module:
    """The network as its config names it, in its own dtype and in eval mode.

    Raises TaskError for an architecture that transformers does not know, and for weights that it cannot load;
    MismatchError where weights are missing.
    """
    network, _ = _architecture(folder)
    try:
        with _quiet():
            model, told = network.from_pretrained(folder.root, dtype="auto", output_loading_info=True)
    except FactorpackError:
        raise
    except Exception as error:
        raise TaskError(f"{folder.path}: its weights cannot be loaded: {type(error).__name__}: {error}") from error
    return _complete(folder, model, told["missing_keys"])


def weight_bytes(folder: Folder) -> int:
    """Bytes of the folder's safetensors files; 0 where its weights are kept in another way."""
    try:
        return stored_tensors(folder.root).size_bytes
    except TaskError:
        return 0


def network_on_disk(folder: Folder) -> NetworkOnDisk:
    """The network with its weights left on disk, in float32 where it is run.

    Raises as `load_network`, MismatchError too where its weights have other names on disk, and UnsupportedError where
    accelerate is missing.
    """
    try:
        from accelerate import init_empty_weights
        from accelerate.utils import set_module_tensor_to_device
    except ImportError as error:
        raise UnsupportedError(
            f'networks of more than {human(LARGEST_IN_MEMORY)} need accelerate ({error}): pip install "factorpack[hf]"'
        ) from error
    network, config = _architecture(folder)
    tensors = stored_tensors(folder.root)
    with _quiet(), init_empty_weights():
        # The classes for one task are made by themselves, AutoModel from a config.
        made = network.from_config(config) if hasattr(network, "from_config") else network(config)
    model: Any = made.float()
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    state = model.state_dict(keep_vars=True)
    stored = {id(tensor) for name, tensor in state.items() if name in tensors}
    complete = _complete(folder, model, (name for name, tensor in state.items() if id(tensor) not in stored))
    for name, buffer in model.named_buffers():
        if name in tensors:
            set_module_tensor_to_device(model, name, buffer.device, value=tensors[name])
    return NetworkOnDisk(complete, tensors)


def check_target(out: Path, folder: Folder) -> None:
    """Raises UnsupportedError where `out` cannot become the folder that `folder` is compressed to."""
    if out.resolve() == folder.path.resolve():
        raise UnsupportedError(f"{out} is the original itself: choose another --out")
    if out.is_file():
        raise UnsupportedError(f"{out} is a file: choose another --out, a folder, or a file that ends in .fpk")
    target = _target(folder, out)
    if out.is_dir() and any(out.iterdir()) and not target.is_file():
        raise UnsupportedError(f"{out} is not empty, and no compressed folder: choose another --out")


def _target(folder: Folder, out: Path) -> Path:
    return out / folder.root.relative_to(folder.path) / WEIGHTS


def _named_anew(folder: Folder, names: Iterable[str]) -> bool:
    """Whether transformers gave tensors names that the original weights, and so its earlier versions, do not have."""
    try:
        return not set(names) <= stored_tensors(folder.root).keys()
    except TaskError:
        return True


def write_around(folder: Folder, out: Path, names: Iterable[str], tied: Iterable[str], dense_bytes: int) -> Path:
    """Writes all of the compressed folder but its weights; returns where these belong.

    `names` are the tensors of the file, `tied` those of them that are stored under another's name, `dense_bytes` what
    they take in their own dtypes.
    """
    names = set(names)
    target = _target(folder, out)
    inside = [folder.path, *(folder.path / str(module["path"]) for module in folder.modules if module.get("path"))]
    for source in dict.fromkeys(inside):
        if not source.is_dir():
            # Modules without parameters often have no folder.
            continue
        to = out / source.relative_to(folder.path)
        to.mkdir(parents=True, exist_ok=True)
        # Modules behind the network keep their own few weights.
        own = source not in (folder.path, folder.root)
        for file in sorted(source.iterdir()):
            weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if file.is_file() and not file.name.startswith(".") and (own or not weights):
                shutil.copyfile(file, to / file.name)
    method: dict[str, Any] = {"quant_method": METHOD}
    if _named_anew(folder, names - set(tied)):
        method["transformers"] = int(require_transformers().__version__.split(".")[0])
    config = {**folder.config, "quantization_config": method}
    index = {"metadata": {"total_size": dense_bytes}, "weight_map": dict.fromkeys(sorted(names), WEIGHTS)}
    for name, content in (("config.json", config), (INDEX, index)):
        write(target.with_name(name), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return target
