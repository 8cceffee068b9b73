"""The battery that every op goes through on every backend; public, so that a new kernel or a new machine can be put
through it.

    from rlhf_kernels.testing import run_battery
    run_battery("gae", backend="cpu")

A case is an op, its inputs and an oracle: plain differentiable torch, written apart from the op's reference. The
error-budget rule judges a kernel: its error against the oracle in float64 may not exceed that of the oracle run in
the tested dtype, plus a stated tolerance.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import _library
from ._head import CHUNKED

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 1e-6  # of the largest true value: what a kernel may add to plain torch's error in float32
SYNCS = tuple(f"aten.{name}" for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"))


@dataclass(frozen=True)
class OpCase:
    """One call of a public op. Inputs are float64 and made anew from the case's name, so a case is the same on every
    machine."""

    op: str
    name: str
    make: Callable[[torch.Generator], dict[str, Tensor]]
    call: Callable[..., tuple[Tensor, ...]]  # the public function on those inputs
    oracle: Callable[..., tuple[Tensor, ...]]  # plain torch on the same inputs
    learned: tuple[str, ...] = ()  # inputs that get a gradient
    row_major: tuple[str, ...] = ()  # inputs whose last stride must be 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF, torch.float64)
    tolerance: float = TOLERANCE
    values_only: bool = False  # spared the slow checks (opcheck, gradcheck, compile)
    large: bool = False  # only error_budget and poisoned_memory, in the large grid

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"

    def inputs(self, dtype: torch.dtype = torch.float64, device: str = "cpu", grad: bool = False) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        out = {}
        for name, value in self.make(generator).items():
            if value.is_floating_point():
                value = value.to(dtype)
            out[name] = value.to(device).requires_grad_(grad and name in self.learned)
        return out


def _upstream(case: OpCase, outputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o.device) for o in outputs]


def _run(case: OpCase, function: Callable, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the learned inputs) for a random upstream gradient of every differentiable output."""
    outputs = function(**inputs)
    grads = []
    if case.learned:
        differentiable = [o for o in outputs if o.requires_grad]
        learned = [inputs[name] for name in case.learned]
        upstream = [
            u.to(o.dtype) for u, o in zip(_upstream(case, tuple(differentiable), torch.float32), differentiable)
        ]
        grads = torch.autograd.grad(differentiable, learned, upstream, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, learned)]
    return [o.detach() for o in outputs], list(grads)


def _error(ours: Tensor, truth: Tensor) -> float:
    ours, truth = ours.detach().double().cpu(), truth.detach().double().cpu()
    if ours.shape != truth.shape:
        return float("inf")
    difference = torch.where((ours == truth) | (ours.isnan() & truth.isnan()), 0, (ours - truth).abs())
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def _scale(truth: Tensor) -> float:
    finite = truth[truth.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _same(ours: list[Tensor], other: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(ours, other)):
        assert torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30)), (
            f"{what}: result {i} differs by up to {_error(a, b):.3g}"
        )


def check_error_budget(case: OpCase, device: str) -> None:
    """Outputs and gradients, in every dtype, against the oracle in float64."""
    for dtype in case.dtypes:
        inputs = case.inputs(dtype, device, grad=True)
        ours = _run(case, case.call, inputs)
        exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in case.inputs(dtype).items()}
        exact = {k: v.requires_grad_(k in case.learned) for k, v in exact.items()}
        truth = _run(case, case.oracle, exact)
        plain = _run(case, case.oracle, case.inputs(dtype, grad=True))
        for kind, mine, true, naive in zip(("output", "gradient"), ours, truth, plain):
            for i, (a, t, n) in enumerate(zip(mine, true, naive)):
                expected = inputs[case.learned[i]].dtype if kind == "gradient" else None
                assert expected is None or a.dtype == expected, (
                    f"{case} {dtype} {kind} {i}: dtype {a.dtype}, expected {expected}"
                )
                # A gradient in 16 bits is rounded once at the end: half a unit in the last place of the largest value.
                # Triton's interpreter cuts off what a device rounds.
                rounding = torch.finfo(a.dtype).eps / 2 if a.dtype in HALF else 0.0
                rounding *= 2 if device == "cpu" and _library.active() == "triton" else 1
                scale = (
                    max(_scale(t), 0.25) if not t.dim() else _scale(t)
                )  # a loss may cancel: its terms are of order 1
                allowed = _error(n, t) + (case.tolerance + rounding) * scale + torch.finfo(torch.float32).tiny
                if dtype == torch.float64:
                    allowed = 1e-11 * max(_scale(t), 1.0)
                error = _error(a, t)
                assert error <= allowed, (
                    f"{case} {dtype} {kind} {i}: error {error:.3g}, allowed {allowed:.3g}, "
                    f"plain torch {_error(n, t):.3g}"
                )


