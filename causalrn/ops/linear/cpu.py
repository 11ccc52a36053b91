"""Calls the compiled CPU kernels of the linear relation."""

import ctypes

import torch
from torch import Tensor

from causalrn.ops import native

DTYPES = (torch.float32, torch.bfloat16)
# exp(sqrt(D)) and its sums are floats below; beyond, the equation itself is out of range.
MAX_CHANNELS = 5000
# Elements below which starting another thread costs more than it saves.
ELEMENTS_PER_THREAD = 2**15


class Arguments(ctypes.Structure):
    """`LinearArguments` of csrc/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "dy", "y", "dq", "dk")),
        *((name, ctypes.c_void_p) for name in ("total", "dtotal", "total_out")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "channels")),
        *(
            (f"{name}_{stride}", ctypes.c_int64)
            for name in ("q", "k", "dy")
            for stride in ("batch_stride", "stride")
        ),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("causal", "rms", "bf16", "threads")),
    )


def available(q: Tensor) -> bool:
    """Whether the library is there and serves tensors of this dtype and width."""
    return q.dtype in DTYPES and q.shape[3] <= MAX_CHANNELS and native.load_library() is not None


def run(
    kernel: str,
    inputs: dict[str, Tensor],
    eps: float,
    norm: str,
    causal: bool = True,
    **tensors: Tensor | None,
) -> None:
    """Runs a kernel. `inputs` are q, k and dy, strided in B and T; `tensors` are contiguous or None."""
    k = inputs["k"]
    batch, length, heads, channels = k.shape
    strides = {}
    for name, x in inputs.items():
        strides |= {f"{name}_batch_stride": x.stride(0), f"{name}_stride": x.stride(1)}
    arguments = Arguments(
        batch=batch,
        length=length,
        heads=heads,
        channels=channels,
        eps=eps,
        causal=causal,
        rms=norm == "rms",
        bf16=k.dtype is torch.bfloat16,
        threads=min(torch.get_num_threads(), 1 + k.numel() // ELEMENTS_PER_THREAD),
        **strides,
        **{name: x.data_ptr() for name, x in {**inputs, **tensors}.items() if x is not None},
    )
    function = native.find_kernel(kernel, Arguments)
    assert function is not None
    if function(ctypes.byref(arguments)) != 0:
        raise MemoryError(f"{kernel}: no memory left for the scratch rows of k {tuple(k.shape)}")


def with_whole_rows(x: Tensor) -> Tensor:
    """x itself where only B and T are strided, else a copy: parts of a sequence need none."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def contiguous(total: Tensor | None) -> Tensor | None:
    return None if total is None else total.contiguous()


def new_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def new_total(x: Tensor) -> Tensor:
    return torch.empty((x.shape[0], *x.shape[2:]), dtype=torch.float32)


def forward(
    q: Tensor, k: Tensor, total: Tensor | None, eps: float, causal: bool, norm: str
) -> tuple[Tensor, Tensor]:
    """The operator's values; arguments as `causalrn::relation_linear`."""
    y, total_out = new_like(q), new_total(q)
    inputs = {"q": with_whole_rows(q), "k": with_whole_rows(k)}
    run("linear_forward", inputs, eps, norm, causal, y=y, total=contiguous(total), total_out=total_out)
    return y, total_out


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    q: Tensor,
    k: Tensor,
    total: Tensor | None,
    eps: float,
    causal: bool,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to q, k and the passed total."""
    dq, dk, dtotal_in = new_like(q), new_like(k), new_total(q)
    inputs = {"q": with_whole_rows(q), "k": with_whole_rows(k), "dy": with_whole_rows(dy)}
    run(
        "linear_backward",
        inputs,
        eps,
        norm,
        causal,
        dq=dq,
        dk=dk,
        total=contiguous(total),
        dtotal=contiguous(dtotal),
        total_out=dtotal_in,
    )
    return dq, dk, dtotal_in


def pool(k: Tensor, eps: float, norm: str) -> Tensor:
    """Sum of exp(norm(k_j)) over all positions, (B, H, D)."""
    total_out = new_total(k)
    run("linear_pool", {"k": with_whole_rows(k)}, eps, norm, total_out=total_out)
    return total_out


def pool_backward(dtotal: Tensor, k: Tensor, eps: float, norm: str) -> Tensor:
    dk = new_like(k)
    run("linear_pool_backward", {"k": with_whole_rows(k)}, eps, norm, dk=dk, dtotal=contiguous(dtotal))
    return dk
