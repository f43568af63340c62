"""The libraries' module names, answered by `mla_triton.compat`.

Their test files import more than what is about MLA. A name that compat does not have is there all
the same, and raises NotImplementedError where it is called: such a test counts as out of scope, not
as failed.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton

from mla_triton.compat import flash_mla, flashinfer, sglang, vllm

LIBRARIES = ("flash_mla", "flashinfer", "sgl_kernel", "sglang", "vllm")
HELPERS = ("conftest", "jit_utils", "tests")
"""Modules of the libraries' own test folders, from which a test file takes a thing or two."""

PYTEST_NAMES = ("__", "pytest", "setup", "setUp", "teardown", "tearDown")
"""What Python and pytest ask any module for, which a module need not have."""

OWN_KERNELS = ("flashinfer.triton",)
"""Packages that are taken from the checkout where it has them: tests use them as the reference."""

OPERATORS = {
    "concat_and_cache_mla": (
        "Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor scale"
    ),
    "cp_gather_cache": (
        "Tensor src_cache, Tensor(a!) dst, Tensor block_table, Tensor cu_seq_lens, "
        "int batch_size, Tensor? seq_starts"
    ),
    "gather_and_maybe_dequant_cache": (
        "Tensor src_cache, Tensor(a!) dst, Tensor block_table, Tensor cu_seq_lens, "
        "Tensor token_to_seq, int num_tokens, str kv_cache_dtype, Tensor scale, Tensor? seq_starts"
    ),
    "swap_blocks": ("Tensor src, Tensor(a!) dst, int block_size_in_bytes, Tensor block_mapping"),
}
"""The arguments of vLLM's operators that tests hand to `opcheck`."""


