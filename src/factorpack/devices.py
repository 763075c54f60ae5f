"""Where a training runs: device, precision and processes, by accelerate."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from factorpack.errors import UnsupportedError
from factorpack.training_options import TrainingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(options: TrainingOptions) -> "Accelerator":
    """Device, precision and processes, by accelerate; UnsupportedError where it is missing or cannot do that."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise UnsupportedError("training needs accelerate: pip install factorpack[finetune]") from error
    cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    precision = options.precision
    if precision == "auto":
        precision = _precision(cpu)
    # A network may have parameters that no call uses.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    try:
        found = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)
    except (ValueError, ImportError) as error:
        raise UnsupportedError(f"accelerate cannot train so: {error}") from error
    if options.device not in ("auto", "cpu") and found.device.type != torch.device(options.device).type:
        raise UnsupportedError(f"--device {options.device} is not there: accelerate found {found.device}")
    return found


def _precision(cpu: bool) -> str:
    """Half precision where it is faster: bf16 on GPUs that multiply it, or fp16, and on processors with tiles for it.

    Processors that have but dot products of bf16 (avx512_bf16) take longer for it than for float32.
    """
    if not cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if told.get("amx_bf16") else "no"


def of_main(accelerator: "Accelerator", values: Tensor) -> Tensor:
    """The main process' values, in all processes; they are on its device."""
    if accelerator.num_processes == 1:
        return values
    from accelerate.utils import broadcast

    shared: Tensor = broadcast(values)
    return shared
