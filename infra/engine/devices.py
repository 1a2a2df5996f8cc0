"""What models can run on here, and how a GPU is to compute."""

import torch


def unusable(device: str) -> str | None:
    """Why nothing can run on ``cpu`` or ``cuda`` here; null if it can."""
    if device != "cuda" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no GPU, or no driver for it"


def compute_exactly() -> None:
    """Have a GPU multiply in the type it is given, and sum in float32: no TF32, nothing shorter."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_fp16_accumulation = False
