"""The peer: fla-core's Triton ops (PyTorch), timed in the same process. Nothing of it is imported
before it is asked for."""

import importlib.util
import time


def importable():
    """Whether fla is installed; what fails inside it later is an error of its case."""
    return importlib.util.find_spec("fla") is not None


def measure(make, shape, backward):
    """Times what `make(shape)` gives by triton's do_bench (median); returns a case's numbers.

    The first call includes Triton's autotuning. Peak memory is that of one call, beyond the inputs.
    """
    import torch
    from triton.testing import do_bench

    torch.manual_seed(0)
    forward, inputs = make(shape)
    run = forward
    start = time.perf_counter()
    if backward:
        cotangent = torch.randn_like(forward())

        def run():
            torch.autograd.grad(forward(), inputs, cotangent, allow_unused=True)

    run()
    torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    ms = do_bench(run, warmup=50, rep=200, return_mode="median")
    torch.cuda.empty_cache()
    return dict(ms=ms, first_call_s=first_call, memory_gib=peak / 2**30)


def kda(shape):
    import torch
    from fla.ops.kda import chunk_kda

    if shape.packed:
        raise NotImplementedError("packed sequences are not timed with fla")
    raw = _kda_raw(torch, shape.B, shape.T, shape.H, shape.D, grad=True)
    return lambda: chunk_kda(**raw, **_kda_options())[0], list(raw.values())


def kda_step(shape):
    import torch
    from fla.ops.kda import fused_recurrent_kda

    B, H, D = shape.B, shape.H, shape.D
    raw = _kda_raw(torch, B, 1, H, D, grad=False)
    state = torch.randn(B, H, D, D, device="cuda")

    def run():
        with torch.no_grad():
            return fused_recurrent_kda(
                **raw, **_kda_options(), initial_state=state, output_final_state=True
            )[0]

    return run, []


def _kda_raw(torch, B, T, H, D, grad):
    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    raw = {name: normal(B, T, H, D) for name in "qkvg"}
    raw["beta"] = normal(B, T, H)
    raw["A_log"] = torch.log(torch.rand(H, device="cuda") * 15 + 1)
    raw["dt_bias"] = torch.randn(H * D, device="cuda") - 4
    return {name: x.requires_grad_(grad) for name, x in raw.items()}


def _kda_options():
    """l2norm, gate and sigmoid belong to fla's kernels."""
    names = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    return dict.fromkeys(names, True)


def gsa(shape):
    from fla.ops.gsa import chunk_gsa

    if shape.packed:
        raise NotImplementedError("packed sequences are not timed with fla")
    inputs = _gsa_inputs(shape, grad=True)
    return lambda: chunk_gsa(**inputs, scale=1.0)[0], list(inputs.values())


def gsa_step(shape):
    import torch
    from fla.ops.gsa import fused_recurrent_gsa

    B, H, D, M = shape.B, shape.H, shape.D, shape.M
    inputs = _gsa_inputs(shape, grad=False)
    state = tuple(torch.randn(B, H, *axes, device="cuda") for axes in ((D, M), (M, D)))

    def run():
        with torch.no_grad():
            return fused_recurrent_gsa(
                **inputs, scale=1.0, initial_state=state, output_final_state=True
            )[0]

    return run, []


def _gsa_inputs(shape, grad):
    """Gates and writes are given, in bfloat16: fla has no kernel that makes them."""
    import torch

    leading = shape.B, shape.T, shape.H
    inputs = {
        name: torch.randn(*leading, shape.D, device="cuda", dtype=torch.bfloat16) for name in "qkv"
    }
    f = torch.randn(*leading, shape.M, device="cuda")
    g = torch.nn.functional.logsigmoid(f) / 8
    inputs |= dict(s=(1 - g.exp()).bfloat16(), g=g.bfloat16())
    return {name: x.requires_grad_(grad) for name, x in inputs.items()}


def log_linear(shape):
    import torch
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    if shape.packed:
        raise NotImplementedError("packed sequences are not timed with fla")
    if shape.HK != 1:
        raise NotImplementedError("fla's log-linear attention has one key head")

    def normal(*axes):
        return torch.randn(*axes, device="cuda", dtype=torch.bfloat16)

    leading, H, D = (shape.B, shape.T), shape.H, shape.D
    dt = torch.nn.functional.softplus(torch.randn(*leading, H, device="cuda") - 4)
    inputs = {name: normal(*leading, 1, D) for name in "qk"}
    inputs["v"] = (normal(*leading, H, D) * dt[..., None]).bfloat16()
    inputs["g"] = -torch.exp(torch.rand(H, device="cuda")) * dt
    inputs["level_scales"] = normal(*leading, H, (shape.T - 1).bit_length() + 1)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    return lambda: chunk_log_linear_attn(**inputs)[0], list(inputs.values())


def mesa(shape):
    from fla.ops.mesa_net import chunk_mesa_net

    if shape.packed:
        raise NotImplementedError("packed sequences are not timed with fla")
    inputs = _mesa_inputs((shape.B, shape.T), shape.H, shape.D, grad=True)
    options = dict(max_CG_iteration=30, use_qk_l2norm_in_kernel=True)
    return lambda: chunk_mesa_net(**inputs, **options)[0], list(inputs.values())


def mesa_step(shape):
    """fla's step does not normalise: the l2 norm is timed with it, as with ours."""
    import torch
    from fla.ops.mesa_net import mesa_net_decoding_one_step
    from torch.nn.functional import normalize

    B, H, D = shape.B, shape.H, shape.D
    inputs = _mesa_inputs((B,), H, D, grad=False)
    past = torch.randn(B, H, D, D, device="cuda")
    states = dict(prev_h_kk=past @ past.mT / D, prev_h_kv=torch.randn_like(past))

    def run():
        with torch.no_grad():
            unit = {name: normalize(inputs[name], dim=-1) for name in "qk"}
            return mesa_net_decoding_one_step(**inputs | unit, **states, max_CG_iteration=30)[0]

    return run, []


def _mesa_inputs(leading, H, D, grad):
    import torch

    inputs = {
        name: torch.randn(*leading, H, D, device="cuda", dtype=torch.bfloat16) for name in "qkv"
    }
    g = torch.nn.functional.logsigmoid(torch.randn(*leading, H, device="cuda") + 4)
    inputs |= dict(g=g, beta=torch.rand(*leading, H, device="cuda"))
    inputs["lamb"] = torch.rand(H, D, device="cuda") + 0.25
    return {name: x.requires_grad_(grad) for name, x in inputs.items()}


def path(shape, gates=False):
    """Its step is in the layer, of several functions, and has no time of its own here."""
    import torch
    from fla.ops.path_attn import parallel_path_attn
    from torch.nn.functional import logsigmoid, normalize

    if shape.packed:
        raise NotImplementedError("packed sequences are not timed with fla")
    B, T, H, D, HQ = shape.B, shape.T, shape.H, shape.D, shape.HQ or shape.H

    def normal(*sizes, dtype=torch.float32):
        return torch.randn(B, T, *sizes, device="cuda", dtype=dtype)

    inputs = {n: normal(h, D, dtype=torch.bfloat16) for n, h in dict(q=HQ, k=H, v=H).items()}
    inputs |= dict(w=normalize(normal(H, D), dim=-1), beta=2 * torch.rand(B, T, H, device="cuda"))
    if gates:
        inputs["g"] = logsigmoid(normal(HQ) + 4)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    return lambda: parallel_path_attn(**inputs)[0], list(inputs.values())


def path_fox(shape):
    return path(shape, gates=True)
