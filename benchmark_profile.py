"""Where the time of a step goes, in words: matrix products, attention, norms, optimiser, copies, the rest.

PyTorch's profiler names what runs: kernels on a GPU, operations on the CPU. Each name is sorted into the
first group whose words it contains.
"""

import os

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# In this order: flash attention's kernels are also made with CUTLASS, as matrix products are.
GROUPS = {
    "optimiser": ("adam", "multi_tensor_apply", "lerp", "addcmul", "addcdiv", "aten::sqrt", "aten::mul_",
                  "foreach", "lpnorm", "vector_norm"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "norms": ("layer_norm", "layernorm", "gammabeta", "batch_norm"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "addmm", "aten::mm", "bmm",
                        "conv", "fprop", "dgrad", "wgrad"),
    "copies and gathers": ("memcpy", "memset", "copy", "aten::cat", "catarray", "gather", "index", "scatter",
                           "fill", "zero_", "sort"),
    "GELU": ("gelu",),
}
REST = "sums, products, the rest"


def group(name: str) -> str:
    """The group of a kernel or operation."""
    lower = name.lower()
    return next((title for title, words in GROUPS.items() if any(word in lower for word in words)), REST)


def shares(step, device, calls: int = 3) -> dict:
    """-> {"groups": {title: share of the time}, "top": [(name, share), ...], "seconds": of one call}: time on
    the device, each kernel's or operation's own."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")        # the profiler's own messages
    step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        for _ in range(calls):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    own = {}
    for event in found.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            own[event.key] = event.self_device_time_total
        elif not on_gpu:
            own[event.key] = event.self_cpu_time_total
    total = sum(own.values())
    groups = dict.fromkeys([*GROUPS, REST], 0.0)
    for name, time in own.items():
        groups[group(name)] += time / total
    top = sorted(own, key=own.get, reverse=True)[:10]
    return {"groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
            "top": [(name, own[name] / total) for name in top], "seconds": total / 1e6 / calls}


def table(found: dict) -> list[str]:
    """Two Markdown tables: by group, and the longest names."""
    lines = ["| group | share |", "|---|---|"]
    lines += [f"| {title} | {100 * share:.1f} % |" for title, share in found["groups"].items()]
    lines += ["", f"In all {1000 * found['seconds']:.3g} ms a step, under the profiler.", "",
              "| longest | group | share |", "|---|---|---|"]
    for name, share in found["top"]:
        short = name if len(name) <= 70 else f"{name[:67]}..."
        lines.append(f"| `{short}` | {group(name)} | {100 * share:.1f} % |")
    return lines
