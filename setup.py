"""Packs configs/ into the package, and builds the CPU kernels: plain C++, compiled per instruction set into one library."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path("causalrn/ops/csrc")
# Without these flags: asks the CPU what it can run, so it must run everywhere.
COMPILED_ONCE = SOURCE_DIR / "cpu.cpp"
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
]
LINK_FLAGS = ["-lm", "-Wl,-z,defs"] if sys.platform == "linux" else []
# Apple's compiler has no OpenMP of its own; the kernels then run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
INSTRUCTION_SETS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
        # GCC 12 warns of its own header.
        "-Wno-uninitialized",
    ]


class BuildKernels(build_ext):
    """Compiles each source for every instruction set; nothing here is tied to a version of Python or torch."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        once = str(COMPILED_ONCE)
        jobs: list[tuple[str, str | None]] = [(once, None)]
        jobs += [(source, isa) for source in ext.sources if source != once for isa in INSTRUCTION_SETS]

        def compiled(job: tuple[str, str | None]) -> str:
            source, isa = job
            (found,) = self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp, isa or "once")),
                macros=[("CAUSALRN_ISA", isa)] if isa else [],
                extra_preargs=[*FLAGS, *OPENMP, *INSTRUCTION_SETS[isa]] if isa else FLAGS,
                depends=ext.depends,
            )
            return found

        # One compiler for each core: they take minutes on one.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, jobs))
        # Linked as C: the kernels use nothing of the C++ runtime, and so depend on none. Defs: a symbol that is
        # missing must fail here, where the library is optional, not when it is loaded.
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=OPENMP + LINK_FLAGS
        )


# A wheel has the configs inside the package: a package `configs` beside it could be anybody's. launch/ is a tool of the
# checkout, and no part of it.
CONFIGS = find_namespace_packages(include=["configs*"])

setup(
    packages=[
        *find_namespace_packages(include=["causalrn*", "datamodules*"]),
        *(f"causalrn.{name}" for name in CONFIGS),
    ],
    package_dir={"causalrn.configs": "configs"},
    ext_modules=[
        Extension(
            "causalrn.ops._kernels",
            sources=sorted(str(path) for path in SOURCE_DIR.glob("*.cpp")),
            depends=[str(path) for path in SOURCE_DIR.glob("*.h")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