def check_opcheck(case: OpCase, device: str) -> None:
    """torch.library.opcheck on the very arguments that the public function passes: schema, fake, autograd, AOT
    dispatch with dynamic shapes."""
    calls: list[tuple] = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "namespace", None) == _library.NAMESPACE:
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        case.call(**case.inputs(torch.float32, device, grad=True))
    assert calls, f"{case}: the public function called no op of ours"
    for function, args in calls:
        args = tuple(a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(function, args)


def check_gradcheck(case: OpCase, device: str) -> None:
    """Analytic against numerical gradients in float64."""
    inputs = case.inputs(torch.float64, device, grad=True)
    if not case.learned or sum(inputs[name].numel() for name in case.learned) > 400:
        return
    learned = [inputs[name] for name in case.learned]

    def function(*values):
        outputs = case.call(**{**inputs, **dict(zip(case.learned, values))})
        return tuple(o for o in outputs if o.requires_grad)

    assert torch.autograd.gradcheck(function, learned, fast_mode=False)


def check_compile(case: OpCase, device: str) -> None:
    """torch.compile(fullgraph=True) gives the bits of eager, gradients included."""
    torch._dynamo.reset()
    eager = _run(case, case.call, case.inputs(torch.float32, device, grad=True))
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    graph = _run(case, compiled, case.inputs(torch.float32, device, grad=True))
    for kind, a, b in zip(("outputs", "gradients"), eager, graph):
        _same(a, b, f"{case} compiled {kind}")


def check_autocast(case: OpCase, device: str) -> None:
    """Autocast changes nothing: results are float32 from what comes in."""
    plain = _run(case, case.call, case.inputs(torch.float32, device, grad=True))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        cast = _run(case, case.call, case.inputs(torch.float32, device, grad=True))
    for a, b in zip(plain, cast):
        _same(a, b, f"{case} under autocast")


def _strided(name: str, value: Tensor, case: OpCase) -> Tensor:
    """The same values with other strides: every second element of the last dimension, or for row-major inputs gaps
    between rows."""
    if value.dim() == 0:
        return value
    if name in case.row_major:
        wide = torch.full(
            (*value.shape[:-2], value.shape[-2] + 1, value.shape[-1] + 8), 7, dtype=value.dtype, device=value.device
        )
        view = wide[..., : value.shape[-2], : value.shape[-1]]
    else:
        view = torch.zeros((*value.shape, 2), dtype=value.dtype, device=value.device)[..., 0]
    return view.copy_(value.detach()).requires_grad_(value.requires_grad)


def check_strides(case: OpCase, device: str) -> None:
    """Non-contiguous inputs and an expanded upstream gradient give the same values."""
    inputs = case.inputs(torch.float32, device, grad=True)
    strided = {name: _strided(name, value, case) for name, value in inputs.items()}
    for a, b in zip(_run(case, case.call, inputs), _run(case, case.call, strided)):
        for x, y in zip(a, b):
            assert _error(x, y) <= 2e-6 * max(_scale(x), 1e-30), f"{case} strided: differs by {_error(x, y):.3g}"
    if case.learned:
        sums = []
        for one in (lambda o: o.sum(), lambda o: (o * torch.ones_like(o)).sum()):
            fresh = case.inputs(torch.float32, device, grad=True)
            sum(one(o) for o in case.call(**fresh) if o.requires_grad).backward()
            sums.append([fresh[name].grad for name in case.learned if fresh[name].grad is not None])
        _same(sums[0], sums[1], f"{case} expanded upstream gradient")


def check_masked_nan(case: OpCase, device: str) -> None:
    """NaN and inf under the mask change no bit, and the results there are exactly 0."""
    inputs = case.inputs(torch.float32, device, grad=True)
    hidden = _hidden(case, inputs)
    if hidden is None:
        return
    for poison in (float("nan"), float("inf")):
        planted = {}
        for name, value in inputs.items():
            if value.is_floating_point() and value.shape[: hidden.dim()] == hidden.shape and hidden.dim():
                at = hidden.reshape(*hidden.shape, *[1] * (value.dim() - hidden.dim()))
                value = value.detach().masked_fill(at, poison).requires_grad_(value.requires_grad)
            planted[name] = value
        clean, poisoned = _run(case, case.call, inputs), _run(case, case.call, planted)
        for a, b in zip(clean, poisoned):
            _same(a, b, f"{case} with {poison} under the mask")
            for result in b:
                if result.shape[: hidden.dim()] == hidden.shape and hidden.dim():
                    assert not result[hidden].any(), f"{case}: a result under the mask is not 0"


def _hidden(case: OpCase, inputs: dict[str, Tensor]) -> Tensor | None:
    """True where a token does not count."""
    if "mask" in inputs:
        return ~inputs["mask"]
    ids = inputs.get("token_ids")
    return None if ids is None or not (ids == -100).any() else ids == -100


def check_poisoned_memory(case: OpCase, device: str) -> None:
    """Every output element is written: fresh memory is filled with NaN and nothing changes."""
    clean = _run(case, case.call, case.inputs(torch.float32, device, grad=True))
    with _deterministic():
        poisoned = _run(case, case.call, case.inputs(torch.float32, device, grad=True))
    for a, b in zip(clean, poisoned):
        _same(a, b, f"{case} on NaN-filled memory")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """torch fills fresh memory with NaN while deterministic algorithms are on."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class _Unread(Tensor):
    """Bounds as on a device, where a launcher does not look at them."""


def check_no_sync(case: OpCase, device: str) -> None:
    """No op that waits for the device, in plain torch and in Triton launchers.

    What is written in torch may look at data on the CPU, where nothing waits. Inside C++ kernels only a GPU can tell:
    `torch.cuda.set_sync_debug_mode("error")` in tests/test_gpu.py.
    """
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith(SYNCS):
                seen.append(str(function))
            if function.namespace != _library.NAMESPACE or served != "triton":
                return function(*args, **(kwargs or {}))
            with self:  # the mode is off in here and would not see what a launcher calls
                return _library.triton_kernels()[function._opname](*args, **(kwargs or {}))

    inputs = case.inputs(torch.float32, device, grad=True)
    served = _library.backends().ops[case.op][torch.device(device).type]
    if served == "triton" and "cu_seqlens" in inputs:
        inputs["cu_seqlens"] = inputs["cu_seqlens"].as_subclass(_Unread)
    with Count():
        outputs = case.call(**inputs)
        if case.learned:
            sum(o.sum() for o in outputs if o.requires_grad).backward()
    assert served not in _library.BACKENDS[1:] or not seen, f"{case}: host syncs {seen}"


def check_purity(case: OpCase, device: str) -> None:
    """Inputs are left alone, a run repeats bit for bit, a second backward gives the same, undifferentiable ops give
    no graph."""
    inputs = case.inputs(torch.float32, device, grad=True)
    before = {name: value.detach().clone() for name, value in inputs.items()}
    first, second = _run(case, case.call, inputs), _run(case, case.call, inputs)
    for a, b in zip(first, second):
        _same(a, b, f"{case} run twice")
    for name, value in inputs.items():
        assert torch.equal(value.detach().nan_to_num(), before[name].nan_to_num()), f"{case}: modified its input {name}"
    if case.learned:
        loss = sum(o.sum() for o in case.call(**inputs) if o.requires_grad)
        learned = [inputs[name] for name in case.learned]
        passes = [torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True) for _ in range(2)]
        _same(*[[g for g in p if g is not None] for p in passes], f"{case} second backward")
    else:
        floats = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        assert not any(o.requires_grad for o in case.call(**floats)), (
            f"{case}: the op is not differentiable, its output requires grad"
        )


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_error_budget, check_opcheck, check_gradcheck, check_compile, check_autocast, check_strides,
        check_masked_nan, check_poisoned_memory, check_no_sync, check_purity,
    )
}  # fmt: skip
LARGE_CHECKS = ("error_budget", "poisoned_memory")
SLOW_CHECKS = ("opcheck", "gradcheck", "compile", "autocast")


def cases(op: str, large: bool = False) -> list[OpCase]:
    """The cases of an op; those of the large grid take minutes and gigabytes."""
    from ._cases import CASES

    if op not in CASES:
        raise ValueError(f"op: expected one of {', '.join(CASES)}, got {op!r}")
    return [case for case in CASES[op] if large or not case.large]


def checks_of(case: OpCase) -> list[str]:
    """The checks that a case goes through."""
    if case.large:
        return list(LARGE_CHECKS)
    return [name for name in CHECKS if not (case.values_only and name in SLOW_CHECKS)]


def available_backends(op: str, device: str = "cpu") -> list[str]:
    """The backends that this op can run on here, reference first; those of its row kernel for an op that chunks."""
    kind = torch.device(device).type
    found, rows = ["reference"], "token_logprobs" if _library.OPS[op].kernel == CHUNKED else op
    for name in ("cpu", "triton", "cuda"):
        with contextlib.suppress(RuntimeError), _library.backend(name):
            if _library.backends().ops[rows].get(kind) == name:
                found.append(name)
    return found


def run_battery(
    op: str | OpCase,  # the name of an op, or one case
    backend: str | None = None,  # "reference", "cpu", "triton", "cuda"; None is the dispatcher's own choice
    device: str = "cpu",
    *,
    checks: tuple[str, ...] = tuple(CHECKS),
    large: bool = False,
) -> int:
    """Runs every check on every case and returns how many ran. Raises AssertionError at the first that fails, naming
    case, dtype and error."""
    if unknown := set(checks) - set(CHECKS):
        raise ValueError(f"checks: expected names of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}")
    chosen = [op] if isinstance(op, OpCase) else cases(op, large)
    ran = 0
    with _library.backend(backend) if backend else contextlib.nullcontext():
        for case in chosen:
            for name in set(checks).intersection(checks_of(case)):
                CHECKS[name](case, device)
                ran += 1
    return ran
