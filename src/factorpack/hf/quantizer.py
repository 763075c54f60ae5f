"""transformers' hook: its `from_pretrained` reads the weights of a compressed folder from its `.fpk` file.

A folder's `model.safetensors.index.json` names the file for every tensor. Readers that do not know Factorpack take
what does not end in `.safetensors` for a pickle and refuse it; as `model.safetensors`, transformers 5 would start from
random weights with a mere warning. Here only the reading of that one kind of file is put in: names, dtypes, devices
and ties are transformers' own matter, and what comes out is an ordinary dense model. To import this module is to
register the method.
"""

import os
from functools import wraps
from typing import Any

import torch
import transformers
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from factorpack.errors import UnsupportedError
from factorpack.hf.hook import METHOD

SUFFIX = ".fpk"


class FactorpackConfig(QuantizationConfigMixin):
    """What a folder's config.json says of its compression: the method, and the major version of `transformers` that
    names tensors as the file does, where earlier ones do not.
    """

    def __init__(self, transformers: int = 0, **_kwargs: object) -> None:
        self.quant_method: Any = METHOD
        self.transformers = transformers


class FactorpackQuantizer(HfQuantizer):
    """Recombines weights once, when they are loaded; afterwards the model is not a quantized one."""

    requires_calibration = True

    def validate_environment(self, *_args: object, **_kwargs: object) -> None:
        """Called before weights are read, when the module that reads them has been imported.

        Raises UnsupportedError for a version that would start from random weights under names of its own.
        """
        config: Any = self.quantization_config
        needed = config.transformers
        if needed > int(transformers.__version__.split(".")[0]):
            raise UnsupportedError(
                f"the folder was made with transformers {needed}, which names its tensors anew, and this is "
                f"{transformers.__version__}: update transformers"
            )
        _teach()

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: object) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: object) -> Any:
        # So that it can be cast, trained and saved as any other.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def is_serializable(self, *_args: object, **_kwargs: object) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _teach() -> None:
    """Lets transformers' reader of checkpoint files read ours too."""
    from transformers import modeling_utils

    read: Any = modeling_utils.load_state_dict
    if hasattr(read, METHOD):
        return

    @wraps(read)
    def load_state_dict(checkpoint_file: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        if not os.fspath(checkpoint_file).endswith(SUFFIX):
            found: dict[str, torch.Tensor] = read(checkpoint_file, *args, **kwargs)
            return found
        from factorpack.pipeline import load_state_dict as decoded

        place = kwargs.get("map_location") or "cpu"
        return {name: tensor.to(place) for name, tensor in decoded(checkpoint_file).items()}

    setattr(load_state_dict, METHOD, True)
    modeling_utils.load_state_dict = load_state_dict


auto.register_quantization_config(METHOD)(FactorpackConfig)
auto.register_quantizer(METHOD)(FactorpackQuantizer)
