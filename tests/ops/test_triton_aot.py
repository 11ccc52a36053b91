"""The Triton kernels compile ahead of time, without a GPU, as they are launched, and keep to their registers."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from causalrn.ops.pairs import PairRule, PairTerms
from tests.ops.triton_device import HAS_TRITON, INTERPRETED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler"),
]
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32"}
ARCHITECTURES = (80, 90, 100)
# A few values outside the innermost loops may move to local memory. The most that any variant has: 152 bytes on sm_80,
# gelu under rms, with Triton 3.8.
MOST_SPILLED_BYTES = 152
# Shared memory that every architecture from sm_80 on grants a block.
MOST_SHARED_BYTES = 99 * 1024


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def record_launches(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[Launch]:
    """The kernels that `run` would launch, in order; none of them runs."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        launches.append(Launch(self, arguments, {k: v for k, v in kwargs.items() if v is not None}))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        run()
    return launches


def compile_launch(launch: Launch, architecture: int) -> Any:
    """Compiles with what the launch would specialise on: types, constants, 1, and divisibility by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        name, at = parameter.name, (parameter.num,)
        value = launch.arguments[name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name] = "constexpr"
            constants[at] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPE_NAMES[value.dtype]}"
            attributes[at] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if specialised and value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def spilled_bytes(compiled: Any, folder: Path) -> int:
    """Stack per thread, as the disassembler that Triton ships reports it."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", report)
    assert stack is not None, report
    return int(stack[1])


def assert_compile(launches: list[Launch], architectures: tuple[int, ...], folder: Path) -> None:
    for launch in launches:
        for architecture in architectures:
            compiled = compile_launch(launch, architecture)
            what = f"{launch.kernel.__name__} {launch.options} for sm_{architecture}"
            assert spilled_bytes(compiled, folder) <= MOST_SPILLED_BYTES, what
            assert compiled.metadata.shared <= MOST_SHARED_BYTES, what


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def run_quadratic(dtype: torch.dtype, channels: int, **settings: Any) -> Callable[[], Any]:
    from causalrn.ops.quadratic import gpu as quadratic_triton

    q, k = torch.randn(2, 1, 40, 2, channels, dtype=dtype)
    terms = PairTerms(**{name: settings.pop(name, None) for name in PairTerms._fields})
    rule = PairRule(**{"eps": 0.0, **settings})

    def run() -> None:
        quadratic_triton.forward(q, k, terms, rule)
        quadratic_triton.backward(q, q, k, terms, rule)

    return run


def use_config(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    """Without a GPU there is nothing to tune on."""
    from causalrn.ops.quadratic import gpu as quadratic_triton

    monkeypatch.setattr(quadratic_triton._relation_kernel, "configs", [config])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quadratic(
    architecture: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configurations to tune among. The kernels take any number of channels: 192 and 768 share their code."""
    from causalrn.ops.quadratic import gpu as quadratic_triton

    for config in quadratic_triton.TUNED[: None if architecture == 90 else 2]:
        use_config(monkeypatch, config)
        launches = record_launches(monkeypatch, run_quadratic(dtype, 192))
        kernels = [launch.kernel.__name__ for launch in launches]
        assert kernels.count("_relation_kernel") == 3
        # Packing and unpacking do not depend on the configuration.
        other = config is quadratic_triton.TUNED[0]
        launches = [x for x in launches if other or x.kernel.__name__ == "_relation_kernel"]
        assert_compile(launches, (architecture,), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "relu", "norm": "rms"},
        {"activation": "elu", "norm": "none"},
        {"activation": "gelu"},
        {"activation": "exp", "causal": False, "eps": 1e-3, "options": True},
        {"activation": "gelu", "norm": "rms", "options": True},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_quadratic_variants(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from causalrn.ops.quadratic import gpu as quadratic_triton

    settings = dict(settings)
    if settings.pop("options", False):
        per_head = torch.ones(2)
        settings |= {"gain": torch.ones(40, 2), "slope": per_head, "window": per_head.to(torch.int32)}
    use_config(monkeypatch, quadratic_triton.TUNED[0])
    launches = record_launches(monkeypatch, run_quadratic(torch.bfloat16, 33, **settings))
    assert_compile([x for x in launches if x.kernel.__name__ == "_relation_kernel"], ARCHITECTURES, tmp_path)


def test_quadratic_reads_wide_and_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that the kernel is built on: 16-byte reads of partners, and barriers per tile but not per step."""
    from causalrn.ops.quadratic import gpu as quadratic_triton

    for config in quadratic_triton.TUNED:
        use_config(monkeypatch, config)
        launches = record_launches(monkeypatch, run_quadratic(torch.bfloat16, 192))
        forward = next(x for x in launches if x.kernel.__name__ == "_relation_kernel")
        compiled = compile_launch(forward, 90)
        assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
        loops = re.findall(r"^(\$L__BB\d+_\d+):(.*?)bra\s+\1;", compiled.asm["ptx"], re.DOTALL | re.MULTILINE)
        exponentials = [body for _, body in loops if "ex2.approx" in body and "$L__BB" not in body]
        assert len(exponentials) == 1
        assert "bar.sync" not in exponentials[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "channels", "architectures"),
    [(1, 192, (80, 100)), (1, 768, ARCHITECTURES), (1, 3072, (90,)), (4, 48, (90,)), (3, 33, (90,))],
)
def test_linear(
    heads: int,
    channels: int,
    architectures: tuple[int, ...],
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from causalrn.ops.linear import gpu as linear_triton

    q, k = torch.randn(2, 1, 40, heads, channels, dtype=dtype)
    total = torch.ones(1, heads, channels)

    def run() -> None:
        linear_triton.forward(q, k, None, 0.0, True, "layer")
        linear_triton.backward(q, total, q, k, total, 1e-3, True, "layer")

    launches = record_launches(monkeypatch, run)
    kernels = {launch.kernel.__name__: launch for launch in launches}
    assert len(kernels) == 5
    assert_compile(list(kernels.values()), architectures, tmp_path)