class Refused:
    """A name that has no counterpart here: it can be imported, and not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._name} has no counterpart in mla_triton.compat")

    def __getattr__(self, name: str) -> Refused:
        if name.startswith("__"):
            raise AttributeError(name)
        return Refused(f"{self._name}.{name}")


class Alias(ModuleType):
    """A module with the names of some others, and a refusal for every other name."""

    def __init__(self, name: str, sources: Sequence[ModuleType], names: dict[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(names)
        self._sources = sources

    def __getattr__(self, name: str) -> Any:
        if name.startswith(PYTEST_NAMES):
            raise AttributeError(name)
        for source in self._sources:
            if name in source.__all__:
                found = getattr(source, name)
                if not isinstance(found, ModuleType):
                    return found
        return Refused(f"{self.__name__}.{name}")


class Capability(NamedTuple):
    major: int
    minor: int


class Platform:
    """vLLM's `current_platform`, as far as tests of MLA ask it: a CUDA card, here or pretended."""

    device_type = "cuda"

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    def is_rocm(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False

    def is_cpu(self) -> bool:
        return False

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def get_device_name(self) -> str:
        return torch.cuda.get_device_name()

    def get_device_capability(self) -> Capability:
        return Capability(*torch.cuda.get_device_capability())

    def has_device_capability(self, at_least: int) -> bool:
        major, minor = self.get_device_capability()
        return major * 10 + minor >= at_least


def is_capability(major: int) -> Callable[..., bool]:
    return lambda device=None: torch.cuda.get_device_capability(device)[0] == major


def nothing(*args: Any, **kwargs: Any) -> None:
    """What prepares a library's own kernels, of which there are none."""


def opcheck(operator: Any, args: Any, kwargs: Any = None, test_utils: Any = None, **_: Any) -> Any:
    if isinstance(operator, Refused):
        operator()
    return torch.library.opcheck(operator, args, kwargs, test_utils=test_utils)


def convert_fp8(
    output: torch.Tensor, source: torch.Tensor, scale: float = 1.0, kv_dtype: str = "fp8"
) -> None:
    """What vLLM's tests make their references with: e4m3 from numbers, or numbers from e4m3."""
    if kv_dtype not in ("fp8", "fp8_e4m3"):
        raise NotImplementedError(f"convert_fp8 to {kv_dtype} has no counterpart in the aliases")
    if output.dtype == torch.uint8:
        e4m3 = (source.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        output.copy_(e4m3.view(torch.uint8))
    else:
        output.copy_(source.view(torch.float8_e4m3fn).float() * scale)


def set_random_seed(seed: int) -> None:
    torch.manual_seed(seed)


def contents() -> dict[str, tuple[list[ModuleType], dict[str, Any]]]:
    """Of each module that has something to offer, whose names it has and which ones besides."""
    made = ("batch_mla", "batch_prefill", "single_prefill")
    generators = [f"gen_{name}_module" for name in made]
    no_kernels = dict.fromkeys(["build_jit_specs", *generators], nothing)
    prepare = {
        "gen_decode_attention_modules": lambda *args: [],
        "gen_prefill_attention_modules": lambda *args: [],
    }
    cleared = {"clear_cuda_cache": lambda device=None: torch.cuda.empty_cache()}
    cards = {
        "is_sm90a_supported": is_capability(9),
        "is_sm100a_supported": is_capability(10),
        "is_sm110a_supported": is_capability(11),
        "has_flashinfer_jit_cache": lambda: True,
    }
    return {
        "conftest": ([], cleared),
        "flash_mla": ([flash_mla], {}),
        "flashinfer": ([flashinfer], {}),
        "flashinfer.cascade": ([flashinfer.cascade], {}),
        "flashinfer.jit": ([], no_kernels),
        "flashinfer.jit.attention": ([], no_kernels),
        "flashinfer.mla": ([flashinfer.mla], {}),
        "flashinfer.page": ([flashinfer.page], {}),
        "flashinfer.prefill": ([flashinfer.prefill], {}),
        "flashinfer.utils": ([], cards),
        "jit_utils": ([], prepare),
        "sgl_kernel": ([sglang], {}),
        "sgl_kernel.flash_mla": ([flash_mla], {}),
        "sglang.srt.layers.attention.triton_ops.decode_attention": ([sglang], {}),
        "tests.kernels.utils": (
            [],
            {
                "opcheck": opcheck,
                "DEFAULT_OPCHECK_TEST_UTILS": (
                    "test_schema",
                    "test_autograd_registration",
                    "test_faketensor",
                ),
            },
        ),
        "tests.test_helpers.test_helpers": ([], cleared),
        "vllm._custom_ops": ([vllm], {"convert_fp8": convert_fp8}),
        "vllm.platforms": ([], {"current_platform": Platform()}),
        "vllm.triton_utils": ([], {"triton": triton, "tl": triton.language}),
        "vllm.utils.math_utils": ([], {"cdiv": lambda a, b: -(-a // b)}),
        "vllm.utils.torch_utils": ([], {"set_random_seed": set_random_seed}),
        "vllm.v1.attention.ops.flashmla": (
            [flash_mla],
            {"is_flashmla_dense_supported": lambda: (True, None)},
        ),
        "vllm.v1.attention.ops.triton_decode_attention": ([vllm], {}),
        "vllm.v1.attention.ops.triton_merge_attn_states": ([vllm], {}),
    }


class Finder(MetaPathFinder, Loader):
    """Answers every import of a library by an `Alias`."""

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout
        self._contents = contents()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top = name.split(".")[0]
        if top not in (*LIBRARIES, *HELPERS):
            return None
        for package in OWN_KERNELS:
            if (self._checkout / package.replace(".", "/")).is_dir() and (
                name == package or name.startswith(f"{package}.")
            ):
                return self._in_checkout(name)
        if name not in self._contents and self._is_test_file(name):
            return self._in_checkout(name)
        return ModuleSpec(name, self, is_package=True)

    def _is_test_file(self, name: str) -> bool:
        """Whether it is one in a package of tests, which pytest imports by that package's name."""
        path = (self._checkout / name.replace(".", "/")).with_suffix(".py")
        return path.name.startswith("test_") and path.is_file()

    def _in_checkout(self, name: str) -> ModuleSpec | None:
        folder = (self._checkout / name.replace(".", "/")).parent
        return importlib.machinery.PathFinder.find_spec(name, [str(folder)])

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Alias(spec.name, *self._contents.get(spec.name, ([], {})))

    def exec_module(self, module: ModuleType) -> None:
        """Imports the modules below it that have something: tests reach them as attributes."""
        for name in self._contents:
            if name.startswith(f"{module.__name__}.") and name.count(".") == 1:
                importlib.import_module(name)


def register_operators() -> None:
    """The operators that tests hand to `opcheck`, as vLLM's extension would have them."""
    library = torch.library.Library("rival_cache_ops", "DEF")
    operators: dict[str, Any] = {"keep_alive": library}
    for name, arguments in OPERATORS.items():
        library.define(f"{name}({arguments}) -> ()")
        library.impl(name, getattr(vllm, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rival_cache_ops::{name}", nothing, lib=library)
        operators[name] = getattr(torch.ops.rival_cache_ops, name)
    torch.ops._C_cache_ops = Alias("torch.ops._C_cache_ops", [], operators)


def install(checkout: Path) -> None:
    """Answers the libraries' names from now on, whatever is installed.

    Args:
        checkout: where a library lies whose own kernels tests compare with.
    """
    for name in list(sys.modules):
        if name.split(".")[0] in (*LIBRARIES, *HELPERS):
            del sys.modules[name]
    sys.meta_path.insert(0, Finder(checkout))
    register_operators()
